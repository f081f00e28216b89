// Going back to a checkpoint: every rank loads, all learn one verdict, all fall back together
// (training-runtime.md 14.8, 14.9; reliability R5).
#pragma once

#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/control.pb.h"
#include "worker/comm/communicator.h"
#include "worker/trainer/data_source.h"
#include "worker/trainer/rank_control.h"
#include "worker/trainer/run_plan.h"
#include "worker/trainer/run_state.h"

namespace heddle::trainer {

struct Restored {
  bool from_checkpoint = false;
  uint64_t fence = 0;
  uint64_t step = 0;
};

// What makes the continuation differ in its bits from an undisturbed run: other world size,
// threads, instruction set, library. Empty: exact.
std::vector<std::string> InexactReasons(const heddle::v1::TrainState& saved,
                                        const heddle::v1::TrainState& now);

// Fills the fields of TrainState that do not change from step to step.
heddle::v1::TrainState DescribeRun(const heddle::v1::RankSpec& spec, const RunPlan& plan,
                                   const RunData& data);

// FAILED_PRECONDITION: `model_dir` has a tokenizer.json that is not the one of the data: its
// weights know other words behind the same ids. A folder without one says nothing.
Status CheckSameTokenizer(const std::string& model_dir, const RunData& data);

// spec.skipped and those of a checkpoint, merged.
std::vector<stream::Window> SkippedWindows(const heddle::v1::RankSpec& spec,
                                           const heddle::v1::TrainState& saved);

// Tries spec.restore in order; the state is initial where the list is empty. Rank 0 reports each
// damaged one. DATA_LOSS: none of them can be loaded; never starts anew by itself.
// FAILED_PRECONDITION: the newest does not belong to this model or data. UNAVAILABLE: the group.
StatusOr<Restored> Restore(const heddle::v1::RankSpec& spec, const RunPlan& plan,
                           const RunData& data, comm::Communicator* group, RankControl* control,
                           RunState* state);

}  // namespace heddle::trainer
