#include "worker/offload/expected_uses.h"

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
}

void ExpectedUses::Consume(uint32_t block) {
  size_t& next = next_[block];
  if (next != kNever) next = following_[next];
}

}  // namespace heddle::offload
