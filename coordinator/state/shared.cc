// Helpers that several handlers share.
#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

bool IsCommand(const v1::JobRecord& job) {
  return job.config().kind() == v1::RunConfig::KIND_COMMAND;
}

bool IsLive(v1::AttemptState state) {
  return state != v1::ATTEMPT_STATE_FENCING && state != v1::ATTEMPT_STATE_ENDED;
}

std::optional<AttemptId> LiveAttempt(const Decision& d, JobId id) {
  const v1::JobRecord* job = d.job(id);
  if (job == nullptr || job->attempts() == 0) {
    return std::nullopt;
  }
  const AttemptId attempt{id, job->attempts()};
  const v1::AttemptRecord* record = d.attempt(attempt);
  if (record == nullptr || !IsLive(record->state())) {
    return std::nullopt;
  }
  return attempt;
}

void RaiseFence(Decision& d, JobId id, Fence owned) {
  if (d.job(id)->current_fence() != owned.value ||
      MutantsOf(d.policy()).fence_raised_by_next_only) {
    return;
  }
  const Fence fresh = d.NextFence();
  d.Edit(id).set_current_fence(fresh.value);
}

std::vector<TaskKey> BookedOn(const Decision& d, const std::string& worker) {
  std::vector<TaskKey> keys;
  const auto it = d.state().nodes().find(worker);
  if (it == d.state().nodes().end()) {
    return keys;
  }
  for (const TaskKey& key : it->second.booked) {
    const v1::TaskRecord* task =
        d.task({JobId{std::get<0>(key)}, std::get<1>(key)}, std::get<2>(key));
    if (task != nullptr && !IsFinal(task->state())) {
      keys.push_back(key);
    }
  }
  return keys;
}

void CheckDrained(Decision& d, const std::string& worker) {
  const v1::WorkerRecord* record = d.worker(worker);
  if (record == nullptr || record->admin() != v1::WORKER_ADMIN_DRAINING ||
      !BookedOn(d, worker).empty()) {
    return;
  }
  d.Edit(worker).set_admin(v1::WORKER_ADMIN_DRAINED);
  d.NoteWorker(worker, "NODE_DRAINED", record->admin_reason());
}

void MarkGone(Decision& d, AttemptId id, uint32_t index, const char* why) {
  v1::TaskRecord& task = d.Edit(id, index);
  const std::string worker = task.worker();
  task.set_state(v1::TASK_STATE_GONE);
  task.set_gone_reason(why);
  task.clear_orphan_ms();
  d.Note(id, "TASK_GONE", Str("task ", index, " on ", task.worker(), ": ", why));
  d.Do(effect::WakeScheduler{});
  AttemptStep step;
  step.attempt = id;
  StepAttempt(d, step);
  CheckDrained(d, worker);
}

Status Admit(const v1::RunConfig& config) {
  const v1::Ranks& ranks = config.parallel().ranks();
  if (ranks.min() != ranks.max()) {
    return InvalidArgument(Str("parallel.ranks: {min: ", ranks.min(), ", max: ", ranks.max(),
                               "} asks for an elastic world size, which is not supported yet; give "
                               "one number"));
  }
  if (config.schedule().account() != "default") {
    return InvalidArgument(
        Str("schedule.account: accounts are not supported yet; only 'default' "
            "exists (is '",
            config.schedule().account(), "')"));
  }
  for (const std::string& constraint : config.schedule().constraints()) {
    const size_t colon = constraint.find(':');
    const std::string verb = constraint.substr(0, colon == std::string::npos ? 0 : colon);
    if (verb == "same" || verb == "spread") {
      return InvalidArgument(
          Str("schedule.constraints: '", constraint, "': same: and spread: are not supported yet"));
    }
    if (constraint.find('=') == std::string::npos) {
      return InvalidArgument(Str("schedule.constraints: '", constraint,
                                 "': must be key=value, key!=value or key>=number"));
    }
  }
  if (config.kind() == v1::RunConfig::KIND_COMMAND && config.command().argv_size() == 0) {
    return InvalidArgument("command.argv: a job of kind 'command' needs a program");
  }
  return OkStatus();
}

}  // namespace heddle::state
