#include "data/stream/permutation.h"

#include <algorithm>
#include <bit>

#include "base/status/status.h"

namespace heddle::stream {
namespace {

constexpr uint64_t kRounds = 6;

}  // namespace

Permutation::Permutation(const Rng& key, uint64_t n) : key_(key), n_(n) {
  HEDDLE_CHECK(n >= 1 && n <= uint64_t{1} << 62);
  const int bits = std::max(2, static_cast<int>(std::bit_width(n - 1)));
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
}

uint64_t Permutation::Scramble(uint64_t value) const {
  const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1;
  const uint64_t high_mask = (uint64_t{1} << high_bits_) - 1;
  uint64_t low = value & low_mask;
  uint64_t high = value >> low_bits_;
  for (uint64_t round = 0; round < kRounds; ++round) {
    if (round % 2 == 0) {
      low ^= key_.At(round << 32 | high) & low_mask;
    } else {
      high ^= key_.At(round << 32 | low) & high_mask;
    }
  }
  return high << low_bits_ | low;
}

uint64_t Permutation::At(uint64_t i) const {
  HEDDLE_CHECK(i < n_);
  uint64_t value = Scramble(i);
  while (value >= n_) value = Scramble(value);
  return value;
}

}  // namespace heddle::stream
