// What the body needs beyond kernels/common/simd.h: vectors of doubles with the same operations, so
// that one body serves both types, partial loads without a detour through memory, and sums over the
// lanes of many vectors at once. Included by ISA files only (architecture.md T12).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels/common/simd.h"

namespace heddle::kernels {
namespace {  // NOLINT: ISA file

using F8 = float __attribute__((vector_size(32)));
using F4 = float __attribute__((vector_size(16)));
using D8 = double __attribute__((vector_size(64)));
using D4 = double __attribute__((vector_size(32)));
using D2 = double __attribute__((vector_size(16)));

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using Vector = F16;
  static constexpr int64_t kCount = 16;
};
template <>
struct LanesOf<double> {
  using Vector = D8;
  static constexpr int64_t kCount = 8;
};
template <typename T>
using VectorOf = typename LanesOf<T>::Vector;
template <typename T>
constexpr int64_t kLanesOf = LanesOf<T>::kCount;

[[maybe_unused]] inline D8 Splat(double value) { return D8{} + value; }
[[maybe_unused]] inline D8 Load(const double* from) {
  D8 out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
[[maybe_unused]] inline void Store(D8 value, double* to) { std::memcpy(to, &value, sizeof(value)); }
[[maybe_unused]] inline D8 Exp(D8 x) {
  D8 out{};
  for (int i = 0; i < 8; ++i) out[i] = std::exp(x[i]);
  return out;
}

// The first `count` lanes; the others are 0 and not read.
[[maybe_unused]] inline D8 LoadTail(const double* from, int64_t count) {
  double lanes[8] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return Load(lanes);
}
[[maybe_unused]] inline void StoreTail(D8 value, double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}
#if defined(__AVX512F__)
[[maybe_unused]] inline F16 LoadTail(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
}
[[maybe_unused]] inline void StoreTail(F16 value, float* to, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), value);
}
#elif defined(__AVX2__)
[[maybe_unused]] inline __m256i TailMask(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
[[maybe_unused]] inline F16 LoadTail(const float* from, int64_t count) {
  const F8 low = _mm256_maskload_ps(from, TailMask(count));
  const F8 high = _mm256_maskload_ps(from + 8, TailMask(count - 8));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
[[maybe_unused]] inline void StoreTail(F16 value, float* to, int64_t count) {
  const F8 low = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7);
  const F8 high = __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm256_maskstore_ps(to, TailMask(count), low);
  _mm256_maskstore_ps(to + 8, TailMask(count - 8), high);
}
#else
[[maybe_unused]] inline F16 LoadTail(const float* from, int64_t count) {
  return LoadPart(from, count);
}
[[maybe_unused]] inline void StoreTail(F16 value, float* to, int64_t count) {
  StorePart(value, to, count);
}
#endif

// Lane sums add halves: distance 8, 4, 2, 1 (doubles: 4, 2, 1), as Sum() of simd.h. Every way to
// sum lanes here has that order, so which vectors are summed together changes no bit.
[[maybe_unused]] inline F4 Quarter(F16 v) {
  const F8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
[[maybe_unused]] inline float LaneSum(F16 v) {
  const F4 x = Quarter(v);
  return (x[0] + x[2]) + (x[1] + x[3]);
}
[[maybe_unused]] inline double LaneSum(D8 v) {
  const D4 half =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const D2 x =
      __builtin_shufflevector(half, half, 0, 1) + __builtin_shufflevector(half, half, 2, 3);
  return x[0] + x[1];
}

template <typename V>
inline V Larger(V a, V b) {
  return a > b ? a : b;
}
[[maybe_unused]] inline float LaneMax(F16 v) {
  const F8 half = Larger(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const F4 x = Larger(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                      __builtin_shufflevector(half, half, 4, 5, 6, 7));
  return Larger(Larger(x[0], x[2]), Larger(x[1], x[3]));
}
[[maybe_unused]] inline double LaneMax(D8 v) {
  double best = v[0];
  for (int i = 1; i < 8; ++i) best = Larger<double>(v[i], best);
  return best;
}

// ---- Sums of kAccumulators vectors: out[i] = lane sum of v[i] ----------------------------------

#if defined(__AVX512F__)
constexpr int kAccumulators = 16;

// From [a8 | b8]-shaped halves to quarters and so on: each step halves the lanes per vector and
// puts two vectors into one.
[[maybe_unused]] inline F16 JoinHalves(F16 a, F16 b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                 31);
}
[[maybe_unused]] inline F16 JoinQuarters(F16 a, F16 b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
// Within each quarter: the two remaining pairs of a, then of b.
[[maybe_unused]] inline F16 JoinPairs(F16 a, F16 b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
[[maybe_unused]] inline F16 JoinLanes(F16 a, F16 b) {
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
[[maybe_unused]] inline void LaneSums(const F16 (&v)[kAccumulators], float* out) {
  F16 column[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    column[c] = JoinQuarters(JoinHalves(v[c], v[4 + c]), JoinHalves(v[8 + c], v[12 + c]));
  }
  Store(JoinLanes(JoinPairs(column[0], column[1]), JoinPairs(column[2], column[3])), out);
}
#else
constexpr int kAccumulators = 4;

[[maybe_unused]] inline void LaneSums(const F16 (&v)[kAccumulators], float* out) {
  const F4 a = Quarter(v[0]);
  const F4 b = Quarter(v[1]);
  const F4 c = Quarter(v[2]);
  const F4 d = Quarter(v[3]);
  const F4 ab =
      __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  const F4 cd =
      __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  const F4 sums =
      __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
  std::memcpy(out, &sums, sizeof(sums));
}
#endif
[[maybe_unused]] inline void LaneSums(const D8 (&v)[kAccumulators], double* out) {
  for (int i = 0; i < kAccumulators; ++i) out[i] = LaneSum(v[i]);
}

}  // namespace
}  // namespace heddle::kernels
