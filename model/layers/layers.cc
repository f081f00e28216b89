#include "model/layers/layers.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cstring>
#include <vector>

#include "base/status/status.h"
#include "kernels/pointwise/params.h"
#include "model/layers/kernel_edge.h"
#include "model/layers/products.h"
#include "model/layers/rope.h"

namespace heddle::layers {
namespace {

namespace pw = kernels::pointwise;

constexpr int64_t kElementBlock = 64 * 1024;
constexpr int64_t kColumnBlock = 64;
constexpr int64_t kRowsByRow = 32;

}  // namespace

void RmsNorm(const at::Tensor& x, const at::Tensor& gain, double eps, const at::Tensor& y,
             const at::Tensor& rstd) {
  CheckMatrix(y, x.size(0), x.size(1), x.scalar_type());
  CheckVector(gain, x.size(1), x.scalar_type());
  CheckVector(rstd, x.size(0), StatisticsTypeOf(x));
  const pw::RmsNormForward p{x.size(1),       eps,          x.data_ptr(),
                             gain.data_ptr(), y.data_ptr(), rstd.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(x));
  ForRows(x.size(0), [&](pw::RowRange rows) { kernels.rms_norm_forward(p, rows); });
}

void RmsNormBackward(const at::Tensor& x, const at::Tensor& gain, const at::Tensor& rstd,
                     const at::Tensor& dy, const at::Tensor& residual, const at::Tensor& dx,
                     const at::Tensor& dgain) {
  const int64_t n = x.size(0);
  const int64_t width = x.size(1);
  const at::ScalarType statistics = StatisticsTypeOf(x);
  CheckMatrix(dy, n, width, x.scalar_type());
  CheckMatrix(dx, n, width, x.scalar_type());
  if (residual.defined()) CheckMatrix(residual, n, width, x.scalar_type());
  CheckVector(gain, width, x.scalar_type());
  CheckVector(rstd, n, statistics);
  CheckVector(dgain, width, statistics);
  pw::RmsNormBackward p;
  p.width = width;
  p.x = x.data_ptr();
  p.gain = gain.data_ptr();
  p.rstd = rstd.data_ptr();
  p.dy = dy.data_ptr();
  p.residual = residual.defined() ? residual.data_ptr() : nullptr;
  p.dx = dx.data_ptr();
  const pw::Table& kernels = pw::Kernels(ElementOf(x));
  const at::Tensor sums = BlockSums(n, width, statistics, [&](pw::RowRange rows, void* block_sums) {
    pw::RmsNormBackward q = p;
    q.dgain = block_sums;
    kernels.rms_norm_backward(q, rows);
  });
  AddBlockSums(sums, 0, dgain);
}

void LayerNorm(const at::Tensor& x, const at::Tensor& gain, const at::Tensor& bias, double eps,
               const at::Tensor& y, const at::Tensor& rstd) {
  const int64_t width = x.size(1);
  CheckMatrix(x, x.size(0), width, gain.scalar_type());
  CheckMatrix(y, x.size(0), width, x.scalar_type());
  CheckVector(gain, width, x.scalar_type());
  CheckVector(bias, width, x.scalar_type());
  CheckVector(rstd, x.size(0), StatisticsTypeOf(x));
  const pw::LayerNormForward p{width,           eps,          x.data_ptr(),   gain.data_ptr(),
                               bias.data_ptr(), y.data_ptr(), rstd.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(x));
  ForRows(x.size(0), [&](pw::RowRange rows) { kernels.layer_norm_forward(p, rows); });
}

void LayerNormBackward(const at::Tensor& x, const at::Tensor& gain, const at::Tensor& rstd,
                       const at::Tensor& dy, const at::Tensor& residual, const at::Tensor& dx,
                       const at::Tensor& dgain, const at::Tensor& dbias) {
  const int64_t n = x.size(0);
  const int64_t width = x.size(1);
  const at::ScalarType statistics = StatisticsTypeOf(x);
  CheckMatrix(x, n, width, gain.scalar_type());
  CheckMatrix(dy, n, width, x.scalar_type());
  CheckMatrix(dx, n, width, x.scalar_type());
  if (residual.defined()) CheckMatrix(residual, n, width, x.scalar_type());
  CheckVector(gain, width, x.scalar_type());
  CheckVector(rstd, n, statistics);
  CheckVector(dgain, width, statistics);
  CheckVector(dbias, width, statistics);
  pw::LayerNormBackward p;
  p.width = width;
  p.x = x.data_ptr();
  p.gain = gain.data_ptr();
  p.rstd = rstd.data_ptr();
  p.dy = dy.data_ptr();
  p.residual = residual.defined() ? residual.data_ptr() : nullptr;
  p.dx = dx.data_ptr();
  const pw::Table& kernels = pw::Kernels(ElementOf(x));
  const int64_t bias_at = width * rstd.element_size();
  const at::Tensor sums =
      BlockSums(n, 2 * width, statistics, [&](pw::RowRange rows, void* block_sums) {
        pw::LayerNormBackward q = p;
        q.dgain = block_sums;
        q.dbias = static_cast<char*>(block_sums) + bias_at;
        kernels.layer_norm_backward(q, rows);
      });
  AddBlockSums(sums, 0, dgain);
  AddBlockSums(sums, width, dbias);
}

void ApplyRope(const RopeTables& tables, const RopeArgs& args, const at::Tensor& rows) {
  HEDDLE_CHECK(rows.dim() == 2 && rows.stride(1) == 1);
  HEDDLE_CHECK(static_cast<int64_t>(args.positions.size()) == rows.size(0));
  const int64_t head_stride = args.head_stride > 0 ? args.head_stride : args.head_dim;
  HEDDLE_CHECK((args.heads - 1) * head_stride + args.head_dim <= rows.size(1));
  HEDDLE_CHECK(tables.cosine().scalar_type() == StatisticsTypeOf(rows));
  pw::Rope p;
  p.heads = args.heads;
  p.head_dim = args.head_dim;
  p.interleaved = tables.frequencies().interleaved;
  p.inverse = args.inverse;
  p.positions = args.positions.data();
  p.cosine = tables.cosine().data_ptr();
  p.sine = tables.sine().data_ptr();
  p.from = rows.data_ptr();
  p.to = rows.data_ptr();
  p.from_row = p.to_row = rows.stride(0);
  p.from_head = p.to_head = head_stride;
  const pw::Table& kernels = pw::Kernels(ElementOf(rows));
  ForRows(rows.size(0), [&](pw::RowRange range) { kernels.rope(p, range); });
}

void Swiglu(const at::Tensor& gate_up, const at::Tensor& out) {
  CheckMatrix(gate_up, out.size(0), 2 * out.size(1), out.scalar_type());
  HEDDLE_CHECK(out.is_contiguous());
  const pw::SwigluForward p{out.size(1), gate_up.data_ptr(), out.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(out));
  ForRows(out.size(0), [&](pw::RowRange rows) { kernels.swiglu_forward(p, rows); });
}

void SwigluBackward(const at::Tensor& gate_up, const at::Tensor& out_gradient) {
  CheckMatrix(gate_up, out_gradient.size(0), 2 * out_gradient.size(1), out_gradient.scalar_type());
  HEDDLE_CHECK(out_gradient.is_contiguous());
  const pw::SwigluBackward p{out_gradient.size(1), gate_up.data_ptr(), out_gradient.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(gate_up));
  ForRows(out_gradient.size(0), [&](pw::RowRange rows) { kernels.swiglu_backward(p, rows); });
}

double CrossEntropy(const at::Tensor& logits, std::span<const int32_t> labels, bool gradient,
                    double scale) {
  HEDDLE_CHECK(logits.dim() == 2 && logits.is_contiguous());
  HEDDLE_CHECK(static_cast<int64_t>(labels.size()) == logits.size(0));
  std::vector<double> losses(labels.size());
  const pw::Table& kernels = pw::Kernels(ElementOf(logits));
  at::parallel_for(0, logits.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> exponentials(static_cast<size_t>(logits.size(1)));
    kernels.cross_entropy({logits.size(1), logits.data_ptr(), labels.data(), losses.data(),
                           gradient, scale, exponentials.data()},
                          {begin, end});
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum;
}

void Embed(const at::Tensor& table, std::span<const int32_t> ids, const at::Tensor& out) {
  CheckMatrix(out, static_cast<int64_t>(ids.size()), table.size(1), table.scalar_type());
  HEDDLE_CHECK(table.is_contiguous());
  const int64_t row_bytes = table.size(1) * table.element_size();
  const char* from = static_cast<const char*>(table.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  ForRows(out.size(0), [&](pw::RowRange rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      std::memcpy(to + row * row_bytes, from + ids[static_cast<size_t>(row)] * row_bytes,
                  static_cast<size_t>(row_bytes));
    }
  });
}

void EmbedBackward(const at::Tensor& gradient, std::span<const int32_t> ids,
                   const at::Tensor& table_gradient) {
  const int64_t width = gradient.size(1);
  CheckMatrix(table_gradient, table_gradient.size(0), width, StatisticsTypeOf(gradient));
  HEDDLE_CHECK(gradient.is_contiguous());
  HEDDLE_CHECK(static_cast<int64_t>(ids.size()) == gradient.size(0));
  const pw::EmbeddingBackward p{gradient.size(0), width, ids.data(), gradient.data_ptr(),
                                table_gradient.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(gradient));
  at::parallel_for(0, width, kColumnBlock, [&](int64_t begin, int64_t end) {
    kernels.embedding_backward(p, {begin, end});
  });
}

void Linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& y) {
  Product(x, weight.t(), y);
}

void LinearByRow(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& y) {
  const int64_t rows = x.size(0);
  const at::Tensor transposed = Widened(weight).t();
  int64_t begin = 0;
  for (; begin + kRowsByRow <= rows; begin += kRowsByRow) {
    Product(x.narrow(0, begin, kRowsByRow), transposed, y.narrow(0, begin, kRowsByRow));
  }
  if (begin == rows) return;
  at::Tensor padded = at::empty({kRowsByRow, x.size(1)}, x.options());
  padded.zero_();
  padded.narrow(0, 0, rows - begin).copy_(x.narrow(0, begin, rows - begin));
  const at::Tensor out = at::empty({kRowsByRow, y.size(1)}, y.options());
  Product(padded, transposed, out);
  y.narrow(0, begin, rows - begin).copy_(out.narrow(0, 0, rows - begin));
}

void LinearAdd(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& weight,
               const at::Tensor& y) {
  ProductAdd(residual, x, weight.t(), y);
}

void LinearInputGradient(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx) {
  Product(dy, weight, dx);
}

void LinearWeightGradient(const at::Tensor& dy, const at::Tensor& x,
                          const at::Tensor& weight_gradient) {
  CheckMatrix(weight_gradient, dy.size(1), x.size(1), StatisticsTypeOf(x));
  const at::Tensor wide = Widened(x);
  at::Tensor sum = weight_gradient;
  if (wide.scalar_type() == sum.scalar_type()) {
    ProductAdd(sum, Widened(dy).t(), wide, sum);
    return;
  }
  const at::Tensor product = at::mm(dy.t(), x);
  const pw::Accumulate p{product.data_ptr(), sum.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(product));
  at::parallel_for(0, sum.numel(), kElementBlock, [&](int64_t begin, int64_t end) {
    kernels.accumulate(p, {begin, end});
  });
}

}  // namespace heddle::layers
