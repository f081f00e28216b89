// Text forms of the states as users see them ("QUEUED"), of targets of events, and views that
// several readers share.
#pragma once

#include <string>

#include "base/ids/ids.h"
#include "coordinator/state/event.h"
#include "heddle/v1/records.pb.h"

namespace heddle::state {

std::string Name(heddle::v1::JobState value);   // HELD ... DONE
std::string Name(heddle::v1::JobResult value);  // empty for NONE
std::string Name(heddle::v1::AttemptState value);
std::string Name(heddle::v1::AttemptOutcome value);  // empty for NONE
std::string Name(heddle::v1::StopReason value);
std::string Name(heddle::v1::TaskState value);
std::string Name(heddle::v1::WorkerState value);
std::string Name(heddle::v1::WorkerAdmin value);
std::string Name(heddle::v1::WorkerHealth value);
std::string Name(heddle::v1::CheckpointState value);
std::string Name(TimerKind value);

// "j-7k2...@1200".
std::string ToText(const CheckpointKey& key);
CheckpointKey KeyOf(const heddle::v1::CheckpointRecord& record);
// Folder of an attempt relative to the checkpoint root: "j-.../f<fence>" (L1).
std::string AttemptDir(JobId job, Fence fence);
// Ranks a job's config asks for.
uint32_t RanksOf(const heddle::v1::RunConfig& config);

}  // namespace heddle::state
