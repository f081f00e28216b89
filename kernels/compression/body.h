// The pools in float, compiled once per instruction set. A row is walked in vectors of 16 columns
// of one head; every sum over taps or windows stays in a register and runs in ascending order.
// Included by generic.cc, avx2.cc and avx512.cc only.
#pragma once

#include "kernels/common/simd.h"
#include "kernels/compression/params.h"

namespace heddle::kernels::compression {
namespace {  // NOLINT: ISA file (architecture.md T12)

inline float WeightOf(const Pool<float>& p, int64_t head, int64_t m) {
  return p.weight == nullptr ? 1.0f / static_cast<float>(p.kernel_size)
                             : p.weight[head * p.kernel_size + m];
}

inline F16 LoadN(const float* from, int64_t lanes) {
  return lanes == kLanes ? Load(from) : LoadPart(from, lanes);
}
inline void StoreN(F16 value, float* to, int64_t lanes) {
  if (lanes == kLanes) {
    Store(value, to);
  } else {
    StorePart(value, to, lanes);
  }
}
// Calls body(column, lanes) for each vector of a head.
template <typename Body>
inline void ForColumns(int64_t dim, const Body& body) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) body(d, kLanes);
  if (d < dim) body(d, dim - d);
}

void PoolForward(const Forward<float>& f, Range windows) {
  const Pool<float>& p = f.pool;
  for (int64_t j = windows.begin; j < windows.end; ++j) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const float* rows = p.x + p.first[j] * p.x_stride + head * p.dim;
      const float* pe = p.pe == nullptr ? nullptr : p.pe + head * p.kernel_size * p.dim;
      float* out = f.out + (j * p.heads + head) * p.dim;
      ForColumns(p.dim, [&](int64_t d, int64_t lanes) {
        F16 sum{};
        for (int64_t m = 0; m < p.kernel_size; ++m) {
          F16 x = LoadN(rows + m * p.x_stride + d, lanes);
          if (pe != nullptr) x += LoadN(pe + m * p.dim + d, lanes);
          sum += WeightOf(p, head, m) * x;
        }
        StoreN(sum, out + d, lanes);
      });
    }
  }
}

void PoolBackwardRows(const Backward<float>& b, Range rows) {
  const Pool<float>& p = b.pool;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      float* dx = b.dx + row * b.dx_stride + head * p.dim;
      ForColumns(p.dim, [&](int64_t d, int64_t lanes) {
        F16 sum{};
        for (int64_t j = b.holders.begin[row]; j < b.holders.end[row]; ++j) {
          const F16 g = LoadN(b.dout + (j * p.heads + head) * p.dim + d, lanes);
          sum += WeightOf(p, head, row - p.first[j]) * g;
        }
        StoreN(LoadN(dx + d, lanes) + sum, dx + d, lanes);
      });
    }
  }
}

void PoolBackwardTaps(const Backward<float>& b, Range taps) {
  const Pool<float>& p = b.pool;
  for (int64_t tap = taps.begin; tap < taps.end; ++tap) {
    const int64_t head = tap / p.kernel_size;
    const int64_t m = tap % p.kernel_size;
    const float weight = WeightOf(p, head, m);
    F16 dweight{};
    ForColumns(p.dim, [&](int64_t d, int64_t lanes) {
      const F16 pe = p.pe == nullptr ? F16{} : LoadN(p.pe + tap * p.dim + d, lanes);
      F16 dpe{};
      for (int64_t j = 0; j < p.windows; ++j) {
        const F16 g = LoadN(b.dout + (j * p.heads + head) * p.dim + d, lanes);
        const F16 x = LoadN(p.x + (p.first[j] + m) * p.x_stride + head * p.dim + d, lanes);
        dweight += g * (x + pe);
        dpe += g;
      }
      if (b.dpe != nullptr) {
        float* out = b.dpe + tap * p.dim + d;
        StoreN(LoadN(out, lanes) + weight * dpe, out, lanes);
      }
    });
    if (b.dweight != nullptr) b.dweight[tap] += Sum(dweight);
  }
}

}  // namespace
}  // namespace heddle::kernels::compression
