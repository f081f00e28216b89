// Stochastic rounding to bf16 with counter-based randomness (training-runtime.md 11.3, 13.1): which
// way an element is rounded depends on the seed, the update and the element's place in the whole
// model, never on shards, blocks, threads or the instruction set. Included by body.h only.
//
// Philox4x32-10 as in base/rng, key = seed, counter = (block, stream). Eight blocks serve a group
// of 64 elements with sixteen bits each: element 64 g + 32 w + 4 b + j has halfword j, low first,
// of the words 2 w and 2 w + 1 of block 8 g + b.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/adamw/lanes.h"
#include "kernels/adamw/params.h"

namespace heddle::kernels::adamw {
namespace {  // NOLINT: ISA file (architecture.md T12)

constexpr int64_t kRandomGroup = 64;

// Multiplications are long and independent of everything else, so a group's bits are made in pieces
// between the work on the group before it. Lanes carry words in their lower halves; what the upper
// halves hold is never looked at.
class RandomBits {
 public:
  static constexpr int kRounds = 10;

  explicit RandomBits(const Rounding& rounding)
      : stream_low_(rounding.stream & 0xffffffffu), stream_high_(rounding.stream >> 32) {
    uint32_t k0 = static_cast<uint32_t>(rounding.seed);
    uint32_t k1 = static_cast<uint32_t>(rounding.seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      keys_[2 * round] = k0;
      keys_[2 * round + 1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  void Start(int64_t group) {
    const uint64_t first = static_cast<uint64_t>(group) * kBlocks;
    for (int part = 0; part < kParts; ++part) {
      LongWords block{};
      for (int lane = 0; lane < kLanes / 2; ++lane) {
        block[lane] = first + static_cast<uint64_t>(part * (kLanes / 2) + lane);
      }
      x_[part][0] = block;
      x_[part][1] = block >> 32;
      x_[part][2] = LongWords{} + stream_low_;
      x_[part][3] = LongWords{} + stream_high_;
    }
  }
  [[gnu::always_inline]] void Rounds(int from, int to) {
    for (int round = from; round < to; ++round) {
      for (LongWords(&x)[4] : x_) {
        const LongWords p0 = LowProduct(x[0], 0xD2511F53u);
        const LongWords p1 = LowProduct(x[2], 0xCD9E8D57u);
        x[0] = (p1 >> 32) ^ x[1] ^ keys_[2 * round];
        x[2] = (p0 >> 32) ^ x[3] ^ keys_[2 * round + 1];
        x[1] = p1;
        x[3] = p0;
      }
    }
  }
  // After all rounds: sixteen bits for each element of the group.
  void Write(uint16_t* bits) const {
    for (int part = 0; part < kParts; ++part) {
      const LongWords* x = x_[part];
      const LongWords low = (x[0] & 0xffffffffu) | (x[1] << 32);
      const LongWords high = (x[2] & 0xffffffffu) | (x[3] << 32);
      std::memcpy(bits + part * 2 * kLanes, &low, sizeof(low));
      std::memcpy(bits + kRandomGroup / 2 + part * 2 * kLanes, &high, sizeof(high));
    }
  }

 private:
  static constexpr int kBlocks = 8;
  static constexpr int kParts = 2 * kBlocks / kLanes;

  uint64_t keys_[2 * kRounds];
  uint64_t stream_low_;
  uint64_t stream_high_;
  LongWords x_[kParts][4];
};

// Away from zero with the probability of the bits that are dropped, towards it otherwise, so that
// the expected value is exact. What is not finite stays not finite.
inline Halves Rounded(Floats value, const uint16_t* random) {
  const Words carry = __builtin_convertvector(LoadVector<Halves>(random, kLanes), Words);
  const Words bits = BitsOf<Words>(value);
  const Ints finite = (bits & 0x7f800000u) != (Words{} + 0x7f800000u);
  return __builtin_convertvector((bits + (carry & BitsOf<Words>(finite))) >> 16, Halves);
}

}  // namespace
}  // namespace heddle::kernels::adamw
