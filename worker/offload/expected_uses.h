// The announced order of uses: which block is needed at which place, and when a block is needed
// next. What Belady's rule asks for: evict what is needed last.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "worker/offload/blocks.h"

namespace heddle::offload {

// Blocks by their numbers in the BlockTable. Not thread-safe.
class ExpectedUses {
 public:
  static constexpr size_t kNever = std::numeric_limits<size_t>::max();
  struct Use {
    uint32_t block = 0;
    Access access = Access::kRead;
    int64_t bytes = 0;  // of the block
  };

  explicit ExpectedUses(size_t blocks) : next_(blocks, kNever) {}

  // Forgets what was expected. REQUIRES: numbers below `blocks`.
  void Replace(std::vector<Use> uses);
  // The place of the block's next use, kNever without one.
  size_t Next(uint32_t block) const { return next_[block]; }
  // That use is over.
  void Consume(uint32_t block);

  // Places are 0 .. size() - 1 since the last Replace.
  size_t size() const { return uses_.size(); }
  const Use& At(size_t place) const { return uses_[place]; }
  // Bytes of the uses before this place that are not over, but for those that were jumped over.
  int64_t BytesUntil(size_t place) const { return place < over_ ? 0 : sums_[place] - sums_[over_]; }

 private:
  std::vector<Use> uses_;
  std::vector<size_t> following_;  // by place: the block's use after that one
  std::vector<size_t> next_;       // by block
  std::vector<int64_t> sums_;      // of the bytes of the uses before a place
  size_t over_ = 0;                // after the last use that is over
};

}  // namespace heddle::offload
