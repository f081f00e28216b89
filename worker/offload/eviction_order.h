// The blocks whose memory can be had, in the order in which it is taken (Belady): what is expected
// last goes first; of what nobody expects, the least recently used. A choice costs the same however
// many blocks there are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <vector>

namespace heddle::offload {

// Blocks by their numbers in the BlockTable. Not thread-safe.
class EvictionOrder {
 public:
  // What a block's turn depends on.
  struct Turn {
    size_t next = 0;    // place of its next expected use; the largest number: none
    uint64_t used = 0;  // order of its last pin
    bool operator==(const Turn&) const = default;
  };

  explicit EvictionOrder(size_t blocks) : turns_(blocks) {}

  // The block may go, when it is its turn.
  void Put(uint32_t block, Turn turn);
  // It may not.
  void Drop(uint32_t block);
  // All that may go have other turns now: `next` of each is `next_of(block)`.
  void Renew(const std::function<size_t(uint32_t)>& next_of);

  // Whose turn it is, `kept` aside; none if nothing may go.
  std::optional<uint32_t> First(std::optional<uint32_t> kept) const;

 private:
  struct Entry {
    Turn turn;
    uint32_t block = 0;
  };
  struct Sooner {
    bool operator()(const Entry& a, const Entry& b) const {
      if (a.turn.next != b.turn.next) return a.turn.next > b.turn.next;
      if (a.turn.used != b.turn.used) return a.turn.used < b.turn.used;
      return a.block < b.block;
    }
  };

  std::set<Entry, Sooner> entries_;
  std::vector<std::optional<Turn>> turns_;  // by block: of its entry
};

}  // namespace heddle::offload
