// Deadlines and the start of a coordinator. Every timer that is due either moves a state or moves
// its own deadline, so that the runtime never sees it again at once.
#include <algorithm>

#include "checkpoint/catalog/lineage.h"
#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

constexpr int64_t kDeleteAgainMs = 600'000;

Status NotDue(const Timer& timer) {
  return FailedPrecondition(Str("timer ", Name(timer.kind), " is not due"));
}

Status StartTime(Decision& d, const Timer& timer) {
  const v1::JobRecord* job = d.job(JobId{timer.job});
  if (job == nullptr || job->state() != v1::JOB_STATE_WAITING || job->start_at() == 0 ||
      job->start_at() > d.now().wall_ms) {
    return NotDue(timer);
  }
  d.Edit(JobId{timer.job}).clear_start_at();
  JobStep step;
  step.job = JobId{timer.job};
  step.input = JobInput::kReconsider;
  if (!StepJob(d, step)) {
    d.Edit(step.job).set_reason("DEPENDENCY");
    d.Note(step.job, "JOB_WAITING", "start time reached; waits for other jobs");
  }
  return OkStatus();
}

Status Backoff(Decision& d, const Timer& timer) {
  const v1::JobRecord* job = d.job(JobId{timer.job});
  if (job == nullptr || job->state() != v1::JOB_STATE_BACKOFF ||
      job->backoff_until_ms() > d.now().ms) {
    return NotDue(timer);
  }
  JobStep step;
  step.job = JobId{timer.job};
  step.input = JobInput::kBackoffOver;
  StepJob(d, step);
  return OkStatus();
}

Status AttemptDeadline(Decision& d, const v1::AttemptRecord& attempt, const Timer& timer) {
  if (attempt.deadline_ms() == 0 || attempt.deadline_ms() > d.now().ms) {
    return NotDue(timer);
  }
  AttemptStep step;
  step.attempt = IdOf(attempt);
  step.input = AttemptInput::kDeadline;
  if (!StepAttempt(d, step)) {
    d.Edit(step.attempt).clear_deadline_ms();
    d.Note(step.attempt, "ATTEMPT_DEADLINE", Str("nothing to do in ", Name(attempt.state())));
  }
  return OkStatus();
}

// Time to ask what a worker has, at one of the reminders of each settle_ms in FENCING. Times of an
// earlier start of the coordinator may be of another clock.
bool IsToSettle(const Decision& d, const v1::AttemptRecord& attempt) {
  if (attempt.state() != v1::ATTEMPT_STATE_FENCING) {
    return false;
  }
  const int64_t started = d.meta().started_ms();
  const int64_t from =
      attempt.ended_ms() > d.now().ms ? started : std::max(started, attempt.ended_ms());
  const int64_t elapsed = d.now().ms - from;
  const Policy& policy = d.policy();
  return elapsed / policy.settle_ms > (elapsed - policy.resend_ms) / policy.settle_ms;
}

// Unconfirmed commands again (P1): an effect lost with a broken stream is no harm.
Status Resend(Decision& d, const v1::AttemptRecord& attempt, const Timer& timer) {
  if (attempt.resend_ms() == 0 || attempt.resend_ms() > d.now().ms) {
    return NotDue(timer);
  }
  const AttemptId id = IdOf(attempt);
  int reminded = 0;
  bool waiting = false;
  for (const v1::TaskRecord* task : d.Tasks(id)) {
    reminded += Remind(d, id, *task) ? 1 : 0;
    waiting = waiting || !IsFinal(task->state());
    const v1::WorkerRecord* worker = d.worker(task->worker());
    if (IsFinal(task->state()) || worker == nullptr ||
        worker->state() != v1::WORKER_STATE_CONNECTED) {
      continue;
    }
    // A worker that never took the task may never answer for it, nor one that lost it: its
    // registration will (X2).
    if (attempt.state() != v1::ATTEMPT_STATE_ALLOCATED && !task->acknowledged()) {
      d.Do(effect::SendStale{worker->id(), worker->session(), "settle a task it never took"});
    } else if (IsToSettle(d, attempt)) {
      d.Do(effect::SendStale{worker->id(), worker->session(), "settle a task that does not end"});
    }
  }
  v1::AttemptRecord& edited = d.Edit(id);
  if (waiting) {
    edited.set_resend_ms(d.now().ms + d.policy().resend_ms);
  } else {
    edited.clear_resend_ms();
  }
  d.Note(id, "ATTEMPT_REMINDED", Str(reminded, " tasks in ", Name(edited.state())));
  return OkStatus();
}

Status RunLimit(Decision& d, const v1::AttemptRecord& attempt, const Timer& timer) {
  if (attempt.run_deadline_ms() == 0 || attempt.run_deadline_ms() > d.now().ms) {
    return NotDue(timer);
  }
  d.Edit(IdOf(attempt)).clear_run_deadline_ms();
  JobStep step;
  step.job = JobId{attempt.job()};
  step.input = JobInput::kTimeLimit;
  step.text = "schedule.time_limit is used up";
  if (!StepJob(d, step)) {
    d.Note(IdOf(attempt), "ATTEMPT_DEADLINE", "time limit while the job stops anyway");
  }
  return OkStatus();
}

Status Hang(Decision& d, const v1::AttemptRecord& attempt, const Timer& timer) {
  if (attempt.state() != v1::ATTEMPT_STATE_RUNNING || attempt.hang_kill_ms() == 0 ||
      timer.at_ms > d.now().ms) {
    return NotDue(timer);
  }
  const AttemptId id = IdOf(attempt);
  const Progress* known = d.state().progress(Fence{attempt.fence()});
  const Observation* seen = d.state().observed(Fence{attempt.fence()});
  const int64_t slow = seen == nullptr ? 0 : seen->slow_phase_ms();
  const int64_t from = std::max(
      {attempt.running_ms(), attempt.hang_from_ms(), slow, known == nullptr ? 0 : known->at_ms});
  const std::vector<const v1::TaskRecord*> tasks = d.Tasks(id);
  const bool heard = std::all_of(tasks.begin(), tasks.end(), [&d](const v1::TaskRecord* task) {
    const v1::WorkerRecord* worker = d.worker(task->worker());
    return worker != nullptr && worker->state() == v1::WORKER_STATE_CONNECTED;
  });
  if (heard && from + attempt.hang_kill_ms() <= d.now().ms) {
    AttemptStep step;
    step.attempt = id;
    step.input = AttemptInput::kHang;
    step.text = Str("no step for ", attempt.hang_kill_ms() / 1000, " s");
    StepAttempt(d, step);
    return OkStatus();
  }
  if (heard && slow == from) {
    // An evaluation or a save has no steps: count from when a rank was last seen at it.
    d.Edit(id).set_hang_from_ms(slow);
    d.Note(id, "ATTEMPT_HANG_WATCH", "no step, but a rank evaluates or saves");
    return OkStatus();
  }
  // Silence of a worker is no hang (P2): count anew.
  d.Edit(id).set_hang_from_ms(d.now().ms);
  d.Note(id, "ATTEMPT_HANG_WATCH", "progress unknown: a worker is not connected");
  return OkStatus();
}

Status Orphan(Decision& d, const Timer& timer) {
  const AttemptId id{JobId{timer.job}, static_cast<uint32_t>(timer.number)};
  const uint32_t index = static_cast<uint32_t>(timer.task);
  const v1::TaskRecord* task = d.task(id, index);
  if (task == nullptr || IsFinal(task->state()) || task->orphan_ms() == 0 ||
      task->orphan_ms() > d.now().ms) {
    return NotDue(timer);
  }
  MarkGone(d, id, index, "its shim must have killed it: no contact for longer than max_orphan");
  return OkStatus();
}

Status WorkerTimer(Decision& d, const Timer& timer) {
  const v1::WorkerRecord* worker = d.worker(timer.key);
  if (worker == nullptr) {
    return NotDue(timer);
  }
  if (timer.kind == TimerKind::kQuarantineEnd) {
    if (worker->health() != v1::WORKER_HEALTH_QUARANTINED ||
        worker->quarantined_until_ms() > d.now().ms) {
      return NotDue(timer);
    }
    v1::WorkerRecord& edited = d.Edit(timer.key);
    edited.set_health(v1::WORKER_HEALTH_OK);
    edited.clear_health_reason();
    edited.clear_quarantined_until_ms();
    edited.clear_blamed_ms();
    d.NoteWorker(timer.key, "NODE_QUARANTINE_OVER", "");
  } else {
    if (worker->probation_until_ms() == 0 || worker->probation_until_ms() > d.now().ms) {
      return NotDue(timer);
    }
    d.Edit(timer.key).clear_probation_until_ms();
    d.NoteWorker(timer.key, "NODE_PROBATION_OVER", "");
  }
  d.Do(effect::WakeScheduler{});
  return OkStatus();
}

Status CheckpointTimer(Decision& d, const Timer& timer) {
  const CheckpointKey key{JobId{timer.job}, Fence{timer.fence}, timer.number};
  const v1::CheckpointRecord* record = d.checkpoint(key);
  if (record == nullptr) {
    return NotDue(timer);
  }
  if (timer.kind == TimerKind::kCheckpointOpen) {
    if (record->open_deadline_ms() == 0 || record->open_deadline_ms() > d.now().ms) {
      return NotDue(timer);
    }
    AbortCheckpoint(d, key, "not finished in time");
    return OkStatus();
  }
  if (record->delete_ms() == 0 || record->delete_ms() > d.now().ms) {
    return NotDue(timer);
  }
  d.Do(effect::DeleteCheckpointFiles{key, record->dir()});
  d.Edit(key).set_delete_ms(d.now().ms + kDeleteAgainMs);
  d.Note(key, "CHECKPOINT_DELETING", record->dir());
  return OkStatus();
}

Status IdempotencyTimer(Decision& d, const Timer& timer) {
  const size_t cut = timer.key.find('\0');
  const std::string identity = timer.key.substr(0, cut);
  const std::string request = cut == std::string::npos ? "" : timer.key.substr(cut + 1);
  const v1::IdempotencyRecord* record = d.state().idempotency(identity, request);
  if (record == nullptr || record->expires_ms() > d.now().ms) {
    return NotDue(timer);
  }
  d.DeleteIdempotency(identity, request);
  d.NoteCluster("REQUEST_FORGOTTEN", request);
  return OkStatus();
}

Status AttemptTimer(Decision& d, const Timer& timer) {
  const v1::AttemptRecord* attempt =
      d.attempt({JobId{timer.job}, static_cast<uint32_t>(timer.number)});
  if (attempt == nullptr || attempt->state() == v1::ATTEMPT_STATE_ENDED) {
    return NotDue(timer);
  }
  switch (timer.kind) {
    case TimerKind::kAttemptDeadline:
      return AttemptDeadline(d, *attempt, timer);
    case TimerKind::kAttemptResend:
      return Resend(d, *attempt, timer);
    case TimerKind::kAttemptRunLimit:
      return RunLimit(d, *attempt, timer);
    default:
      return Hang(d, *attempt, timer);
  }
}

}  // namespace

Status On(Decision& d, const event::TimerFired& e) {
  switch (e.timer.kind) {
    case TimerKind::kJobStart:
      return StartTime(d, e.timer);
    case TimerKind::kJobBackoff:
      return Backoff(d, e.timer);
    case TimerKind::kAttemptDeadline:
    case TimerKind::kAttemptResend:
    case TimerKind::kAttemptRunLimit:
    case TimerKind::kAttemptHang:
      return AttemptTimer(d, e.timer);
    case TimerKind::kTaskOrphan:
      return Orphan(d, e.timer);
    case TimerKind::kQuarantineEnd:
    case TimerKind::kProbationEnd:
      return WorkerTimer(d, e.timer);
    case TimerKind::kCheckpointOpen:
    case TimerKind::kCheckpointDelete:
      return CheckpointTimer(d, e.timer);
    case TimerKind::kIdempotencyExpiry:
      return IdempotencyTimer(d, e.timer);
  }
  return Internal("timer of an unknown kind");
}

// ---- start ------------------------------------------------------------------------------------

namespace {

// The deadline of the attempt's state, as if it had been entered now.
int64_t FreshDeadline(const Decision& d, const v1::AttemptRecord& attempt) {
  const Policy& policy = d.policy();
  switch (attempt.state()) {
    case v1::ATTEMPT_STATE_ALLOCATED:
      return d.now().ms + policy.acknowledge_ms;
    case v1::ATTEMPT_STATE_PREPARING:
      return d.now().ms + policy.prepare_ms;
    case v1::ATTEMPT_STATE_RENDEZVOUS:
      return d.now().ms + policy.rendezvous_ms;
    case v1::ATTEMPT_STATE_STOPPING:
      return attempt.stop_phase() == v1::STOP_PHASE_COLLECT
                 ? d.now().ms + policy.collect_ms
                 : d.now().ms + attempt.grace_ms() + policy.term_ms + policy.unkillable_ms;
    default:
      return 0;
  }
}

void CountAnew(Decision& d, const v1::AttemptRecord& stored) {
  const AttemptId id = IdOf(stored);
  v1::AttemptRecord& attempt = d.Edit(id);
  if (attempt.deadline_ms() > 0) {
    attempt.set_deadline_ms(FreshDeadline(d, attempt));
  }
  if (attempt.resend_ms() > 0) {
    attempt.set_resend_ms(d.now().ms + d.policy().resend_ms);
  }
  attempt.set_hang_from_ms(d.now().ms);
  for (const v1::TaskRecord* task : d.Tasks(id)) {
    if (task->orphan_ms() > 0 && !IsFinal(task->state())) {
      d.Edit(id, task->task())
          .set_orphan_ms(d.now().ms + d.policy().max_orphan_ms + d.policy().orphan_margin_ms);
    }
  }
}

// Newest checkpoints of unfinished jobs that nobody has read again yet.
void AskToVerify(Decision& d) {
  for (const auto& [id, job] : d.state().jobs()) {
    if (job->state() == v1::JOB_STATE_DONE) {
      continue;
    }
    std::vector<v1::CheckpointRecord> records;
    for (const CheckpointPtr& one : d.state().CheckpointsOf(JobId{id})) {
      if (checkpoint::IsGood(*one)) {
        records.push_back(*one);
      }
    }
    for (const size_t i : checkpoint::ToVerify(records)) {
      d.Do(effect::VerifyCheckpoint{records[i]});
    }
  }
}

}  // namespace

Status On(Decision& d, const event::CoordinatorStarted& e) {
  if (e.term.value <= d.state().meta().term()) {
    return Aborted(Str("term ", e.term, " is not above ", d.state().meta().term()));
  }
  v1::MetaRecord& meta = d.EditMeta();
  if (meta.cluster_id().empty()) {
    meta.set_schema(1);
    meta.set_cluster_id(e.cluster_id);
    meta.set_secret(e.secret);
  }
  meta.set_term(e.term.value);
  meta.set_started_ms(d.now().ms);
  for (const auto& [id, entry] : d.state().nodes()) {
    if (entry.record == nullptr) {
      continue;
    }
    const v1::WorkerState state = entry.record->state();
    if (state == v1::WORKER_STATE_CONNECTED || state == v1::WORKER_STATE_SUSPECT) {
      v1::WorkerRecord& worker = d.Edit(id);
      worker.set_state(v1::WORKER_STATE_SUSPECT);
      worker.set_unverified(true);
    }
  }
  for (const auto& [key, attempt] : d.state().attempts()) {
    if (attempt->state() != v1::ATTEMPT_STATE_ENDED) {
      CountAnew(d, *attempt);
    }
  }
  d.NoteCluster("COORDINATOR_STARTED", Str("term ", e.term));
  AskToVerify(d);
  d.Do(effect::WakeScheduler{});
  return OkStatus();
}

}  // namespace heddle::state
