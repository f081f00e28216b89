#include "worker/offload/eviction_order.h"

#include <algorithm>

namespace heddle::offload {

void EvictionOrder::Put(uint32_t block, Turn turn) {
  if (turns_[block] == turn) return;
  Drop(block);
  entries_.insert({turn, block});
  turns_[block] = turn;
}

void EvictionOrder::Drop(uint32_t block) {
  if (!turns_[block]) return;
  entries_.erase({*turns_[block], block});
  turns_[block].reset();
}

void EvictionOrder::Renew(const std::function<size_t(uint32_t)>& next_of) {
  std::vector<Entry> entries(entries_.begin(), entries_.end());
  for (Entry& entry : entries) {
    entry.turn.next = next_of(entry.block);
    turns_[entry.block] = entry.turn;
  }
  // In order, each goes to the end without a search.
  std::ranges::sort(entries, Sooner());
  entries_.clear();
  for (const Entry& entry : entries) entries_.insert(entries_.end(), entry);
}

std::optional<uint32_t> EvictionOrder::First(std::optional<uint32_t> kept) const {
  auto first = entries_.begin();
  if (first != entries_.end() && first->block == kept) ++first;
  return first == entries_.end() ? std::nullopt : std::optional(first->block);
}

}  // namespace heddle::offload
