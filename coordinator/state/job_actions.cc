// Guards and actions of the job table (control-plane 4.1). An action finds the job's state already
// set and the attempt's outcome recorded.
#include <algorithm>

#include "coordinator/state/actions.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/names.h"
#include "coordinator/state/rollback.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

enum class DependencyState { kOpen, kMet, kNever };

DependencyState JudgeDependency(const Decision& d, const v1::DependencyRecord& dependency) {
  const v1::JobRecord* job = d.job(JobId{dependency.job()});
  if (job == nullptr) {
    return DependencyState::kNever;
  }
  if (job->state() != v1::JOB_STATE_DONE) {
    return DependencyState::kOpen;
  }
  const bool ok = job->result() == v1::JOB_RESULT_SUCCEEDED;
  switch (dependency.kind()) {
    case v1::DEPENDENCY_KIND_ANY:
      return DependencyState::kMet;
    case v1::DEPENDENCY_KIND_FAILED:
      return ok ? DependencyState::kNever : DependencyState::kMet;
    case v1::DEPENDENCY_KIND_OK:
    default:
      return ok ? DependencyState::kMet : DependencyState::kNever;
  }
}

const v1::AttemptRecord& Ended(const Decision& d, const JobStep& step) {
  HEDDLE_CHECK(step.attempt.has_value(), "kAttemptEnded without its attempt");
  const v1::AttemptRecord* attempt = d.attempt(*step.attempt);
  HEDDLE_CHECK(attempt != nullptr, "kAttemptEnded of an unknown attempt");
  return *attempt;
}

// Everything that a state leaves behind is cleared when the next one is entered.
v1::JobRecord& Enter(Decision& d, JobId id, const char* reason, std::string text) {
  v1::JobRecord& job = d.Edit(id);
  job.set_reason(reason);
  job.set_text(std::move(text));
  job.clear_stop_reason();
  job.clear_backoff_until_ms();
  return job;
}

void Finish(Decision& d, JobId id, v1::JobResult result, const std::string& reason,
            const std::string& text) {
  v1::JobRecord& job = Enter(d, id, reason.c_str(), text);
  job.set_result(result);
  job.set_finished_at(d.now().wall_ms);
  d.Note(id, "JOB_DONE", Str(Name(result), text.empty() ? "" : ": ", text));
  d.Do(effect::WakeScheduler{});
  for (const JobId waiting : d.state().WaitingFor(id)) {
    JobStep step;
    step.job = waiting;
    step.input = JobInput::kReconsider;
    StepJob(d, step);
  }
}

void StopAttempt(Decision& d, const JobStep& step, v1::StopReason reason, int64_t grace_ms) {
  const std::optional<AttemptId> attempt = LiveAttempt(d, step.job);
  if (!attempt.has_value()) {
    return;  // FENCING of a command: its end decides
  }
  AttemptStep stop;
  stop.attempt = *attempt;
  stop.input = AttemptInput::kStop;
  stop.reason = reason;
  stop.grace_ms = grace_ms;
  stop.text = step.text;
  StepAttempt(d, stop);
}

void BeginStopping(Decision& d, const JobStep& step, v1::StopReason reason, const char* code,
                   int64_t default_grace_ms) {
  v1::JobRecord& job = Enter(d, step.job, code, step.text);
  job.set_stop_reason(reason);
  const int64_t grace = std::clamp<int64_t>(step.grace_ms.value_or(default_grace_ms), 0,
                                            d.policy().stop_grace_ms_max);
  d.Note(
      step.job, "JOB_STOPPING",
      Str(Name(reason), step.text.empty() ? "" : ": ", step.text, ", grace ", grace / 1000, " s"));
  StopAttempt(d, step, reason, grace);
}

}  // namespace

// ---- guards ----

bool DependenciesMet(const Decision& d, const v1::JobRecord& job, const JobStep&) {
  if (job.start_at() > d.now().wall_ms) {
    return false;
  }
  return std::all_of(job.after().begin(), job.after().end(), [&d](const v1::DependencyRecord& one) {
    return JudgeDependency(d, one) == DependencyState::kMet;
  });
}
bool DependencyNever(const Decision& d, const v1::JobRecord& job, const JobStep&) {
  return std::any_of(job.after().begin(), job.after().end(), [&d](const v1::DependencyRecord& one) {
    return JudgeDependency(d, one) == DependencyState::kNever;
  });
}
bool AttemptSucceeded(const Decision& d, const v1::JobRecord&, const JobStep& step) {
  return Ended(d, step).outcome() == v1::ATTEMPT_OUTCOME_SUCCEEDED;
}
bool AttemptLeft(const Decision& d, const v1::JobRecord&, const JobStep& step) {
  const v1::AttemptOutcome outcome = Ended(d, step).outcome();
  return outcome == v1::ATTEMPT_OUTCOME_PREEMPTED || outcome == v1::ATTEMPT_OUTCOME_DRAINED ||
         outcome == v1::ATTEMPT_OUTCOME_NEVER_STARTED;
}
bool MayRetry(const Decision& d, const v1::JobRecord& job, const JobStep& step) {
  return Judge(d, job, Ended(d, step)).retry;
}
bool StoppingForPause(const Decision&, const v1::JobRecord& job, const JobStep&) {
  return job.stop_reason() == v1::STOP_REASON_PAUSE;
}
bool StoppingForCancel(const Decision&, const v1::JobRecord& job, const JobStep&) {
  return job.stop_reason() == v1::STOP_REASON_CANCEL;
}
bool StoppingForTime(const Decision&, const v1::JobRecord& job, const JobStep&) {
  return job.stop_reason() == v1::STOP_REASON_TIME_LIMIT;
}

// ---- idle jobs ----

void Queue(Decision& d, const JobStep& step) {
  // Met once is met: what it waited for may be resumed later.
  Enter(d, step.job, "NOT_YET_EVALUATED", "").clear_after();
  d.Note(step.job, "JOB_QUEUED", "in the queue");
  d.Do(effect::WakeScheduler{});
}
void Wait(Decision& d, const JobStep& step) {
  const bool time = d.job(step.job)->start_at() > d.now().wall_ms;
  Enter(d, step.job, time ? "START_TIME" : "DEPENDENCY", "");
  d.Note(step.job, "JOB_WAITING", time ? "until its start time" : "for other jobs");
  // One of them may have ended otherwise already (J6): nobody would tell again.
  JobStep again;
  again.job = step.job;
  again.input = JobInput::kReconsider;
  StepJob(d, again);
}
void Hold(Decision& d, const JobStep& step) {
  Enter(d, step.job, "HELD", step.text);
  d.Note(step.job, "JOB_HELD", step.text);
}
void PauseIdle(Decision& d, const JobStep& step) {
  Enter(d, step.job, "PAUSED", step.text);
  d.Note(step.job, "JOB_PAUSED", step.text);
}
void CancelIdle(Decision& d, const JobStep& step) {
  Finish(d, step.job, v1::JOB_RESULT_CANCELLED, "USER_CANCELLED", step.text);
}
void CancelNever(Decision& d, const JobStep& step) {
  std::string text = "a job it waits for ended otherwise";
  for (const v1::DependencyRecord& one : d.job(step.job)->after()) {
    if (JudgeDependency(d, one) == DependencyState::kNever) {
      text = Str("waits for ", JobId{one.job()}, ", which ended otherwise");
      break;
    }
  }
  Finish(d, step.job, v1::JOB_RESULT_CANCELLED, "DEP_NEVER", text);
}
void FinishInfeasible(Decision& d, const JobStep& step) {
  Finish(d, step.job, v1::JOB_RESULT_FAILED, "INFEASIBLE", step.text);
}

void ResumePaused(Decision& d, const JobStep& step) {
  if (step.config != nullptr) {
    *d.Edit(step.job).mutable_config() = *step.config;
  }
  if (d.job(step.job)->state() == v1::JOB_STATE_WAITING) {
    Wait(d, step);
    return;
  }
  Queue(d, step);
}

void ResumeDone(Decision& d, const JobStep& step) {
  v1::JobRecord& job = d.Edit(step.job);
  v1::RunRecord& run = *job.add_runs();
  run.set_result(job.result());
  run.set_reason(job.reason());
  run.set_finished_at(job.finished_at());
  run.set_last_attempt(job.attempts());
  job.clear_result();
  job.clear_finished_at();
  job.clear_last_failure();
  job.clear_run_time_ms();
  job.clear_rollback_steps();
  job.set_restarts(0);
  job.set_failures(0);
  job.set_boost(0);
  job.set_first_attempt(job.attempts() + 1);
  if (step.config != nullptr) {
    *job.mutable_config() = *step.config;
  }
  Enter(d, step.job, "NOT_YET_EVALUATED", "");
  d.Note(step.job, "JOB_RESUMED", Str("run ", job.runs_size() + 1));
  d.Do(effect::WakeScheduler{});
}

// ---- placing ----

namespace {

void AddTasks(Decision& d, AttemptId id, Fence fence, const event::AttemptPlaced& placed) {
  const v1::ParallelConfig parallel = d.job(id.job)->config().parallel();
  uint32_t index = 0;
  for (const event::PlacedTask& part : placed.tasks) {
    v1::TaskRecord& task = d.AddTask(id, index++);
    task.set_fence(fence.value);
    task.set_worker(part.worker);
    task.set_first_rank(part.first_rank);
    task.set_ranks(part.ranks);
    task.set_cpus_per_rank(parallel.cpus_per_rank());
    task.set_memory_per_rank(static_cast<uint64_t>(parallel.memory_per_rank()));
    for (const int32_t gpu : part.gpu_indices) {
      task.add_gpu_indices(gpu);
    }
    task.set_state(v1::TASK_STATE_ASSIGNED);
  }
}

}  // namespace

std::vector<CheckpointKey> RestoreFor(const Decision& d, const v1::JobRecord& job) {
  std::vector<CheckpointKey> keys;
  for (const v1::CheckpointRecord* one :
       Restorable(d, job, RollbackLimits(d.state(), JobId{job.id()}))) {
    if (keys.size() < d.policy().restore_candidates) {
      keys.push_back(KeyOf(*one));
    }
  }
  return keys;
}

void Place(Decision& d, const JobStep& step) {
  const event::AttemptPlaced& placed = *step.placed;
  v1::JobRecord& job = Enter(d, step.job, "", "");
  const Fence fence = d.NextFence();
  const AttemptId id{step.job, job.attempts() + 1};
  job.set_attempts(id.number);
  job.set_current_fence(fence.value);
  v1::AttemptRecord& attempt = d.AddAttempt(id);
  attempt.set_fence(fence.value);
  attempt.set_state(v1::ATTEMPT_STATE_ALLOCATED);
  attempt.set_world_size(RanksOf(job.config()));
  attempt.set_task_count(static_cast<uint32_t>(placed.tasks.size()));
  attempt.set_created_at(d.now().wall_ms);
  attempt.set_deadline_ms(d.now().ms + d.policy().acknowledge_ms);
  attempt.set_resend_ms(d.now().ms + d.policy().resend_ms);
  for (const CheckpointKey& key : RestoreFor(d, job)) {
    v1::CheckpointKeyRecord& restore = *attempt.add_restore();
    restore.set_job(key.job.value);
    restore.set_fence(key.fence.value);
    restore.set_step(key.step);
  }
  AddTasks(d, id, fence, placed);
  std::string where;
  for (const event::PlacedTask& part : placed.tasks) {
    where += Str(where.empty() ? "" : ", ", part.ranks, " on ", part.worker);
  }
  d.Note(id, "ATTEMPT_PLACED", Str("fence ", fence.value, ", ranks: ", where));
  for (const v1::TaskRecord* task : d.Tasks(id)) {
    SendAssign(d, id, *task);
  }
}

// ---- active jobs ----

void PauseActive(Decision& d, const JobStep& step) {
  BeginStopping(d, step, v1::STOP_REASON_PAUSE, "USER_PAUSED", d.policy().stop_grace_ms);
}
void CancelActive(Decision& d, const JobStep& step) {
  BeginStopping(d, step, v1::STOP_REASON_CANCEL, "USER_CANCELLED", 0);
}
void StopForTime(Decision& d, const JobStep& step) {
  BeginStopping(d, step, v1::STOP_REASON_TIME_LIMIT, "TIME_LIMIT", d.policy().stop_grace_ms);
}

void FinishSucceeded(Decision& d, const JobStep& step) {
  Absorb(d, *step.attempt);
  Finish(d, step.job, v1::JOB_RESULT_SUCCEEDED, "SUCCEEDED", "");
}

void Requeue(Decision& d, const JobStep& step) {
  Absorb(d, *step.attempt);
  const v1::AttemptRecord& attempt = Ended(d, step);
  v1::JobRecord& job = Enter(d, step.job, "NOT_YET_EVALUATED", "");
  job.set_boost(job.boost() + 1);
  if (attempt.outcome() == v1::ATTEMPT_OUTCOME_NEVER_STARTED && !attempt.cause().node().empty()) {
    job.set_avoid_node(attempt.cause().node());
    job.set_avoid_until_ms(d.now().ms + d.policy().avoid_node_ms);
  }
  d.Note(step.job, "JOB_QUEUED", Str("again, after ", Name(attempt.outcome())));
  d.Do(effect::WakeScheduler{});
}

void BackOff(Decision& d, const JobStep& step) {
  // The verdict looks at the job before this attempt is absorbed.
  const Verdict verdict = Judge(d, *d.job(step.job), Ended(d, step));
  Absorb(d, *step.attempt);
  const v1::CauseRecord cause = Ended(d, step).cause();
  Blame(d, step.job, cause);
  TakeRollback(d, *step.attempt);
  v1::JobRecord& job = Enter(d, step.job, "BACKOFF", cause.detail());
  job.set_failures(verdict.failures);
  job.set_restarts(job.restarts() + (verdict.burns ? 1 : 0));
  *job.mutable_last_failure() = cause;
  const int64_t delay = verdict.burns
                            ? BackoffMs(job.id(), verdict.failures, d.policy().backoff_base_ms,
                                        d.policy().backoff_ms_max)
                            : 0;
  job.set_backoff_until_ms(d.now().ms + delay);
  d.Note(
      step.job, "JOB_BACKOFF",
      Str(cause.code(), ": next attempt in ", delay / 1000, " s, restarts used ", job.restarts()));
  if (delay == 0) {
    JobStep over;
    over.job = step.job;
    over.input = JobInput::kBackoffOver;
    StepJob(d, over);
  }
}

void FinishFailed(Decision& d, const JobStep& step) {
  const Verdict verdict = Judge(d, *d.job(step.job), Ended(d, step));
  Absorb(d, *step.attempt);
  const v1::CauseRecord cause = Ended(d, step).cause();
  Blame(d, step.job, cause);
  TakeRollback(d, *step.attempt);  // who resumes it goes another way too
  v1::JobRecord& job = d.Edit(step.job);
  *job.mutable_last_failure() = cause;
  job.set_failures(verdict.failures);
  Finish(d, step.job, v1::JOB_RESULT_FAILED, verdict.code, verdict.text);
}

void FinishPaused(Decision& d, const JobStep& step) {
  Absorb(d, *step.attempt);
  const std::string text = d.job(step.job)->text();
  Enter(d, step.job, "PAUSED", text);
  d.Note(step.job, "JOB_PAUSED", text);
  d.Do(effect::WakeScheduler{});
}
void FinishCancelled(Decision& d, const JobStep& step) {
  Absorb(d, *step.attempt);
  const std::string text = d.job(step.job)->text();
  Finish(d, step.job, v1::JOB_RESULT_CANCELLED, "USER_CANCELLED", text);
}
void FinishTimedOut(Decision& d, const JobStep& step) {
  Absorb(d, *step.attempt);
  Finish(d, step.job, v1::JOB_RESULT_TIMED_OUT, "TIME_LIMIT",
         Str("ran ", d.job(step.job)->run_time_ms() / 1000, " s"));
}

}  // namespace heddle::state
