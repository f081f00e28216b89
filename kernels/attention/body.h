// Bodies of the flash attention tiles, compiled once per instruction set. Columns (queries) are
// walked in four vectors of 16 lanes; a column never meets another one.
// Memory map: a tile of scores is at most 128 x 64 floats = 32 KiB and stays in L1/L2.
// Included by the file of one instruction set only.
#pragma once

#include <limits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "kernels/attention/pair_product.h"
#include "kernels/attention/params.h"
#include "kernels/common/simd.h"

namespace heddle::kernels::attention {
namespace {  // NOLINT: ISA file (architecture.md T12)

constexpr float kHidden = -std::numeric_limits<float>::infinity();

inline I16 Iota() { return I16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Lanes of query columns [column, column + 16) that see the key of `row`.
inline I16 VisibleLanes(const TileMask& mask, int64_t row, int64_t column) {
  if (mask.words != nullptr) {
    const auto bits = static_cast<int32_t>((mask.words[row] >> column) & 0xffff);
    return ((I16{} + bits) & ((I16{} + 1) << Iota())) != I16{};
  }
  const int32_t key = static_cast<int32_t>(mask.first_key + row);
  const I16 query = Iota() + static_cast<int32_t>(mask.first_query + column);
  I16 visible = query >= (I16{} + key);
  if (key >= mask.length) visible = I16{};
  if (mask.window > 0 && key >= mask.sinks) {
    visible &= (query - key) < (I16{} + static_cast<int32_t>(mask.window));
  }
  return visible;
}

template <bool kPartial>
inline F16 Score(const TileMask& mask, const float* scores, int64_t row, int64_t column) {
  const F16 score = Load(scores + row * kQueries + column);
  if constexpr (!kPartial) return score;
  return VisibleLanes(mask, row, column) ? score : Splat(kHidden);
}

// 2^x for x <= 0 (a little above is fine), relative error 2e-6, 0 below -126.
inline F16 Exp2(F16 x) {
  const F16 low = Splat(-127.0f);
  const F16 clipped = x < low ? low : x;  // a NaN stays
  const F16 magic = Splat(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer
  const F16 shifted = clipped + magic;
  const F16 r = clipped - (shifted - magic);
  F16 p = Splat(1.3333558e-3f);
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  I16 n;
  std::memcpy(&n, &shifted, sizeof(n));  // low bits hold the integer
  const I16 exponent = ((n - 0x4b400000) + 127) << 23;
  F16 scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}

// bf16 bits of two vectors as pairs (first, second) per lane.
inline U16 RoundBits(F16 value) {
  U16 bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
#ifdef __AVX512BF16__
// Both round to nearest even as RoundBits does; only denormal values become 0.
inline void StorePairs(F16 first, F16 second, uint16_t* to) {
  const __m512i halves = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
}
inline void StoreRounded(F16 value, uint16_t* to) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to),
      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value))));
}
#else
inline void StorePairs(F16 first, F16 second, uint16_t* to) {
  const U16 pairs = RoundBits(first) | (RoundBits(second) << 16);
  std::memcpy(to, &pairs, sizeof(pairs));
}
// No NaN check: for values that are finite or meant to spread.
inline void StoreRounded(F16 value, uint16_t* to) {
  const H16 half = __builtin_convertvector(RoundBits(value), H16);
  std::memcpy(to, &half, sizeof(half));
}
#endif

template <bool kPartial>
void ForwardTileT(const ForwardTile& p) {
  for (int64_t c = 0; c < kQueries; c += kLanes) {
    F16 best = Splat(kHidden);
    for (int64_t row = 0; row < p.keys; ++row) {
      const F16 s = Score<kPartial>(p.mask, p.scores, row, c);
      best = s > best ? s : best;
    }
    best *= p.scale_log2;
    const F16 before = Load(p.maximum + c);
    const F16 maximum = best > before ? best : before;
    // A column without a visible key so far: 2^(-inf - (-inf)) must be 0, not NaN.
    const F16 shift = maximum > Splat(kHidden) ? maximum : F16{};
    const F16 correction = Exp2(before - shift);
    F16 sum{};
    for (int64_t row = 0; row < p.keys; row += 2) {
      const F16 a = Exp2(Score<kPartial>(p.mask, p.scores, row, c) * p.scale_log2 - shift);
      const F16 b = Exp2(Score<kPartial>(p.mask, p.scores, row + 1, c) * p.scale_log2 - shift);
      sum += a + b;
      StorePairs(a, b, p.probability + row * kQueries + 2 * c);
    }
    Store(maximum, p.maximum + c);
    Store(correction, p.correction + c);
    Store(Load(p.sum + c) * correction + sum, p.sum + c);
  }
}

void ForwardTileRun(const ForwardTile& p) {
  p.mask.partial ? ForwardTileT<true>(p) : ForwardTileT<false>(p);
}

void RescaleRun(const Rescale& p) {
  for (int64_t c = 0; c < kQueries; c += kLanes) {
    const F16 factor = Load(p.correction + c);
    for (int64_t row = 0; row < p.rows; ++row) {
      float* at = p.output + row * kQueries + c;
      Store(Load(at) * factor, at);
    }
  }
}

void TransposeOutRun(const TransposeOut& p) {
  for (int64_t c = 0; c < p.queries; c += kLanes) {
    const int64_t columns = p.queries - c < kLanes ? p.queries - c : kLanes;
    const F16 factor = Load(p.factor + c);
    for (int64_t d = 0; d < p.width; d += kLanes) {
      float tile[kLanes * kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        Store(Load(p.accumulated + (d + i) * kQueries + c) * factor, tile + i * kLanes);
      }
      for (int64_t q = 0; q < columns; ++q) {
        float row[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) row[i] = tile[i * kLanes + q];
        Store(Load(row), p.out + (c + q) * p.out_stride + d);
      }
    }
  }
}

struct BackwardPair {
  F16 probability;
  F16 d_score;
};
template <bool kPartial>
inline BackwardPair BackwardLanes(const BackwardTile& p, int64_t row, int64_t c, F16 lse,
                                  F16 delta) {
  const F16 score = Score<kPartial>(p.mask, p.scores, row, c);
  const F16 probability = Exp2(score * p.scale_log2 - lse);
  const F16 d_probability = Load(p.d_probability + row * kQueries + c);
  return {probability, probability * (d_probability - delta) * p.scale};
}

template <bool kPartial>
void BackwardTileT(const BackwardTile& p) {
  for (int64_t c = 0; c < kQueries; c += kLanes) {
    const F16 lse = Load(p.lse_log2 + c);
    const F16 delta = Load(p.delta + c);
    for (int64_t row = 0; row < p.keys; row += 2) {
      const BackwardPair a = BackwardLanes<kPartial>(p, row, c, lse, delta);
      const BackwardPair b = BackwardLanes<kPartial>(p, row + 1, c, lse, delta);
      const int64_t at = row * kQueries + c;
      StoreRounded(a.probability, p.probability + at);
      StoreRounded(b.probability, p.probability + at + kQueries);
      StoreRounded(a.d_score, p.d_scores + at);
      StoreRounded(b.d_score, p.d_scores + at + kQueries);
      StorePairs(a.d_score, b.d_score, p.d_scores_pairs + row * kQueries + 2 * c);
    }
  }
}

void BackwardTileRun(const BackwardTile& p) {
  p.mask.partial ? BackwardTileT<true>(p) : BackwardTileT<false>(p);
}

void RowDotsRun(const RowDots& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    F16 sum{};
    for (int64_t i = 0; i < p.width; i += kLanes) {
      sum += Load(p.a + row * p.a_stride + i) * Load(p.b + row * p.b_stride + i);
    }
    p.out[row] = Sum(sum);
  }
}

void PackPairsRun(const PackPairs& p) {
  uint16_t* to = p.to;
  for (int64_t first = 0; first < p.width; first += 64) {
    const int64_t block = p.width - first < 64 ? p.width - first : 64;
    for (int64_t row = 0; row < p.rows; row += 2) {
      const uint16_t* a = p.from + row * p.width + first;
      const uint16_t* b = a + p.width;
      for (int64_t c = 0; c < block; c += kLanes) {
        H16 low;
        H16 high;
        std::memcpy(&low, a + c, sizeof(low));
        std::memcpy(&high, b + c, sizeof(high));
        const U16 pairs =
            __builtin_convertvector(low, U16) | (__builtin_convertvector(high, U16) << 16);
        std::memcpy(to + 2 * c, &pairs, sizeof(pairs));
      }
      to += 2 * block;
    }
  }
}

void PackTransposedRun(const PackTransposed& p) {
  const int64_t words = p.width / 2;
  for (int64_t w = 0; w < words; ++w) {
    uint32_t column[kQueries];
    for (int64_t row = 0; row < kQueries; ++row) {
      std::memcpy(column + row, p.from + row * p.width + 2 * w, sizeof(uint32_t));
    }
    std::memcpy(p.to + w * 2 * kQueries, column, sizeof(column));
  }
}

void TransposeRun(const Transpose& p) {
  for (int64_t first = 0; first < p.rows; first += 32) {
    const int64_t last = p.rows < first + 32 ? p.rows : first + 32;
    for (int64_t c = 0; c < p.width; ++c) {
      for (int64_t row = first; row < last; ++row) {
        p.to[c * p.rows + row] = p.from[row * p.width + c];
      }
    }
  }
}

void NoTiles() {}

constexpr Table MakeTable() {
  return Table{NoTiles,           NoTiles,         ForwardTileRun, RescaleRun,
               TransposeOutRun,   BackwardTileRun, RowDotsRun,     PackPairsRun,
               PackTransposedRun, TransposeRun,    PairProductRun};
}

}  // namespace
}  // namespace heddle::kernels::attention
