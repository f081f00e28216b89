// Whether a run may go on from a checkpoint, told from its record alone: before any process starts.
#pragma once

#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/config.pb.h"

namespace heddle::rpc {

// What a loader of this run would refuse (training-runtime.md 14.8): INVALID_ARGUMENT names the
// first tensor, by name, that differs in shape, that one side lacks, or that has not the moments of
// training.optimizer; or says that fp32 moments would have to be rounded to bf16 (the other way
// they are widened). OK for a run that trains nothing. REQUIRES: PlanModel(config.model()).ok()
// where it trains; `record` is COMMITTED, so that its tensors are known.
Status CheckFits(const heddle::v1::CheckpointRecord& record, const heddle::v1::RunConfig& config);

}  // namespace heddle::rpc
