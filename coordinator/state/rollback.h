// Ranks that ask to train again from an older checkpoint without some of the data
// (training-runtime.md 16.2): what that leaves of a job's checkpoints, and how often it may happen.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "coordinator/state/state.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/records.pb.h"

namespace heddle::state {

class Decision;

// How many steps before the newest one a rollback may ask for: a loss that stays high is known
// after so many (the trainer's SpikeDetector::kHighSteps).
inline constexpr uint64_t kRollbackReachSteps = 4;

// Checkpoints of an attempt up to `fence` that lie after `step` were made on a way that the job has
// left.
struct RollbackLimit {
  Fence fence;
  uint64_t step = 0;
};
// One for each attempt that ended in a rollback. One that made no good step since it was restored
// says that what it was restored from is bad itself: its limit lies before that.
std::vector<RollbackLimit> RollbackLimits(const State& state, JobId job);
// No attempt, of this job or of one that resumes from it, may be restored from it any more; it does
// not count as kept. It can still be read and exported.
bool IsLeftBehind(const std::vector<RollbackLimit>& limits,
                  const heddle::v1::CheckpointRecord& record);

// Whether a new job may start from it. FAILED_PRECONDITION: damaged, no longer kept, or left behind
// by a rollback of its job.
Status CheckResumeFrom(const State& state, const heddle::v1::CheckpointRecord& record);

// All that may be offered to the next attempt of a job, best first: its own checkpoints, then those
// of the job that it was resumed from.
std::vector<const heddle::v1::CheckpointRecord*> Restorable(
    const Decision& d, const heddle::v1::JobRecord& job, const std::vector<RollbackLimit>& limits);

// Why a job whose `attempt` ended in a rollback cannot go on by itself: no checkpoint is left that
// is old enough although there was one, so that it would lose more than it asks for. Empty: it can,
// be it from step 0 where the first checkpoint is already too new.
std::string NothingToRollBackTo(const Decision& d, const heddle::v1::JobRecord& job,
                                const heddle::v1::AttemptRecord& attempt);

// Rollbacks among the last `window` steps before `step`.
uint32_t RollbacksLately(const heddle::v1::JobRecord& job, uint64_t step, uint64_t window);

// Draws into the job's record what an attempt says that ended in a rollback: the data to leave out,
// the step. Nothing for another end.
void TakeRollback(Decision& d, AttemptId attempt);

}  // namespace heddle::state
