// One step of a product of bf16 pairs with sums in fp32, in the instructions of the file that
// includes it. For ISA files only: everything is in an anonymous namespace (simd.h says why).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace heddle::kernels {
namespace {  // NOLINT: ISA file (architecture.md T12)

// sum[l] + a.low * b[2 l] + a.high * b[2 l + 1].
#ifdef __AVX512BF16__
[[maybe_unused]] inline F16 AddPairs(F16 sum, uint32_t a, const uint16_t* b) {
  return reinterpret_cast<F16>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                       reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
}
#else
[[maybe_unused]] inline F16 Widen(U16 bits) {
  F16 value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
[[maybe_unused]] inline F16 AddPairs(F16 sum, uint32_t a, const uint16_t* b) {
  U16 right;
  std::memcpy(&right, b, sizeof(right));
  const U16 left = U16{} + a;
  sum += Widen(left << 16) * Widen(right << 16);
  return sum + Widen(left & 0xffff0000u) * Widen(right & 0xffff0000u);
}
#endif

}  // namespace
}  // namespace heddle::kernels
