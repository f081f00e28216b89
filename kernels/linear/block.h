// One block of a result, C [32, 32] (+)= A B, for processors without matrix tiles. A [32, depth] is
// bf16 rows, B [depth / 2, 32, 2] pairs; the depth is a multiple of 32. Rows of C are kept in
// registers while the depth is walked in ascending order.
// Included by the file of one instruction set only.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/pairs.h"
#include "kernels/common/simd.h"
#include "kernels/linear/sizes.h"

namespace heddle::kernels::linear {
namespace {  // NOLINT: ISA file (architecture.md T12)

struct Operands {
  const uint16_t* a = nullptr;
  int64_t a_stride = 0;  // between rows
  int64_t a_step = 1;    // columns k to k + 32 of a row lie at k * a_step
  const uint16_t* b = nullptr;
  int64_t depth = 0;
};

struct VectorBlocks {
  static void Begin() {}
  static void End() {}

  // Only the first kRows rows and kColumns columns, each 16 or 32, are computed.
  // during(step) is called once for every 32 of the depth, in order.
  template <int64_t kRows, int64_t kColumns, bool kAdd, typename During>
  static void Multiply(const Operands& p, float* c, int64_t c_stride, const During& during) {
    for (int64_t row = 0; row < kRows; row += kAtOnce) {
      Operands some = p;
      some.a += row * p.a_stride;
      Some<kColumns / kLanes, kAdd>(some, c + row * c_stride, c_stride);
    }
    for (int64_t step = 0; step < p.depth / kBlock; ++step) during(step);
  }

 private:
#ifdef __AVX512F__
  static constexpr int64_t kAtOnce = 8;
#else
  static constexpr int64_t kAtOnce = 2;
#endif

  template <int64_t kVectors, bool kAdd>
  static void Some(const Operands& p, float* c, int64_t c_stride) {
    F16 sums[kAtOnce][kVectors];
    for (int64_t r = 0; r < kAtOnce; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[r][v] = kAdd ? Load(c + r * c_stride + v * kLanes) : F16{};
      }
    }
    for (int64_t k = 0; k < p.depth; k += 2) {
      const uint16_t* const a = p.a + k / kBlock * kBlock * p.a_step + k % kBlock;
#pragma GCC unroll 8
      for (int64_t r = 0; r < kAtOnce; ++r) {
        uint32_t pair;
        std::memcpy(&pair, a + r * p.a_stride, sizeof(pair));
#pragma GCC unroll 2
        for (int64_t v = 0; v < kVectors; ++v) {
          sums[r][v] = AddPairs(sums[r][v], pair, p.b + k * kBlock + v * 2 * kLanes);
        }
      }
    }
    for (int64_t r = 0; r < kAtOnce; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) Store(sums[r][v], c + r * c_stride + v * kLanes);
    }
  }
};

}  // namespace
}  // namespace heddle::kernels::linear
