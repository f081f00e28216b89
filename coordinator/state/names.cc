#include "coordinator/state/names.h"

#include "coordinator/state/effect.h"

#include <algorithm>
#include <cstring>

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {
// "JOB_STATE_HELD" -> "HELD"; the prefix is the type's name. Zero values called NONE are empty.
std::string Strip(const std::string& full, const char* prefix) {
  const size_t length = std::strlen(prefix);
  const std::string rest = full.size() > length ? full.substr(length) : full;
  return rest == "NONE" ? std::string() : rest;
}
}  // namespace

std::string Name(v1::JobState value) { return Strip(v1::JobState_Name(value), "JOB_STATE_"); }
std::string Name(v1::JobResult value) { return Strip(v1::JobResult_Name(value), "JOB_RESULT_"); }
std::string Name(v1::AttemptState value) {
  return Strip(v1::AttemptState_Name(value), "ATTEMPT_STATE_");
}
std::string Name(v1::AttemptOutcome value) {
  return Strip(v1::AttemptOutcome_Name(value), "ATTEMPT_OUTCOME_");
}
std::string Name(v1::StopReason value) { return Strip(v1::StopReason_Name(value), "STOP_REASON_"); }
std::string Name(v1::TaskState value) { return Strip(v1::TaskState_Name(value), "TASK_STATE_"); }
std::string Name(v1::WorkerState value) {
  return Strip(v1::WorkerState_Name(value), "WORKER_STATE_");
}
std::string Name(v1::WorkerAdmin value) {
  return Strip(v1::WorkerAdmin_Name(value), "WORKER_ADMIN_");
}
std::string Name(v1::WorkerHealth value) {
  return Strip(v1::WorkerHealth_Name(value), "WORKER_HEALTH_");
}
std::string Name(v1::CheckpointState value) {
  return Strip(v1::CheckpointState_Name(value), "CHECKPOINT_STATE_");
}
std::string Name(TimerKind value) {
  static constexpr const char* kNames[] = {
      "JOB_START",     "JOB_BACKOFF",     "ATTEMPT_DEADLINE",  "ATTEMPT_RESEND",
      "RUN_LIMIT",     "ATTEMPT_HANG",    "TASK_ORPHAN",       "QUARANTINE_END",
      "PROBATION_END", "CHECKPOINT_OPEN", "CHECKPOINT_DELETE", "IDEMPOTENCY_EXPIRY"};
  return kNames[static_cast<size_t>(value)];
}

std::string ToText(const CheckpointKey& key) { return Str(key.job, "@", key.step); }

CheckpointKey KeyOf(const v1::CheckpointRecord& record) {
  return {JobId{record.job()}, Fence{record.fence()}, record.step()};
}

std::string AttemptDir(JobId job, Fence fence) { return Str(job, "/f", fence.value); }

uint32_t RanksOf(const v1::RunConfig& config) {
  return static_cast<uint32_t>(std::max(1, config.parallel().ranks().max()));
}

const char* EventName(const Event& event) {
  static constexpr const char* kNames[] = {
      "CoordinatorStarted", "JobSubmitted",       "JobHeld",
      "JobReleased",        "JobStopped",         "JobResumed",
      "CheckpointPinned",   "NodeAdministered",   "AttemptPlaced",
      "JobInfeasible",      "WorkerRegistered",   "TaskReported",
      "WorkerLeft",         "WorkerSuspect",      "WorkerHeard",
      "WorkerLost",         "CheckpointOpened",   "ShardSealed",
      "CheckpointDamaged",  "CheckpointVerified", "CheckpointFilesDeleted",
      "TimerFired",         "RanksDiagnosed",     "StacksReported"};
  static_assert(sizeof(kNames) / sizeof(kNames[0]) == std::variant_size_v<Event>);
  return kNames[event.index()];
}

const char* EffectName(const Effect& effect) {
  static constexpr const char* kNames[] = {"SendAssign",
                                           "SendStart",
                                           "SendStop",
                                           "SendKillFenced",
                                           "SendForget",
                                           "SendAck",
                                           "SendCheckpointReply",
                                           "SendStale",
                                           "WakeScheduler",
                                           "DropRendezvous",
                                           "DeleteCheckpointFiles",
                                           "WriteManifest",
                                           "VerifyCheckpoint",
                                           "CollectStacks"};
  static_assert(sizeof(kNames) / sizeof(kNames[0]) == std::variant_size_v<Effect>);
  return kNames[effect.index()];
}

}  // namespace heddle::state
