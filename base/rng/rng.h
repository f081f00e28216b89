// Randomness as a pure function of (seed, purpose, position), so that a resumed run draws what the
// undisturbed run would have drawn and no state needs saving. Philox4x32-10 of Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3" (SC11), verified against Random123's known answers.
// Stored runs depend on every bit of this: it never changes (formats.md section 1).
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace heddle {

using PhiloxBlock = std::array<uint32_t, 4>;

// One block of Philox4x32-10.
PhiloxBlock Philox4x32(const PhiloxBlock& counter, const std::array<uint32_t, 2>& key);

// The stream of one seed and one purpose, such as "model.init" or "data.order". Streams of
// different purposes are independent; the purpose is hashed with 64-bit FNV-1a into the counter's
// upper half. Values by position are pure; thread-safe.
class Rng {
 public:
  Rng(uint64_t seed, std::string_view purpose);
  // A child stream, e.g. of a tensor's name or a rank, independent of this one and its siblings.
  Rng Child(std::string_view purpose) const;
  Rng Child(uint64_t index) const;

  // 64 uniform bits at a position. Positions 2k and 2k+1 share a block.
  uint64_t At(uint64_t position) const;
  // Uniform in [0, bound) without bias: REQUIRES bound > 0. Draws again at derived positions when
  // the 64 bits fall into the biased rest.
  uint64_t BelowAt(uint64_t position, uint64_t bound) const;
  // Uniform in [0, 1) with 53 bits.
  double UniformAt(uint64_t position) const;
  // Standard normal by Box and Muller from the positions 2k and 2k+1; the cosine for even
  // positions, the sine for odd ones.
  double NormalAt(uint64_t position) const;

 private:
  Rng(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}
  PhiloxBlock BlockAt(uint64_t block) const;
  uint64_t seed_;
  uint64_t stream_;
};

// A cursor over an Rng for code that just wants the next value. Not thread-safe.
class RngCursor {
 public:
  explicit RngCursor(Rng rng, uint64_t position = 0) : rng_(rng), position_(position) {}
  uint64_t Next() { return rng_.At(position_++); }
  uint64_t Below(uint64_t bound) { return rng_.BelowAt(position_++, bound); }
  double Uniform() { return rng_.UniformAt(position_++); }
  uint64_t position() const { return position_; }

 private:
  Rng rng_;
  uint64_t position_;
};

// A random permutation of `values` in place (Fisher and Yates), the same for the same stream.
template <typename T>
void Shuffle(const Rng& rng, std::vector<T>& values) {
  for (uint64_t i = values.size(); i > 1; --i) {
    std::swap(values[i - 1], values[rng.BelowAt(values.size() - i, i)]);
  }
}

}  // namespace heddle
