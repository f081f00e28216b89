// Guards and actions of the attempt table (control-plane 4.2).
#include <algorithm>

#include "coordinator/state/actions.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/diagnosis.h"
#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

bool ExitsClean(const v1::TaskRecord& task) {
  return static_cast<uint32_t>(task.exits_size()) >= task.ranks() &&
         std::all_of(task.exits().begin(), task.exits().end(), IsClean);
}
bool EndedClean(const v1::TaskRecord& task) {
  return task.state() == v1::TASK_STATE_EXITED && ExitsClean(task);
}
bool Failed(const v1::TaskRecord& task) {
  if (task.state() == v1::TASK_STATE_GONE) {
    return true;
  }
  if (task.state() == v1::TASK_STATE_EXITED && !ExitsClean(task)) {
    return true;
  }
  return std::any_of(task.exits().begin(), task.exits().end(),
                     [](const v1::RankOutcome& exit) { return !IsClean(exit); });
}

template <typename Test>
bool All(const Decision& d, const v1::AttemptRecord& attempt, Test test) {
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    if (!test(*task)) {
      return false;
    }
  }
  return true;
}

v1::CauseRecord CauseOf(const char* code, std::string detail, const std::string& node = {}) {
  v1::CauseRecord cause;
  cause.set_code(code);
  cause.set_category(FindCode(code)->category);
  cause.set_detail(std::move(detail));
  cause.set_node(node);
  return cause;
}

// The first recorded cause wins, except that a lost peer is never the root.
void SetCause(Decision& d, AttemptId id, v1::CauseRecord cause, bool replace = false) {
  v1::AttemptRecord& attempt = d.Edit(id);
  if (attempt.has_cause() && !replace) {
    if (attempt.others_size() < 16) {
      *attempt.add_others() = std::move(cause);
    }
    return;
  }
  if (cause.at() == 0) {
    cause.set_at(d.now().wall_ms);
  }
  if (cause.step() == 0) {
    cause.set_step(StepReached(d, attempt));
  }
  *attempt.mutable_cause() = std::move(cause);
}

// What stands still, and where: the newest finding says it best.
v1::CauseRecord StandstillCause(const Decision& d, const v1::AttemptRecord& attempt,
                                const std::string& how_long) {
  const v1::FindingRecord* known = NewestStandstill(attempt);
  const bool mismatch = known != nullptr && known->kind() == "MISMATCH";
  v1::FindingRecord finding = known == nullptr ? v1::FindingRecord() : *known;
  if (const std::optional<Situation> situation =
          SituationOf(d.state(), Fence{attempt.fence()}, d.now());
      !mismatch && situation.has_value()) {
    finding = DescribeStandstill(*situation);
  }
  v1::CauseRecord cause =
      CauseOf(mismatch ? "COLLECTIVE_MISMATCH" : "HUNG",
              Str(how_long, how_long.empty() || finding.text().empty() ? "" : ": ", finding.text()),
              finding.node());
  if (finding.has_rank()) {
    cause.set_rank(finding.rank());
  }
  return cause;
}

// Ranks that launched different collectives end each other: that is the root, whoever ended first.
v1::CauseRecord CauseOfEnds(const Decision& d, const v1::AttemptRecord& attempt) {
  const v1::FindingRecord* known = NewestStandstill(attempt);
  return known != nullptr && known->kind() == "MISMATCH" ? StandstillCause(d, attempt, "")
                                                         : RootCause(d, attempt);
}

std::string MissingRanks(const Decision& d, const v1::AttemptRecord& attempt) {
  std::string text;
  int missing = 0;
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    for (uint32_t rank = task->first_rank(); rank < task->first_rank() + task->ranks(); ++rank) {
      if (std::find(task->joined().begin(), task->joined().end(), rank) == task->joined().end() &&
          ++missing <= 8) {
        text += Str(text.empty() ? "" : ", ", rank, " on ", task->worker());
      }
    }
  }
  return Str(missing, " ranks did not join: ", text, missing > 8 ? ", ..." : "");
}

void RemindAll(Decision& d, AttemptId id) {
  for (const v1::TaskRecord* task : d.Tasks(id)) {
    Remind(d, id, *task);
  }
  d.Edit(id).set_resend_ms(d.now().ms + d.policy().resend_ms);
}

// Into the last rung of the ladder: TERM, KILL, and A13 if that does not help.
void EnterKill(Decision& d, AttemptId id) {
  v1::AttemptRecord& attempt = d.Edit(id);
  attempt.set_stop_phase(v1::STOP_PHASE_KILL);
  attempt.set_deadline_ms(d.now().ms + d.policy().term_ms + d.policy().unkillable_ms);
  RemindAll(d, id);
}

void StopFailed(Decision& d, AttemptId id, v1::CauseRecord cause) {
  SetCause(d, id, std::move(cause));
  v1::AttemptRecord& attempt = d.Edit(id);
  attempt.set_stop_reason(v1::STOP_REASON_FAIL);
  attempt.set_stop_text(attempt.cause().detail());
  d.Note(id, "ATTEMPT_STOPPING", Str(attempt.cause().code(), ": ", attempt.cause().detail()));
}

v1::AttemptOutcome OutcomeOf(v1::StopReason reason) {
  switch (reason) {
    case v1::STOP_REASON_NEVER_STARTED:
      return v1::ATTEMPT_OUTCOME_NEVER_STARTED;
    case v1::STOP_REASON_PREEMPT:
      return v1::ATTEMPT_OUTCOME_PREEMPTED;
    case v1::STOP_REASON_PAUSE:
      return v1::ATTEMPT_OUTCOME_PAUSED;
    case v1::STOP_REASON_CANCEL:
      return v1::ATTEMPT_OUTCOME_CANCELLED;
    case v1::STOP_REASON_TIME_LIMIT:
      return v1::ATTEMPT_OUTCOME_TIMED_OUT;
    case v1::STOP_REASON_DRAIN:
      return v1::ATTEMPT_OUTCOME_DRAINED;
    case v1::STOP_REASON_RESIZE:
      return v1::ATTEMPT_OUTCOME_RESIZED;
    default:
      return v1::ATTEMPT_OUTCOME_FAILED;
  }
}

const char* CodeOf(v1::StopReason reason) {
  switch (reason) {
    case v1::STOP_REASON_PAUSE:
      return "USER_PAUSED";
    case v1::STOP_REASON_CANCEL:
      return "USER_CANCELLED";
    case v1::STOP_REASON_TIME_LIMIT:
      return "TIME_LIMIT";
    case v1::STOP_REASON_DRAIN:
      return "NODE_DRAINED";
    default:
      return "USER_PREEMPTED";
  }
}

// What FENCING and ENDED have in common: nobody writes under this fence any more (L2).
void CloseFence(Decision& d, AttemptId id, const char* why) {
  v1::AttemptRecord& attempt = d.Edit(id);
  attempt.set_last_step(StepReached(d, attempt));
  attempt.set_ended_ms(d.now().ms);
  attempt.clear_deadline_ms();
  attempt.clear_run_deadline_ms();
  AbortCheckpoints(d, id, why);
  RaiseFence(d, id.job, Fence{attempt.fence()});
  d.Do(effect::DropRendezvous{Fence{attempt.fence()}});
}

void Conclude(Decision& d, AttemptId id) {
  if (d.attempt(id)->counted()) {
    return;
  }
  JobStep step;
  step.job = id.job;
  step.input = JobInput::kAttemptEnded;
  step.attempt = id;
  HEDDLE_CHECK(StepJob(d, step), "job ", id.job, " has no row for the end of its attempt in state ",
               Name(d.job(id.job)->state()));
}

void End(Decision& d, AttemptId id, v1::AttemptOutcome outcome, const char* why) {
  const bool fenced_before = d.attempt(id)->counted() || d.attempt(id)->ended_ms() > 0;
  if (!fenced_before) {
    CloseFence(d, id, why);
  }
  v1::AttemptRecord& attempt = d.Edit(id);
  attempt.set_outcome(outcome);
  attempt.set_ended_at(d.now().wall_ms);
  attempt.clear_resend_ms();
  attempt.clear_deadline_ms();
  attempt.clear_stop_phase();
  d.Note(id, "ATTEMPT_ENDED",
         Str(Name(outcome), " at step ", attempt.last_step(),
             attempt.has_cause() && outcome != v1::ATTEMPT_OUTCOME_SUCCEEDED
                 ? Str(": ", attempt.cause().code(), ": ", attempt.cause().detail())
                 : std::string()));
  d.Do(effect::WakeScheduler{});
  Conclude(d, id);
}

void FenceOff(Decision& d, AttemptId id, const std::string& text) {
  CloseFence(d, id, "attempt fenced");
  v1::AttemptRecord& attempt = d.Edit(id);
  attempt.set_outcome(v1::ATTEMPT_OUTCOME_LOST);
  attempt.set_stop_phase(v1::STOP_PHASE_KILL);
  d.Note(id, "ATTEMPT_FENCED", text);
  RemindAll(d, id);
  if (!IsCommand(*d.job(id.job))) {
    Conclude(d, id);
  }
}

}  // namespace

// ---- guards ----

bool AllAcknowledged(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  return All(d, a, [](const v1::TaskRecord& task) { return task.acknowledged(); });
}
bool AnyRefused(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  return !All(d, a, [](const v1::TaskRecord& task) {
    return !IsFinal(task.state()) || task.acknowledged();
  });
}
bool AnyFailed(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  return !All(d, a, [](const v1::TaskRecord& task) { return !Failed(task); });
}
bool AllReady(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  return All(d, a, [](const v1::TaskRecord& task) {
    return task.state() == v1::TASK_STATE_READY || task.state() == v1::TASK_STATE_RUNNING ||
           task.state() == v1::TASK_STATE_STOPPING || EndedClean(task);
  });
}
bool AllJoined(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  const bool command = IsCommand(*d.job(JobId{a.job()}));
  return All(d, a, [command](const v1::TaskRecord& task) {
    if (EndedClean(task)) {
      return true;
    }
    if (command) {
      return task.state() == v1::TASK_STATE_RUNNING || task.state() == v1::TASK_STATE_STOPPING;
    }
    return static_cast<uint32_t>(task.joined_size()) >= task.ranks();
  });
}
bool AllClean(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  return All(d, a, EndedClean);
}
bool AllFinal(const Decision& d, const v1::AttemptRecord& a, const AttemptStep&) {
  return All(d, a, [](const v1::TaskRecord& task) { return IsFinal(task.state()); });
}
bool Collecting(const Decision&, const v1::AttemptRecord& a, const AttemptStep&) {
  return a.stop_phase() == v1::STOP_PHASE_COLLECT;
}
bool StopsHarder(const Decision&, const v1::AttemptRecord& a, const AttemptStep& s) {
  return a.stop_phase() == v1::STOP_PHASE_GRACE && s.grace_ms == 0;
}

// ---- the way up ----

void StartPreparing(Decision& d, const AttemptStep& step) {
  v1::AttemptRecord& attempt = d.Edit(step.attempt);
  attempt.set_deadline_ms(d.now().ms + d.policy().prepare_ms);
  attempt.clear_resend_ms();
  d.Note(step.attempt, "ATTEMPT_PREPARING", "all workers have their task");
}

void StartRendezvous(Decision& d, const AttemptStep& step) {
  v1::AttemptRecord& attempt = d.Edit(step.attempt);
  attempt.set_deadline_ms(d.now().ms + d.policy().rendezvous_ms);
  d.Note(step.attempt, "ATTEMPT_RENDEZVOUS", "all tasks are ready; ranks join");
  RemindAll(d, step.attempt);
}

void StartRunning(Decision& d, const AttemptStep& step) {
  v1::AttemptRecord& attempt = d.Edit(step.attempt);
  v1::JobRecord& job = d.Edit(step.attempt.job);
  attempt.clear_deadline_ms();
  attempt.clear_resend_ms();
  attempt.set_running_at(d.now().wall_ms);
  attempt.set_running_ms(d.now().ms);
  if (job.started_at() == 0) {
    job.set_started_at(d.now().wall_ms);
  }
  if (!IsCommand(job)) {
    attempt.set_hang_kill_ms(job.config().schedule().hang_kill_after());
    for (const v1::CheckpointKeyRecord& key : attempt.restore()) {
      if (key.step() == attempt.start_step() && attempt.restored_fence() == 0) {
        attempt.set_restored_fence(key.fence());
      }
    }
  }
  if (job.config().schedule().time_limit() > 0) {
    attempt.set_run_deadline_ms(
        d.now().ms +
        std::max<int64_t>(1, job.config().schedule().time_limit() - job.run_time_ms()));
  }
  d.Note(step.attempt, "ATTEMPT_RUNNING", Str("from step ", attempt.start_step()));
}

// ---- the way down ----

void StopNeverStarted(Decision& d, const AttemptStep& step) {
  std::string node;
  const char* code = "NOT_ACKNOWLEDGED";
  std::string detail;
  for (const v1::TaskRecord* task : d.Tasks(step.attempt)) {
    if (IsFinal(task->state()) && !task->acknowledged()) {
      node = task->worker();
      code = "TASK_REFUSED";
      detail = Str(task->worker(), " refused: ", task->detail(), task->gone_reason());
      break;
    }
    if (!task->acknowledged() && node.empty()) {
      node = task->worker();
      detail = Str(task->worker(), " did not take its task in time");
    }
  }
  SetCause(d, step.attempt, CauseOf(code, detail, node));
  v1::AttemptRecord& attempt = d.Edit(step.attempt);
  attempt.set_stop_reason(v1::STOP_REASON_NEVER_STARTED);
  attempt.set_stop_text(detail);
  d.Note(step.attempt, "ATTEMPT_STOPPING", Str(code, ": ", detail));
  EnterKill(d, step.attempt);
}

void FailPreparing(Decision& d, const AttemptStep& step) {
  StopFailed(d, step.attempt,
             step.input == AttemptInput::kDeadline
                 ? CauseOf("PREPARE_TIMEOUT", "not all tasks became ready in time")
                 : RootCause(d, *d.attempt(step.attempt)));
  EnterKill(d, step.attempt);
}

void FailRendezvous(Decision& d, const AttemptStep& step) {
  StopFailed(d, step.attempt,
             CauseOf("RENDEZVOUS_TIMEOUT", MissingRanks(d, *d.attempt(step.attempt))));
  EnterKill(d, step.attempt);
}

void FailByRank(Decision& d, const AttemptStep& step) {
  StopFailed(d, step.attempt, RootCause(d, *d.attempt(step.attempt)));
  v1::AttemptRecord& attempt = d.Edit(step.attempt);
  attempt.set_stop_phase(v1::STOP_PHASE_COLLECT);
  attempt.set_deadline_ms(d.now().ms + d.policy().collect_ms);
  attempt.clear_resend_ms();
}

void FailHung(Decision& d, const AttemptStep& step) {
  StopFailed(d, step.attempt, StandstillCause(d, *d.attempt(step.attempt), step.text));
  EnterKill(d, step.attempt);
}

void StopOnRequest(Decision& d, const AttemptStep& step) {
  const bool running = d.attempt(step.attempt)->running_ms() > 0;
  SetCause(d, step.attempt, CauseOf(CodeOf(step.reason), step.text));
  v1::AttemptRecord& attempt = d.Edit(step.attempt);
  attempt.set_stop_reason(step.reason);
  attempt.set_stop_text(step.text);
  attempt.set_grace_ms(running ? step.grace_ms : 0);
  d.Note(step.attempt, "ATTEMPT_STOPPING",
         Str(Name(step.reason), step.text.empty() ? "" : ": ", step.text));
  if (attempt.grace_ms() == 0) {
    EnterKill(d, step.attempt);
    return;
  }
  attempt.set_stop_phase(v1::STOP_PHASE_GRACE);
  attempt.set_deadline_ms(d.now().ms + attempt.grace_ms() + d.policy().term_ms +
                          d.policy().unkillable_ms);
  RemindAll(d, step.attempt);
}

void KillNow(Decision& d, const AttemptStep& step) {
  const v1::AttemptRecord& attempt = *d.attempt(step.attempt);
  if (attempt.stop_phase() == v1::STOP_PHASE_COLLECT) {
    SetCause(d, step.attempt, CauseOfEnds(d, attempt), true);
  }
  d.Note(step.attempt, "ATTEMPT_KILLING",
         Str("root cause: ", attempt.cause().code(), ": ", attempt.cause().detail()));
  EnterKill(d, step.attempt);
}

void FenceLost(Decision& d, const AttemptStep& step) {
  const v1::AttemptRecord& attempt = *d.attempt(step.attempt);
  const bool replace = !attempt.has_cause() || attempt.cause().code() == "PEER_FAILED";
  SetCause(d, step.attempt, CauseOf("NODE_LOST", step.text, step.worker), replace);
  FenceOff(d, step.attempt, Str(step.worker, ": ", step.text));
}

void FenceUnkillable(Decision& d, const AttemptStep& step) {
  for (const v1::TaskRecord* task : d.Tasks(step.attempt)) {
    if (IsFinal(task->state()) || d.worker(task->worker()) == nullptr) {
      continue;
    }
    v1::WorkerRecord& worker = d.Edit(task->worker());
    worker.set_health(v1::WORKER_HEALTH_QUARANTINED);
    worker.set_health_reason(Str("UNKILLABLE: task ", task->task(), " of ", step.attempt));
    worker.set_quarantined_until_ms(d.now().ms + d.policy().quarantine_ms);
    d.NoteWorker(worker.id(), "NODE_QUARANTINED", worker.health_reason());
    SetCause(d, step.attempt,
             CauseOf("UNKILLABLE", Str("task ", task->task(), " outlives KILL"), task->worker()));
  }
  FenceOff(d, step.attempt, "a task outlives KILL");
}

// ---- the end ----

void EndSucceeded(Decision& d, const AttemptStep& step) {
  End(d, step.attempt, v1::ATTEMPT_OUTCOME_SUCCEEDED, "attempt ended");
}

void EndStopped(Decision& d, const AttemptStep& step) {
  const v1::AttemptRecord& attempt = *d.attempt(step.attempt);
  if (attempt.stop_phase() == v1::STOP_PHASE_COLLECT) {
    SetCause(d, step.attempt, CauseOfEnds(d, attempt), true);
  } else if (attempt.has_cause() && attempt.cause().code() == "PEER_FAILED") {
    if (std::optional<v1::CauseRecord> root = LateRoot(d, attempt); root.has_value()) {
      SetCause(d, step.attempt, *std::move(root), true);
    }
  }
  const bool clean = AllClean(d, attempt, step);
  End(d, step.attempt, clean ? v1::ATTEMPT_OUTCOME_SUCCEEDED : OutcomeOf(attempt.stop_reason()),
      "attempt ended");
}

void EndFenced(Decision& d, const AttemptStep& step) {
  End(d, step.attempt, v1::ATTEMPT_OUTCOME_LOST, "attempt ended");
}

}  // namespace heddle::state
