#include "model/attention/row_copy.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstring>

#include "base/status/status.h"
#include "kernels/pointwise/params.h"

namespace heddle::attention {
namespace {

namespace pw = kernels::pointwise;

constexpr int64_t kRowsPerTask = 256;
constexpr int64_t kColumnsPerTask = 64;

struct Rows {
  char* data;
  int64_t stride_bytes;
  int64_t row_bytes;
  int64_t columns;
};

Rows RowsOf(const at::Tensor& t) {
  HEDDLE_CHECK(t.dim() == 3 && t.stride(2) == 1 && (t.size(1) == 1 || t.stride(1) == t.size(2)),
               "rows of heads must be contiguous");
  const int64_t columns = t.size(1) * t.size(2);
  return {static_cast<char*>(t.data_ptr()), t.stride(0) * t.element_size(),
          columns * t.element_size(), columns};
}

pw::Element ElementOf(const at::Tensor& t) {
  if (t.scalar_type() == at::kBFloat16) return pw::Element::kBFloat16;
  return t.scalar_type() == at::kDouble ? pw::Element::kFloat64 : pw::Element::kFloat32;
}

}  // namespace

void GatherRows(const at::Tensor& rows, std::span<const int32_t> index, const at::Tensor& tiles) {
  const Rows from = RowsOf(rows);
  HEDDLE_CHECK(tiles.is_contiguous() && tiles.scalar_type() == rows.scalar_type());
  HEDDLE_CHECK(tiles.numel() == static_cast<int64_t>(index.size()) * from.columns);
  char* to = static_cast<char*>(tiles.data_ptr());
  const size_t bytes = static_cast<size_t>(from.row_bytes);
  at::parallel_for(0, static_cast<int64_t>(index.size()), kRowsPerTask,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int32_t row = index[static_cast<size_t>(i)];
                       char* target = to + i * from.row_bytes;
                       if (row == kNoRow) {
                         std::memset(target, 0, bytes);
                       } else {
                         std::memcpy(target, from.data + row * from.stride_bytes, bytes);
                       }
                     }
                   });
}

void ScatterRows(const at::Tensor& tiles, std::span<const int32_t> index, const at::Tensor& rows) {
  const Rows to = RowsOf(rows);
  HEDDLE_CHECK(tiles.is_contiguous() && tiles.scalar_type() == rows.scalar_type());
  HEDDLE_CHECK(tiles.numel() == static_cast<int64_t>(index.size()) * to.columns);
  const char* from = static_cast<const char*>(tiles.data_ptr());
  at::parallel_for(0, static_cast<int64_t>(index.size()), kRowsPerTask,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int32_t row = index[static_cast<size_t>(i)];
                       if (row == kNoRow) continue;
                       std::memcpy(to.data + row * to.stride_bytes, from + i * to.row_bytes,
                                   static_cast<size_t>(to.row_bytes));
                     }
                   });
}

void ScatterAddRows(const at::Tensor& tiles, std::span<const int32_t> index,
                    const at::Tensor& sums) {
  HEDDLE_CHECK(tiles.is_contiguous() && sums.is_contiguous() && sums.dim() == 2);
  const int64_t columns = sums.size(1);
  HEDDLE_CHECK(tiles.numel() == static_cast<int64_t>(index.size()) * columns);
  const char* from = static_cast<const char*>(tiles.data_ptr());
  char* to = static_cast<char*>(sums.data_ptr());
  const int64_t from_bytes = columns * tiles.element_size();
  const int64_t to_bytes = columns * sums.element_size();
  const pw::Table& kernels = pw::Kernels(ElementOf(tiles));
  at::parallel_for(0, columns, kColumnsPerTask, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < index.size(); ++i) {
      if (index[i] == kNoRow) continue;
      kernels.accumulate({from + static_cast<int64_t>(i) * from_bytes, to + index[i] * to_bytes},
                         {begin, end});
    }
  });
}

void ConvertRows(const at::Tensor& sums, std::span<const int32_t> rows, const at::Tensor& to) {
  const Rows target = RowsOf(to);
  HEDDLE_CHECK(sums.is_contiguous() && sums.size(1) == target.columns);
  const char* from = static_cast<const char*>(sums.data_ptr());
  const int64_t from_bytes = target.columns * sums.element_size();
  const pw::Table& kernels = pw::Kernels(ElementOf(to));
  at::parallel_for(
      0, static_cast<int64_t>(rows.size()), kRowsPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int32_t row = rows[static_cast<size_t>(i)];
          kernels.convert({from + row * from_bytes, target.data + row * target.stride_bytes},
                          {0, target.columns});
        }
      });
}

void CopyPadded(const at::Tensor& from, const at::Tensor& to) {
  HEDDLE_CHECK(from.dim() == 3 && to.dim() == 3 && from.scalar_type() == to.scalar_type());
  HEDDLE_CHECK(from.size(0) == to.size(0) && from.size(1) == to.size(1));
  HEDDLE_CHECK(from.size(2) <= to.size(2) && from.stride(2) == 1 && to.stride(2) == 1);
  const int64_t element = from.element_size();
  const size_t used = static_cast<size_t>(from.size(2) * element);
  const size_t padding = static_cast<size_t>((to.size(2) - from.size(2)) * element);
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(to.data_ptr());
  at::parallel_for(0, from.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < from.size(1); ++head) {
        char* t = target + (row * to.stride(0) + head * to.stride(1)) * element;
        std::memcpy(t, source + (row * from.stride(0) + head * from.stride(1)) * element, used);
        std::memset(t + used, 0, padding);
      }
    }
  });
}

void CopyHeads(const at::Tensor& from, const at::Tensor& to) {
  HEDDLE_CHECK(from.size(2) == to.size(2));
  CopyPadded(from, to);
}

}  // namespace heddle::attention
