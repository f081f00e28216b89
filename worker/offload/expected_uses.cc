#include "worker/offload/expected_uses.h"

#include <algorithm>
#include <utility>

namespace heddle::offload {

void ExpectedUses::Replace(std::vector<Use> uses) {
  for (const Use& use : uses_) next_[use.block] = kNever;
  uses_ = std::move(uses);
  following_.resize(uses_.size());
  for (size_t place = uses_.size(); place-- > 0;) {
    size_t& next = next_[uses_[place].block];
    following_[place] = next;
    next = place;
  }
  over_ = 0;
  sums_.assign(1, 0);
  for (const Use& use : uses_) sums_.push_back(sums_.back() + use.bytes);
}

void ExpectedUses::Consume(uint32_t block) {
  size_t& next = next_[block];
  if (next == kNever) return;
  over_ = std::max(over_, next + 1);
  next = following_[next];
}

}  // namespace heddle::offload
