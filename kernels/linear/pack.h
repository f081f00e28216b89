// Operands of a block: rows padded with zeros, pairs of rows interleaved, words transposed.
// Included by the file of one instruction set only.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/simd.h"
#include "kernels/linear/sizes.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace heddle::kernels::linear {
namespace {  // NOLINT: ISA file (architecture.md T12)

inline U16 LoadWords(const void* from) {
  U16 out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
inline void StoreWords(U16 words, void* to) { std::memcpy(to, &words, sizeof(words)); }

// The first `count` < 32 halves of a row, then zeros.
inline U16 LoadWordsPart(const uint16_t* from, int64_t count) {
  U16 out{};
  std::memcpy(&out, from, static_cast<size_t>(count) * sizeof(uint16_t));
  return out;
}

// One step of a transposition: lanes whose number has bit kStep change places between rows i and
// i + kStep.
template <int kStep>
inline void Exchange(U16 rows[16]) {
  I16 low;
  I16 high;
  for (int lane = 0; lane < 16; ++lane) {
    low[lane] = (lane & kStep) == 0 ? lane : lane - kStep + 16;
    high[lane] = (lane & kStep) == 0 ? lane + kStep : lane + 16;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & kStep) != 0) continue;
    const U16 a = rows[i];
    const U16 b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// rows[i][j] becomes rows[j][i].
[[gnu::always_inline]] inline void TransposeWords(U16 rows[16]) {
  Exchange<1>(rows);
  Exchange<2>(rows);
  Exchange<4>(rows);
  Exchange<8>(rows);
}

// bf16 of two vectors as (first, second) per lane. Nearest even; NaN stays NaN.
inline U16 RoundPairs(F16 first, F16 second) {
#ifdef __AVX512BF16__
  const __m512i halves = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return reinterpret_cast<U16>(_mm512_permutexvar_epi16(order, halves));
#else
  uint16_t low[16];
  uint16_t high[16];
  Store(first, low);
  Store(second, high);
  H16 a;
  H16 b;
  std::memcpy(&a, low, sizeof(a));
  std::memcpy(&b, high, sizeof(b));
  return __builtin_convertvector(a, U16) | (__builtin_convertvector(b, U16) << 16);
#endif
}

// 32 floats as bf16.
inline U16 RoundRow(F16 first, F16 second) {
#ifdef __AVX512BF16__
  return reinterpret_cast<U16>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
#else
  uint16_t halves[32];
  Store(first, halves);
  Store(second, halves + 16);
  return LoadWords(halves);
#endif
}

// to [Padded(width) / 32, 32, 32]: columns k to k + 32 of row r at (k / 32, r), so that what a tile
// product reads lies end to end. rows <= 32; zeros around them.
inline void PackRows(const uint16_t* from, int64_t stride, int64_t rows, int64_t width,
                     uint16_t* to) {
  for (int64_t r = 0; r < kBlock; ++r) {
    for (int64_t k = 0; k < Padded(width); k += kBlock) {
      const U16 words = r >= rows            ? U16{}
                        : width - k < kBlock ? LoadWordsPart(from + r * stride + k, width - k)
                                             : LoadWords(from + r * stride + k);
      StoreWords(words, to + k * kBlock + r * kBlock);
    }
  }
}

// to [Padded(width) / 2, 32, 2]: pair k of row r at (k, r). rows <= 32; the others are zeros.
inline void PackRowsAsColumns(const uint16_t* from, int64_t stride, int64_t rows, int64_t width,
                              uint16_t* to) {
  for (int64_t first = 0; first < kBlock; first += kLanes) {
    for (int64_t k = 0; k < width; k += 2 * kLanes) {
      const int64_t count = width - k;
      U16 words[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint16_t* row = from + (first + i) * stride + k;
        words[i] = first + i >= rows    ? U16{}
                   : count < 2 * kLanes ? LoadWordsPart(row, count)
                                        : LoadWords(row);
      }
      TransposeWords(words);
      for (int64_t i = 0; i < kLanes; ++i) {
        StoreWords(words[i], to + (k / 2 + i) * 2 * kBlock + 2 * first);
      }
    }
  }
}

// Halves of two rows side by side: columns [0, 16) in low, [16, 32) in high.
struct Interleaved {
  U16 low;
  U16 high;
};
inline Interleaved Interleave(U16 a, U16 b) {
  using H32 = uint16_t __attribute__((vector_size(64)));
  const H32 low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const H32 high = low + 16;
  const H32 x = reinterpret_cast<H32>(a);
  const H32 y = reinterpret_cast<H32>(b);
  return {reinterpret_cast<U16>(__builtin_shuffle(x, y, low)),
          reinterpret_cast<U16>(__builtin_shuffle(x, y, high))};
}

// Row `row` of at most 32 columns, zeros beyond `rows` and `columns`.
inline U16 RowOrZero(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                     int64_t row) {
  if (row >= rows) return U16{};
  return columns < kBlock ? LoadWordsPart(from + row * stride, columns)
                          : LoadWords(from + row * stride);
}

// to [Padded(rows) / 2, 32, 2]: rows 2 k and 2 k + 1 of column c at (k, c). columns <= 32; the
// others are zeros. Does rows [first, last), both even, of them.
inline void PackPairsOfRows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                            uint16_t* to, int64_t first, int64_t last) {
  // Rows lie far apart, which the processor does not foresee.
  constexpr int64_t kAhead = 24;
  const int64_t whole = columns == kBlock ? (last < rows ? last : rows / 2 * 2) : first;
  to += first * kBlock;
  for (int64_t r = first; r < whole; r += 2, to += 2 * kBlock) {
    const uint16_t* const row = from + r * stride;
    __builtin_prefetch(row + kAhead * stride, 0, 2);
    __builtin_prefetch(row + (kAhead + 1) * stride, 0, 2);
    const Interleaved pairs = Interleave(LoadWords(row), LoadWords(row + stride));
    StoreWords(pairs.low, to);
    StoreWords(pairs.high, to + kBlock);
  }
  for (int64_t r = first > whole ? first : whole; r < last; r += 2, to += 2 * kBlock) {
    const Interleaved pairs = Interleave(RowOrZero(from, stride, rows, columns, r),
                                         RowOrZero(from, stride, rows, columns, r + 1));
    StoreWords(pairs.low, to);
    StoreWords(pairs.high, to + kBlock);
  }
}

// to [Padded(rows) / 32, 32, 32]: rows r to r + 32 of column c at (r / 32, c). columns <= 32; the
// others are zeros.
inline void PackColumnsAsRows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                              uint16_t* to) {
  for (int64_t r = 0; r < rows; r += kBlock) {
    U16 first[kLanes];
    U16 second[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = r + 2 * i;
      const Interleaved pairs = Interleave(RowOrZero(from, stride, rows, columns, row),
                                           RowOrZero(from, stride, rows, columns, row + 1));
      first[i] = pairs.low;
      second[i] = pairs.high;
    }
    TransposeWords(first);
    TransposeWords(second);
    for (int64_t i = 0; i < kLanes; ++i) {
      StoreWords(first[i], to + r * kBlock + i * kBlock);
      StoreWords(second[i], to + r * kBlock + (i + kLanes) * kBlock);
    }
  }
}

}  // namespace
}  // namespace heddle::kernels::linear
