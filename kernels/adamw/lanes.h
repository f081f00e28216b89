// Vectors of the width that the instruction set has, unlike kernels/common/simd.h: an element of
// an optimizer's pass depends on no other, so the width does not change bits, and sixteen lanes
// would be split through memory where registers are shorter. Included by body.h only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace heddle::kernels::adamw {
namespace {  // NOLINT: ISA file (architecture.md T12)

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using LongWords = uint64_t __attribute__((vector_size(4 * kLanes)));  // half as many
using Doubles = double __attribute__((vector_size(4 * kLanes)));
using HalfFloats = float __attribute__((vector_size(2 * kLanes)));  // as many as Doubles

template <typename To, typename From>
inline To BitsOf(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Floats Widened(Halves bf16) {
  return BitsOf<Floats>(__builtin_convertvector(bf16, Words) << 16);
}

// Round to nearest even; NaN stays NaN.
inline Halves Nearest(Floats value) {
  const Words bits = BitsOf<Words>(value);
  const Words rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Ints is_nan = (bits & 0x7fffffffu) > (Words{} + 0x7f800000u);
  return __builtin_convertvector(is_nan ? quiet : rounded, Halves);
}

// `lanes` elements; others are zero on load and untouched on store.
template <typename Vector, typename T>
inline Vector LoadVector(const T* from, int64_t lanes) {
  Vector value{};
  std::memcpy(&value, from,
              lanes == kLanes ? sizeof(value) : static_cast<size_t>(lanes) * sizeof(T));
  return value;
}
template <typename Vector, typename T>
inline void StoreVector(Vector value, T* to, int64_t lanes) {
  std::memcpy(to, &value, lanes == kLanes ? sizeof(value) : static_cast<size_t>(lanes) * sizeof(T));
}
inline Floats Load(const float* from, int64_t lanes) { return LoadVector<Floats>(from, lanes); }
inline Floats Load(const uint16_t* from, int64_t lanes) {
  return Widened(LoadVector<Halves>(from, lanes));
}
inline void Store(Floats value, float* to, int64_t lanes) { StoreVector(value, to, lanes); }
inline void Store(Floats value, uint16_t* to, int64_t lanes) {
  StoreVector(Nearest(value), to, lanes);
}

// maskz: GCC 12 takes the unmasked forms for those of an uninitialised value.
inline Floats Sqrt(Floats v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int64_t i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// The lower halves of the lanes times `factor`, which has 32 bits.
inline LongWords LowProduct(LongWords a, uint64_t factor) {
#if defined(__AVX512F__)
  return BitsOf<LongWords>(_mm512_maskz_mul_epu32(0xff, BitsOf<__m512i>(a),
                                                  _mm512_set1_epi64(static_cast<int64_t>(factor))));
#elif defined(__AVX2__)
  return BitsOf<LongWords>(
      _mm256_mul_epu32(BitsOf<__m256i>(a), _mm256_set1_epi64x(static_cast<int64_t>(factor))));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

}  // namespace
}  // namespace heddle::kernels::adamw
