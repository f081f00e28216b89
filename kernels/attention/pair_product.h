// The matrix product of flash attention for processors without AMX: C (+)= A B with bf16 operands
// and fp32 sums, B in pairs of rows. Rows of C are kept in registers while the depth is walked; an
// element's sum runs over the depth in ascending order, whatever the block it lies in.
// Included by body.h only.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/attention/params.h"
#include "kernels/common/pairs.h"
#include "kernels/common/simd.h"

namespace heddle::kernels::attention {
namespace {  // NOLINT: ISA file (architecture.md T12)

// Vectors of columns and rows of C in registers at a time.
struct PairBlock {
  int64_t vectors;
  int64_t rows;
};

#ifdef __AVX512BF16__
constexpr PairBlock kWide{4, 4};
constexpr PairBlock kNarrow{2, 8};
#else
#ifdef __AVX512F__
constexpr PairBlock kWide{2, 8};
#else
constexpr PairBlock kWide{1, 4};
#endif
constexpr PairBlock kNarrow = kWide;
#endif

template <int64_t kVectors, int64_t kRows>
inline void PairProductBlock(const PairProduct& p, int64_t row, int64_t column) {
  F16 sums[kRows][kVectors];
  float* c = p.c + row * p.c_stride + column;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[r][v] = p.add ? Load(c + r * p.c_stride + v * kLanes) : F16{};
    }
  }
  const uint16_t* a = p.a + row * p.a_stride;
  const uint16_t* b = p.b + 2 * column;
  for (int64_t k = 0; k < p.depth; k += 2) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, a + r * p.a_stride + k, sizeof(pair));
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[r][v] = AddPairs(sums[r][v], pair, b + k * p.columns + v * 2 * kLanes);
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) Store(sums[r][v], c + r * p.c_stride + v * kLanes);
  }
}

template <int64_t kVectors, int64_t kRows>
void PairProductColumns(const PairProduct& p) {
  for (int64_t column = 0; column < p.columns; column += kVectors * kLanes) {
    int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) {
      PairProductBlock<kVectors, kRows>(p, row, column);
    }
    for (; row < p.rows; ++row) PairProductBlock<kVectors, 1>(p, row, column);
  }
}

void PairProductRun(const PairProduct& p) {
  if (p.columns % (kWide.vectors * kLanes) == 0) {
    PairProductColumns<kWide.vectors, kWide.rows>(p);
  } else {
    PairProductColumns<kNarrow.vectors, kNarrow.rows>(p);
  }
}

}  // namespace
}  // namespace heddle::kernels::attention
