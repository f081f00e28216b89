// Ranks that ask to train again from an older checkpoint without some of the data
// (training-runtime.md 16.2): what that leaves of a job's checkpoints, and how often it may happen.
#pragma once

#include <cstdint>
#include <vector>

#include "base/ids/ids.h"
#include "coordinator/state/state.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/records.pb.h"

namespace heddle::state {

class Decision;

// Checkpoints of an attempt up to `fence` that lie after `step` were made on a way that the job has
// left.
struct RollbackLimit {
  Fence fence;
  uint64_t step = 0;
};
// One for each attempt that ended in a rollback.
std::vector<RollbackLimit> RollbackLimits(const State& state, JobId job);
// No attempt may be restored from it any more; it does not count as kept. It can still be read,
// exported and forked.
bool IsLeftBehind(const std::vector<RollbackLimit>& limits,
                  const heddle::v1::CheckpointRecord& record);

// Rollbacks among the last `window` steps before `step`.
uint32_t RollbacksLately(const heddle::v1::JobRecord& job, uint64_t step, uint64_t window);

// Draws into the job's record what an attempt says that ended in a rollback: the data to leave out,
// the step. Nothing for another end.
void TakeRollback(Decision& d, AttemptId attempt);

}  // namespace heddle::state
