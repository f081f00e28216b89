// A keyed bijection of [0, n): the shuffled order without shuffle state.
#pragma once

#include <cstdint>

#include "base/rng/rng.h"

namespace heddle::stream {

// Feistel network over Philox on the next power of two, with cycle walking. O(1) memory; pure;
// thread-safe. Part of the stored order of runs: it never changes.
class Permutation {
 public:
  // REQUIRES: 1 <= n <= 2^62.
  Permutation(const Rng& key, uint64_t n);

  // REQUIRES: i < n.
  uint64_t At(uint64_t i) const;

 private:
  uint64_t Scramble(uint64_t value) const;

  Rng key_;
  uint64_t n_;
  int low_bits_;
  int high_bits_;
};

}  // namespace heddle::stream
