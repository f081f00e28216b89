// What the torch edges of the row-wise kernels share: checks of tensors, done once per call, and
// the split of rows over LibTorch's threads. Not for users of the layers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>

#include "base/status/status.h"
#include "kernels/pointwise/params.h"

namespace heddle::layers {

// Rows of one task; also the unit of partial sums, so it is part of the numbers (S49).
inline constexpr int64_t kRowBlock = 128;

inline kernels::pointwise::Element ElementOf(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return kernels::pointwise::Element::kBFloat16;
    case at::kDouble:
      return kernels::pointwise::Element::kFloat64;
    default:
      HEDDLE_CHECK(t.scalar_type() == at::kFloat, "compute type must be bf16, fp32 or fp64");
      return kernels::pointwise::Element::kFloat32;
  }
}

inline at::ScalarType StatisticsTypeOf(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void CheckMatrix(const at::Tensor& t, int64_t rows, int64_t columns, at::ScalarType type) {
  HEDDLE_CHECK(t.device().is_cpu());
  HEDDLE_CHECK(t.dim() == 2, "matrix expected, rank is ", t.dim());
  HEDDLE_CHECK(t.scalar_type() == type, "type ", static_cast<int>(t.scalar_type()));
  HEDDLE_CHECK(t.size(0) == rows && t.size(1) == columns, "shape [", t.size(0), ", ", t.size(1),
               "] for [", rows, ", ", columns, "]");
  HEDDLE_CHECK(t.is_contiguous());
}

inline void CheckVector(const at::Tensor& t, int64_t size, at::ScalarType type) {
  HEDDLE_CHECK(t.device().is_cpu());
  HEDDLE_CHECK(t.dim() == 1 && t.size(0) == size, "vector of ", size, " expected");
  HEDDLE_CHECK(t.scalar_type() == type);
  HEDDLE_CHECK(t.is_contiguous());
}

template <typename Run>
void ForRows(int64_t rows, const Run& run) {
  at::parallel_for(0, rows, kRowBlock, [&](int64_t begin, int64_t end) {
    run(kernels::pointwise::RowRange{begin, end});
  });
}

// Sums over rows that do not depend on the number of threads: run(rows, sums) adds the rows of one
// block to `width` zeroed values of type `type`; returns [blocks, width], whose rows AddBlockSums
// adds in their order.
template <typename Run>
at::Tensor BlockSums(int64_t rows, int64_t width, at::ScalarType type, const Run& run) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const at::Tensor partial = at::zeros({blocks, width}, at::TensorOptions().dtype(type));
  char* sums = static_cast<char*>(partial.data_ptr());
  const int64_t row_bytes = width * partial.element_size();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      run(kernels::pointwise::RowRange{block * kRowBlock, std::min(rows, (block + 1) * kRowBlock)},
          static_cast<void*>(sums + block * row_bytes));
    }
  });
  return partial;
}

// to [count] += the columns first .. first + count - 1 of the block sums.
inline void AddBlockSums(const at::Tensor& partial, int64_t first, const at::Tensor& to) {
  const kernels::pointwise::Table& table = kernels::pointwise::Kernels(ElementOf(to));
  const char* sums = static_cast<const char*>(partial.data_ptr());
  for (int64_t block = 0; block < partial.size(0); ++block) {
    const void* from = sums + (block * partial.size(1) + first) * partial.element_size();
    table.accumulate({from, to.data_ptr()}, {0, to.numel()});
  }
}

}  // namespace heddle::layers
