// Requests of users (control-plane 4.1, section 12): repeatable by request id, judged by the job
// table.
#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <set>

#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"
#include "coordinator/state/rollback.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

// R1: a request that was answered before is answered alike. Nothing for a new one.
std::optional<Status> Repeated(Decision& d, const ClientRequest& request) {
  if (request.request_id.empty()) {
    return std::nullopt;
  }
  const v1::IdempotencyRecord* known = d.state().idempotency(request.identity, request.request_id);
  if (known == nullptr) {
    return std::nullopt;
  }
  if (known->digest() != request.digest) {
    return AlreadyExists(
        Str("request id '", request.request_id, "' was used for another request before"));
  }
  d.SetJob(JobId{known->job()});
  return OkStatus();
}

void Remember(Decision& d, const ClientRequest& request, JobId job, const std::string& node = {}) {
  if (request.request_id.empty() || MutantsOf(d.policy()).idempotency_key_lost) {
    return;
  }
  v1::IdempotencyRecord record;
  record.set_identity(request.identity);
  record.set_request_id(request.request_id);
  record.set_digest(request.digest);
  record.set_job(job.value);
  record.set_node(node);
  record.set_expires_ms(d.now().ms + d.policy().idempotency_ms);
  d.AddIdempotency(std::move(record));
}

// The job, or why the request cannot be judged.
StatusOr<const v1::JobRecord*> Find(Decision& d, const ClientRequest& request, JobId id) {
  const v1::JobRecord* job = d.job(id);
  if (job == nullptr) {
    return NotFound(Str("no job ", id));
  }
  d.SetJob(id);
  d.SetActor(request.identity);
  if (request.expect_version != 0 && request.expect_version != job->version()) {
    return Aborted(Str("job ", id, " has changed (version ", job->version(), ", not ",
                       request.expect_version, ")"));
  }
  return job;
}

Status WrongState(const v1::JobRecord& job, const char* verb) {
  return FailedPrecondition(
      Str("cannot ", verb, " job ", JobId{job.id()}, ": it is ", Name(job.state()),
          job.state() == v1::JOB_STATE_STOPPING ? Str(" (", Name(job.stop_reason()), ")")
                                                : std::string()));
}

Status CheckSubmit(const Decision& d, const event::JobSubmitted& e) {
  if (e.id.value == 0 || d.job(e.id) != nullptr) {
    return Internal(Str("job id ", e.id, " is taken"));
  }
  RETURN_IF_ERROR(Admit(e.config));
  for (const v1::DependencyRecord& dependency : e.after) {
    if (d.job(JobId{dependency.job()}) == nullptr) {
      return NotFound(Str("after: no job ", JobId{dependency.job()}));
    }
  }
  if (e.resume_from.has_value()) {
    const v1::CheckpointRecord* source = d.checkpoint(*e.resume_from);
    if (source == nullptr) {
      return NotFound(Str("no checkpoint ", ToText(*e.resume_from)));
    }
    RETURN_IF_ERROR(CheckResumeFrom(d.state(), *source));
  }
  return OkStatus();
}

// Without these fields two configs of one run must be equal (J24).
v1::RunConfig Fixed(v1::RunConfig config) {
  config.mutable_training()->clear_max_steps();
  config.mutable_parallel()->clear_ranks();
  config.clear_schedule();
  config.clear_logging();
  return config;
}

Status CheckOverrides(const v1::JobRecord& job, const v1::RunConfig& config) {
  if (!google::protobuf::util::MessageDifferencer::Equals(Fixed(job.config()), Fixed(config))) {
    return InvalidArgument(
        "resume takes training.max_steps, parallel.ranks, schedule.* and logging.* only; anything "
        "else is another run: heddle submit CONFIG --resume-from JOB@STEP");
  }
  return Admit(config);
}

Status CheckSomethingLeft(const v1::JobRecord& job, const v1::RunConfig& config) {
  if (job.result() != v1::JOB_RESULT_SUCCEEDED) {
    return OkStatus();
  }
  const uint64_t max_steps = static_cast<uint64_t>(config.training().max_steps());
  if (IsCommand(job) || job.best_step() >= max_steps) {
    return FailedPrecondition(Str("job ", JobId{job.id()}, " has succeeded",
                                  IsCommand(job) ? std::string()
                                                 : Str(" at step ", job.best_step(),
                                                       "; give it more: training.max_steps=N")));
  }
  return OkStatus();
}

}  // namespace

Status On(Decision& d, const event::JobSubmitted& e) {
  d.SetActor(e.request.identity);
  if (std::optional<Status> repeated = Repeated(d, e.request); repeated.has_value()) {
    return *repeated;
  }
  RETURN_IF_ERROR(CheckSubmit(d, e));
  v1::MetaRecord& meta = d.EditMeta();
  meta.set_submit_seq(meta.submit_seq() + 1);
  v1::JobRecord& job = d.AddJob(e.id);
  job.set_name(e.config.name());
  job.set_identity(e.request.identity);
  *job.mutable_config() = e.config;
  job.set_submit_seq(meta.submit_seq());
  job.set_submitted_at(d.now().wall_ms);
  job.set_first_attempt(1);
  for (const v1::DependencyRecord& dependency : e.after) {
    *job.add_after() = dependency;
  }
  if (e.config.schedule().start_time() > d.now().wall_ms) {
    job.set_start_at(e.config.schedule().start_time());
  }
  if (e.resume_from.has_value()) {
    job.mutable_resume_from()->set_job(e.resume_from->job.value);
    job.mutable_resume_from()->set_fence(e.resume_from->fence.value);
    job.mutable_resume_from()->set_step(e.resume_from->step);
    // What the parent left out of the data stays out on any way that goes on from it.
    *job.mutable_skipped() = d.job(e.resume_from->job)->skipped();
  }
  job.set_current_fence(d.NextFence().value);
  d.Note(e.id, "JOB_SUBMITTED", Str(job.name(), ", ", RanksOf(job.config()), " ranks"));
  Remember(d, e.request, e.id);
  d.SetJob(e.id);
  JobStep step;
  step.job = e.id;
  job.set_state(v1::JOB_STATE_HELD);
  if (e.hold) {  // J1
    job.set_reason("HELD");
    return OkStatus();
  }
  step.input = JobInput::kRelease;  // J2, J3
  StepJob(d, step);
  return OkStatus();
}

Status On(Decision& d, const event::JobHeld& e) {
  if (std::optional<Status> repeated = Repeated(d, e.request); repeated.has_value()) {
    return *repeated;
  }
  ASSIGN_OR_RETURN(const v1::JobRecord* job, Find(d, e.request, e.job));
  if (job->state() == v1::JOB_STATE_HELD) {
    return OkStatus();
  }
  JobStep step;
  step.job = e.job;
  step.input = JobInput::kHold;
  if (!StepJob(d, step)) {
    return WrongState(*job, "hold");
  }
  Remember(d, e.request, e.job);
  return OkStatus();
}

Status On(Decision& d, const event::JobReleased& e) {
  if (std::optional<Status> repeated = Repeated(d, e.request); repeated.has_value()) {
    return *repeated;
  }
  ASSIGN_OR_RETURN(const v1::JobRecord* job, Find(d, e.request, e.job));
  if (job->state() == v1::JOB_STATE_QUEUED || job->state() == v1::JOB_STATE_WAITING) {
    return OkStatus();
  }
  JobStep step;
  step.job = e.job;
  step.input = JobInput::kRelease;
  if (!StepJob(d, step)) {
    return WrongState(*job, "release");
  }
  Remember(d, e.request, e.job);
  return OkStatus();
}

namespace {

// The verb has nothing to do any more.
bool AlreadyStopped(const v1::JobRecord& job, v1::StopVerb verb) {
  const bool stopping = job.state() == v1::JOB_STATE_STOPPING;
  if (verb == v1::STOP_VERB_CANCEL) {
    return (stopping && job.stop_reason() == v1::STOP_REASON_CANCEL) ||
           (job.state() == v1::JOB_STATE_DONE && job.result() == v1::JOB_RESULT_CANCELLED);
  }
  if (verb == v1::STOP_VERB_PAUSE) {
    return job.state() == v1::JOB_STATE_PAUSED ||
           (stopping && job.stop_reason() == v1::STOP_REASON_PAUSE);
  }
  return job.state() == v1::JOB_STATE_QUEUED;
}

Status Preempt(Decision& d, const event::JobStopped& e, const v1::JobRecord& job) {
  const std::optional<AttemptId> attempt = LiveAttempt(d, e.job);
  if (job.state() != v1::JOB_STATE_ACTIVE || !attempt.has_value()) {
    return WrongState(job, "preempt");
  }
  AttemptStep step;
  step.attempt = *attempt;
  step.input = AttemptInput::kStop;
  step.reason = v1::STOP_REASON_PREEMPT;
  step.grace_ms = std::clamp<int64_t>(e.grace_ms.value_or(d.policy().stop_grace_ms), 0,
                                      d.policy().stop_grace_ms_max);
  step.text = e.reason;
  StepAttempt(d, step);  // an attempt that stops already is fine
  return OkStatus();
}

}  // namespace

Status On(Decision& d, const event::JobStopped& e) {
  if (std::optional<Status> repeated = Repeated(d, e.request); repeated.has_value()) {
    return *repeated;
  }
  ASSIGN_OR_RETURN(const v1::JobRecord* job, Find(d, e.request, e.job));
  if (AlreadyStopped(*job, e.verb)) {
    return OkStatus();
  }
  if (e.verb == v1::STOP_VERB_PREEMPT) {
    RETURN_IF_ERROR(Preempt(d, e, *job));
  } else {
    const bool cancel = e.verb == v1::STOP_VERB_CANCEL;
    JobStep step;
    step.job = e.job;
    step.input = cancel ? JobInput::kCancel : JobInput::kPause;
    step.text = e.reason;
    step.grace_ms = e.grace_ms;
    if (!StepJob(d, step)) {
      return WrongState(*job, cancel ? "cancel" : "pause");
    }
  }
  if (d.changed()) {
    Remember(d, e.request, e.job);
  }
  return OkStatus();
}

Status On(Decision& d, const event::JobResumed& e) {
  if (std::optional<Status> repeated = Repeated(d, e.request); repeated.has_value()) {
    return *repeated;
  }
  ASSIGN_OR_RETURN(const v1::JobRecord* job, Find(d, e.request, e.job));
  if (e.config.has_value()) {
    RETURN_IF_ERROR(CheckOverrides(*job, *e.config));
  } else if (job->state() == v1::JOB_STATE_QUEUED || job->state() == v1::JOB_STATE_ACTIVE) {
    return OkStatus();
  }
  if (job->state() == v1::JOB_STATE_DONE) {
    RETURN_IF_ERROR(CheckSomethingLeft(*job, e.config.has_value() ? *e.config : job->config()));
  }
  JobStep step;
  step.job = e.job;
  step.input = JobInput::kResume;
  step.config = e.config.has_value() ? &*e.config : nullptr;
  if (!StepJob(d, step)) {
    return WrongState(*job, "resume");
  }
  Remember(d, e.request, e.job);
  return OkStatus();
}

Status On(Decision& d, const event::CheckpointPinned& e) {
  if (std::optional<Status> repeated = Repeated(d, e.request); repeated.has_value()) {
    return *repeated;
  }
  d.SetActor(e.request.identity);
  const v1::CheckpointRecord* record = d.checkpoint(e.key);
  if (record == nullptr) {
    return NotFound(Str("no checkpoint ", ToText(e.key)));
  }
  if (record->state() != v1::CHECKPOINT_STATE_COMMITTED) {
    return FailedPrecondition(Str("checkpoint ", ToText(e.key), " is ", Name(record->state())));
  }
  d.SetJob(e.key.job);
  if (record->pinned() == e.pinned) {
    return OkStatus();
  }
  d.Edit(e.key).set_pinned(e.pinned);
  d.Note(e.key, e.pinned ? "CHECKPOINT_PINNED" : "CHECKPOINT_UNPINNED", "");
  Remember(d, e.request, e.key.job);
  return OkStatus();
}

namespace {

bool HasRoom(const NodeEntry& node, const v1::ParallelConfig& parallel,
             const event::PlacedTask& part) {
  const v1::Capacity& capacity = node.record->capacity();
  const double cpus = static_cast<double>(parallel.cpus_per_rank()) * part.ranks;
  const uint64_t memory = static_cast<uint64_t>(parallel.memory_per_rank()) * part.ranks;
  if (node.cpus_used + cpus > capacity.cpus() ||
      node.memory_used + memory > capacity.memory_bytes() ||
      part.gpu_indices.size() != static_cast<size_t>(parallel.gpus_per_rank()) * part.ranks) {
    return false;
  }
  std::set<int32_t> mine;
  for (const int32_t gpu : part.gpu_indices) {
    if (gpu < 0 || gpu >= static_cast<int32_t>(capacity.gpus()) || node.gpus_used.contains(gpu) ||
        !mine.insert(gpu).second) {
      return false;
    }
  }
  return true;
}

}  // namespace

Status On(Decision& d, const event::AttemptPlaced& e) {
  const v1::JobRecord* job = d.job(e.job);
  if (job == nullptr) {
    return NotFound(Str("no job ", e.job));
  }
  if (job->state() != v1::JOB_STATE_QUEUED) {
    return FailedPrecondition(Str("job ", e.job, " is ", Name(job->state()), ", not QUEUED"));
  }
  const bool check = !MutantsOf(d.policy()).allocate_without_check;
  if (check && job->version() != e.job_version) {
    return Aborted(Str("job ", e.job, " has changed since the decision"));
  }
  uint32_t next_rank = 0;
  std::set<std::string> seen;
  for (const event::PlacedTask& part : e.tasks) {
    if (part.first_rank != next_rank || part.ranks == 0 || !seen.insert(part.worker).second) {
      return InvalidArgument("the placement's ranks are not in order");
    }
    next_rank += part.ranks;
    const auto node = d.state().nodes().find(part.worker);
    if (node == d.state().nodes().end() || node->second.record == nullptr) {
      return Aborted(Str("node ", part.worker, " is gone"));
    }
    if (check && !IsSchedulable(*node->second.record, d.now().ms)) {
      return Aborted(Str("node ", part.worker, " takes no work"));
    }
    if (check && !HasRoom(node->second, job->config().parallel(), part)) {
      return Aborted(Str("node ", part.worker, " has no room any more"));
    }
  }
  if (next_rank != RanksOf(job->config())) {
    return InvalidArgument(
        Str("the placement has ", next_rank, " ranks, not ", RanksOf(job->config())));
  }
  JobStep step;
  step.job = e.job;
  step.input = JobInput::kPlaced;
  step.placed = &e;
  StepJob(d, step);
  return OkStatus();
}

Status On(Decision& d, const event::JobInfeasible& e) {
  const v1::JobRecord* job = d.job(e.job);
  if (job == nullptr) {
    return NotFound(Str("no job ", e.job));
  }
  if (!d.policy().fail_infeasible) {
    return FailedPrecondition("scheduler.infeasible is wait");
  }
  if (job->version() != e.job_version) {
    return Aborted(Str("job ", e.job, " has changed since the decision"));
  }
  JobStep step;
  step.job = e.job;
  step.input = JobInput::kInfeasible;
  step.text = e.text;
  if (!StepJob(d, step)) {
    return WrongState(*job, "fail");
  }
  return OkStatus();
}

}  // namespace heddle::state
