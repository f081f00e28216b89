// Sixteen float lanes as a compiler vector, for kernel bodies that are compiled once per
// instruction set. Included by ISA files only: everything is in an anonymous namespace, so that the
// linker can never merge a function compiled for AVX-512 into code that runs elsewhere
// (architecture.md T12).
//
// The order of operations does not depend on the instruction set; AVX2 and AVX-512 both fuse
// multiply-add and give the same bits, the generic build does not fuse.
#pragma once

#include <cstdint>
#include <cstring>

namespace heddle::kernels {
namespace {  // NOLINT: see above

constexpr int64_t kLanes = 16;

using F16 = float __attribute__((vector_size(64)));
using I16 = int32_t __attribute__((vector_size(64)));
using U16 = uint32_t __attribute__((vector_size(64)));
using H16 = uint16_t __attribute__((vector_size(32)));

[[maybe_unused]] inline F16 Splat(float value) { return F16{} + value; }

[[maybe_unused]] inline F16 Load(const float* from) {
  F16 out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
[[maybe_unused]] inline void Store(F16 value, float* to) { std::memcpy(to, &value, sizeof(value)); }

// bf16 is the upper half of a float.
[[maybe_unused]] inline F16 Load(const uint16_t* from) {
  H16 half;
  std::memcpy(&half, from, sizeof(half));
  const U16 wide = __builtin_convertvector(half, U16) << 16;
  F16 out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

// Round to nearest even; NaN stays NaN.
[[maybe_unused]] inline void Store(F16 value, uint16_t* to) {
  U16 bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const U16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U16 quiet = (bits >> 16) | 0x40u;
  const I16 is_nan = (bits & 0x7fffffffu) > (U16{} + 0x7f800000u);
  const U16 chosen = is_nan ? quiet : rounded;
  const H16 half = __builtin_convertvector(chosen, H16);
  std::memcpy(to, &half, sizeof(half));
}

// The first `count` < 16 lanes; others are `fill` on load and untouched on store.
template <typename T>
[[maybe_unused]] inline F16 LoadPart(const T* from, int64_t count, T fill = T{}) {
  T buffer[kLanes];
  for (T& lane : buffer) lane = fill;
  std::memcpy(buffer, from, static_cast<size_t>(count) * sizeof(T));
  return Load(buffer);
}
template <typename T>
[[maybe_unused]] inline void StorePart(F16 value, T* to, int64_t count) {
  T buffer[kLanes];
  Store(value, buffer);
  std::memcpy(to, buffer, static_cast<size_t>(count) * sizeof(T));
}

// Lane sum in one fixed order.
[[maybe_unused]] inline float Sum(F16 v) {
  float x[kLanes];
  Store(v, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
[[maybe_unused]] inline float Max(F16 v) {
  float x[kLanes];
  Store(v, x);
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// exp(x) with a relative error below 2 ulp; 0 below -87.3, exp(88) above 88; NaN stays NaN.
[[maybe_unused, gnu::always_inline]] inline F16 Exp(F16 x) {
  const F16 low = Splat(-87.33654f);
  const F16 high = Splat(88.0f);
  const F16 clipped = x < low ? low : (x > high ? high : x);
  const F16 magic = Splat(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer
  const F16 n = (clipped * 1.44269504088896341f + magic) - magic;
  F16 r = clipped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F16 p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I16 exponent = (__builtin_convertvector(n, I16) + 127) << 23;
  F16 scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  const F16 y = p * scale;
  const F16 zero_below = x < low ? F16{} : y;
  return x != x ? x : zero_below;
}

}  // namespace
}  // namespace heddle::kernels
