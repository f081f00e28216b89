#include "model/attention/nsa_compression.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>

#include <algorithm>

#include "base/status/status.h"
#include "kernels/compression/params.h"
#include "model/attention/conversion.h"
#include "model/attention/row_copy.h"
#include "model/layers/layers.h"
#include "model/layers/products.h"

namespace heddle::attention {
namespace {

namespace kc = kernels::compression;

constexpr int64_t kWindowsPerTask = 16;
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kColumnsPerTask = 16;

// --- Pools ---------------------------------------------------------------------------------------

const kc::Table<float>& TableOf(float) { return kc::FloatKernels(); }
const kc::Table<double>& TableOf(double) { return kc::DoubleKernels(); }

template <typename S>
const S* DataOrNull(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<S>() : nullptr;
}
template <typename S>
S* MutableOrNull(const at::Tensor& t) {
  return t.defined() ? t.data_ptr<S>() : nullptr;
}

// All tensors are of type S already.
template <typename S>
kc::Pool<S> PoolOf(const Compression& c, const CompressionWindows& windows,
                   const CompressionWeights& weights, const at::Tensor& x) {
  kc::Pool<S> pool;
  pool.heads = c.kv_heads;
  pool.dim = c.dim;
  pool.kernel_size = c.kernel_size;
  pool.windows = windows.count();
  pool.first = windows.first.data();
  pool.x = x.const_data_ptr<S>();
  pool.x_stride = x.stride(0);
  pool.weight = DataOrNull<S>(weights.weight);
  pool.pe = DataOrNull<S>(weights.pe);
  return pool;
}

template <typename S>
void PoolForward(const Compression& c, const CompressionWindows& windows,
                 const CompressionWeights& weights, const at::Tensor& x, const at::Tensor& out) {
  const kc::Forward<S> forward{PoolOf<S>(c, windows, weights, x), out.data_ptr<S>()};
  at::parallel_for(0, windows.count(), kWindowsPerTask, [&](int64_t begin, int64_t end) {
    TableOf(S{}).forward(forward, {begin, end});
  });
}

template <typename S>
void PoolBackward(const Compression& c, const CompressionWindows& windows,
                  const CompressionWeights& weights, const at::Tensor& x, const at::Tensor& dout,
                  const at::Tensor& dx, const CompressionWeights& gradients) {
  kc::Backward<S> backward;
  backward.pool = PoolOf<S>(c, windows, weights, x);
  backward.holders = {windows.holders_begin.data(), windows.holders_end.data()};
  backward.dout = dout.const_data_ptr<S>();
  backward.dx = dx.data_ptr<S>();
  backward.dx_stride = dx.stride(0);
  backward.dweight = MutableOrNull<S>(gradients.weight);
  backward.dpe = MutableOrNull<S>(gradients.pe);
  at::parallel_for(0, dx.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    TableOf(S{}).backward_rows(backward, {begin, end});
  });
  if (backward.dweight == nullptr && backward.dpe == nullptr) return;
  at::parallel_for(0, c.kv_heads * c.kernel_size, 1, [&](int64_t begin, int64_t end) {
    TableOf(S{}).backward_taps(backward, {begin, end});
  });
}

// --- Linear --------------------------------------------------------------------------------------

// Rows of all windows, window by window.
std::vector<int32_t> WindowRows(const Compression& c, const CompressionWindows& windows) {
  std::vector<int32_t> rows;
  rows.reserve(windows.first.size() * static_cast<size_t>(c.kernel_size));
  for (const int32_t first : windows.first) {
    for (int32_t m = 0; m < c.kernel_size; ++m) rows.push_back(first + m);
  }
  return rows;
}

// [M, l D] of one head: windows of x, plus the embedding.
void GatherWindows(const CompressionWeights& weights, const std::vector<int32_t>& rows,
                   const at::Tensor& x, int64_t head, const at::Tensor& gathered) {
  GatherRows(x.narrow(1, head, 1), rows, gathered);
  if (weights.pe.defined()) {
    at::Tensor sum = gathered;
    at::add_out(sum, gathered, weights.pe.select(0, head).reshape({1, gathered.size(1)}));
  }
}

void LinearForward(const Compression& c, const CompressionWindows& windows,
                   const CompressionWeights& weights, const at::Tensor& x,
                   layers::BufferPool* scratch, const at::Tensor& out) {
  const std::vector<int32_t> rows = WindowRows(c, windows);
  const at::Tensor gathered =
      scratch->Take({windows.count(), c.kernel_size * c.dim}, x.scalar_type());
  for (int64_t head = 0; head < c.kv_heads; ++head) {
    GatherWindows(weights, rows, x, head, gathered);
    layers::Product(gathered, weights.weight.select(0, head), out.select(1, head));
  }
}

// dx[rows[i]] += tiles[i], i ascending. Threads own columns: the order of additions never changes.
template <typename T, typename S>
void AddRows(const at::Tensor& tiles, const std::vector<int32_t>& rows, const at::Tensor& dx) {
  const int64_t width = dx.size(1);
  const T* from = tiles.const_data_ptr<T>();
  S* to = dx.data_ptr<S>();
  const int64_t stride = dx.stride(0);
  at::parallel_for(0, width, kColumnsPerTask, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const T* tile = from + static_cast<int64_t>(i) * width;
      S* row = to + rows[i] * stride;
      for (int64_t d = begin; d < end; ++d) row[d] += static_cast<S>(tile[d]);
    }
  });
}

// sums[d] += tiles[i, d], i ascending.
template <typename T, typename S>
void AddColumns(const at::Tensor& tiles, const at::Tensor& sums) {
  const int64_t width = tiles.size(1);
  const T* from = tiles.const_data_ptr<T>();
  S* to = sums.data_ptr<S>();
  at::parallel_for(0, width, kColumnsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < tiles.size(0); ++i) {
      for (int64_t d = begin; d < end; ++d) to[d] += static_cast<S>(from[i * width + d]);
    }
  });
}

// Gradient of the gathered windows [M, l D] to rows and, where there is one, to the embedding [l,
// D].
template <typename T, typename S>
void SpreadWindows(const at::Tensor& windows, const std::vector<int32_t>& rows,
                   const at::Tensor& dx, const at::Tensor& dpe) {
  AddRows<T, S>(windows, rows, dx);
  if (dpe.defined()) AddColumns<T, S>(windows, dpe);
}

void SpreadWindows(const at::Tensor& windows, const std::vector<int32_t>& rows,
                   const at::Tensor& dx, const at::Tensor& dpe) {
  switch (windows.scalar_type()) {
    case at::kDouble:
      return SpreadWindows<double, double>(windows, rows, dx, dpe);
    case at::kFloat:
      return SpreadWindows<float, float>(windows, rows, dx, dpe);
    default:
      return SpreadWindows<at::BFloat16, float>(windows, rows, dx, dpe);
  }
}

void LinearBackward(const Compression& c, const CompressionWindows& windows,
                    const CompressionWeights& weights, const at::Tensor& x, const at::Tensor& dout,
                    layers::BufferPool* scratch, const at::Tensor& dx,
                    const CompressionWeights& gradients) {
  const std::vector<int32_t> rows = WindowRows(c, windows);
  const int64_t width = c.kernel_size * c.dim;
  const at::Tensor gathered = scratch->Take({windows.count(), width}, x.scalar_type());
  const at::Tensor dout_head = scratch->Take({windows.count(), c.dim}, x.scalar_type());
  for (int64_t head = 0; head < c.kv_heads; ++head) {
    GatherWindows(weights, rows, x, head, gathered);
    at::Tensor rounded = dout_head;
    rounded.copy_(dout.select(1, head));
    layers::LinearWeightGradient(gathered, dout_head, gradients.weight.select(0, head));
    // From here `gathered` is its own gradient.
    layers::Linear(dout_head, weights.weight.select(0, head), gathered);
    SpreadWindows(gathered, rows, dx.select(1, head),
                  gradients.pe.defined() ? gradients.pe.select(0, head) : at::Tensor());
  }
}

void Check(const Compression& c, const CompressionWindows& windows, const at::Tensor& x,
           const at::Tensor& compressed) {
  for (const at::Tensor* t : {&x, &compressed}) {
    HEDDLE_CHECK(t->device().is_cpu());
    HEDDLE_CHECK(t->dim() == 3 && t->size(1) == c.kv_heads && t->size(2) == c.dim,
                 "rows of heads expected");
    HEDDLE_CHECK(t->size(0) < 2 || t->stride(0) >= c.kv_heads * c.dim);
  }
  HEDDLE_CHECK(compressed.size(0) == windows.count() && compressed.is_contiguous());
}

}  // namespace

int64_t WindowCount(const Compression& c, int64_t tokens) {
  return tokens < c.kernel_size ? 0 : (tokens - c.kernel_size) / c.stride + 1;
}

CompressionWindows WindowsOf(const Compression& c, const layers::Documents& documents) {
  CompressionWindows out;
  out.documents = {0};
  for (size_t b = 0; b + 1 < documents.cu_seqlens.size(); ++b) {
    const int32_t first_row = documents.cu_seqlens[b];
    const int32_t length = documents.cu_seqlens[b + 1] - first_row;
    const int32_t first_window = out.documents.back();
    const int32_t count = static_cast<int32_t>(WindowCount(c, length));
    const int32_t stride = static_cast<int32_t>(c.stride);
    const int32_t size = static_cast<int32_t>(c.kernel_size);
    for (int32_t j = 0; j < count; ++j) {
      out.first.push_back(first_row + j * stride);
      out.position.push_back(j * stride);
    }
    for (int32_t t = 0; t < length; ++t) {
      // j r <= t < j r + l
      const int32_t begin = t < size ? 0 : (t - size) / stride + 1;
      const int32_t end = std::min(t / stride + 1, count);
      out.holders_begin.push_back(first_window + std::min(begin, end));
      out.holders_end.push_back(first_window + end);
    }
    out.documents.push_back(first_window + count);
  }
  return out;
}

CompressionWindows OneWindow(const Compression& c, int64_t index) {
  CompressionWindows out;
  out.first = {0};
  out.position = {static_cast<int32_t>(index * c.stride)};
  out.holders_begin.assign(static_cast<size_t>(c.kernel_size), 0);
  out.holders_end.assign(static_cast<size_t>(c.kernel_size), 1);
  out.documents = {0, 1};
  return out;
}

void Compress(const Compression& c, const CompressionWindows& windows,
              const CompressionWeights& weights, const at::Tensor& x, layers::BufferPool* scratch,
              const at::Tensor& out) {
  Check(c, windows, x, out);
  HEDDLE_CHECK(out.scalar_type() == x.scalar_type());
  if (windows.count() == 0) return;
  const size_t mark = scratch->Mark();
  if (c.type == CompressType::kLinear) {
    LinearForward(c, windows, weights, x, scratch, out);
    scratch->Release(mark);
    return;
  }
  const at::ScalarType statistics = layers::StatisticsType(x.scalar_type());
  const CompressionWeights wide = {Converted(weights.weight, statistics, scratch),
                                   Converted(weights.pe, statistics, scratch)};
  const at::Tensor wide_x = Converted(x, statistics, scratch);
  at::Tensor wide_out = out;
  if (out.scalar_type() != statistics) {
    wide_out = scratch->Take({out.size(0), out.size(1), out.size(2)}, statistics);
  }
  if (statistics == at::kDouble) {
    PoolForward<double>(c, windows, wide, wide_x, wide_out);
  } else {
    PoolForward<float>(c, windows, wide, wide_x, wide_out);
  }
  if (out.scalar_type() != statistics) {
    at::Tensor rounded = out;
    rounded.copy_(wide_out);
  }
  scratch->Release(mark);
}

void CompressBackward(const Compression& c, const CompressionWindows& windows,
                      const CompressionWeights& weights, const at::Tensor& x,
                      const at::Tensor& dout, layers::BufferPool* scratch, const at::Tensor& dx,
                      const CompressionWeights& gradients) {
  const at::ScalarType statistics = layers::StatisticsType(x.scalar_type());
  Check(c, windows, x, dout);
  Check(c, windows, dx, dout);
  HEDDLE_CHECK(dout.scalar_type() == statistics && dx.scalar_type() == statistics);
  if (windows.count() == 0) return;
  const size_t mark = scratch->Mark();
  if (c.type == CompressType::kLinear) {
    LinearBackward(c, windows, weights, x, dout, scratch, dx, gradients);
    scratch->Release(mark);
    return;
  }
  const CompressionWeights wide = {Converted(weights.weight, statistics, scratch),
                                   Converted(weights.pe, statistics, scratch)};
  const at::Tensor wide_x = Converted(x, statistics, scratch);
  if (statistics == at::kDouble) {
    PoolBackward<double>(c, windows, wide, wide_x, dout, dx, gradients);
  } else {
    PoolBackward<float>(c, windows, wide, wide_x, dout, dx, gradients);
  }
  scratch->Release(mark);
}

}  // namespace heddle::attention
