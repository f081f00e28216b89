// What ranks must agree on in a step, as doubles that are summed over all ranks in one small
// collective (training-runtime.md 8.1). A decision taken from the sums is the same on every rank,
// in the same step: nobody saves, skips, stops or halts alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status/status.h"
#include "worker/comm/communicator.h"

namespace heddle::trainer {

enum class Slot : size_t {
  kSquaredNorm,  // of this rank's slices of the reduced gradient, without those of indexers
  kIndexerSquaredNorm,
  kNonFinite,    // gradient values and losses that are not finite
  kLoss,         // summed over this rank's valid tokens
  kIndexerLoss,  // losses of layers, already divided by global counts
  kBalanceLoss,
  kRouterLoss,
  kDropped,  // counts of layers
  kNanRows,
  kValidTokens,  // labels that count
  kTokens,       // tokens read
  kHashLow,      // sums of the halves of sequence hashes, exact in a double
  kHashHigh,
  kStopAfterSave,  // this rank has been asked to save and leave
  kStopNow,        // ... to leave without saving
  kSaveDue,        // rank 0: save after this step
  kSaveBusy,       // an earlier save is not finished here
  kSaveApproved,   // rank 0: the coordinator admits the pending save
  kSaveFailed,     // this rank cannot finish its part
  kFenced,         // a newer attempt exists
  kLaunchedLow,    // halves of Communicator::Launched()
  kLaunchedHigh,
  kCount
};

class Agreement {
 public:
  double& operator[](Slot slot) { return values_[static_cast<size_t>(slot)]; }
  double operator[](Slot slot) const { return values_[static_cast<size_t>(slot)]; }
  bool Any(Slot slot) const { return (*this)[slot] > 0; }

  // This rank's values become the sums over all ranks. INTERNAL: the ranks have launched different
  // collectives, so that what they hold may be of other units than they take it for.
  Status Reach(comm::Communicator* group) {
    const uint64_t launched = group->Launched();
    const double low = static_cast<double>(launched & 0xFFFFFFFFu);
    const double high = static_cast<double>(launched >> 32);
    (*this)[Slot::kLaunchedLow] = low;
    (*this)[Slot::kLaunchedHigh] = high;
    RETURN_IF_ERROR(group->AllReduceSum(std::span<double>(values_)));
    const double world = group->world_size();
    if ((*this)[Slot::kLaunchedLow] != world * low ||
        (*this)[Slot::kLaunchedHigh] != world * high) {
      return Internal("the ranks launched different collectives; nothing of this step is kept");
    }
    return OkStatus();
  }

 private:
  std::array<double, static_cast<size_t>(Slot::kCount)> values_{};
};

}  // namespace heddle::trainer
