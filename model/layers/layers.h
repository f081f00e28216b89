// The torch edge of the row-wise kernels and of matrix products: each function checks its tensors,
// splits rows over LibTorch's threads and adds partial sums in a fixed order, so that results do
// not depend on the number of threads (matrix products are LibTorch's and do).
//
// Shapes: N packed tokens, D width, F feed-forward width, V vocabulary, I inputs, O outputs of a
// linear layer. T is the compute type (bf16, fp32, fp64), S the statistics type: fp32, or fp64 if T
// is fp64. Matrices are contiguous unless said. Outputs are written in place, never resized.
// Shapes and types are our own contract: a violation is HEDDLE_CHECK (S26).
#pragma once

#include <cstdint>
#include <span>

namespace at {
class Tensor;
}

namespace heddle::layers {

class RopeTables;

// y = rmsnorm(x) gain, rstd [N] S is for the backward.
void RmsNorm(const at::Tensor& x_ND, const at::Tensor& gain_D, double eps, const at::Tensor& y_ND,
             const at::Tensor& rstd_N);
// dx = residual + backward of RmsNorm; dx may be dy or residual. dgain [D] S is added to.
// `residual` may be undefined.
void RmsNormBackward(const at::Tensor& x_ND, const at::Tensor& gain_D, const at::Tensor& rstd_N,
                     const at::Tensor& dy_ND, const at::Tensor& residual_ND,
                     const at::Tensor& dx_ND, const at::Tensor& dgain_D);

// y = layernorm(x) gain + bias, rstd [N] S is for the backward.
void LayerNorm(const at::Tensor& x_ND, const at::Tensor& gain_D, const at::Tensor& bias_D,
               double eps, const at::Tensor& y_ND, const at::Tensor& rstd_N);
// As RmsNormBackward; dgain and dbias [D] S are added to.
void LayerNormBackward(const at::Tensor& x_ND, const at::Tensor& gain_D, const at::Tensor& rstd_N,
                       const at::Tensor& dy_ND, const at::Tensor& residual_ND,
                       const at::Tensor& dx_ND, const at::Tensor& dgain_D,
                       const at::Tensor& dbias_D);

struct RopeArgs {
  int64_t heads = 0;
  int64_t head_dim = 0;
  bool inverse = false;
  std::span<const int32_t> positions;  // [N], below the tables' length
  int64_t head_stride = 0;             // columns from head to head; 0: head_dim
};
// Rotates the first `heads` heads of each row of rows_NC in place; C may hold more columns than
// they take.
void ApplyRope(const RopeTables& tables, const RopeArgs& args, const at::Tensor& rows_NC);

// out = silu(gate) up, gate_up = [gate | up].
void Swiglu(const at::Tensor& gate_up_N2F, const at::Tensor& out_NF);
// gate_up becomes its gradient; out_gradient becomes the forward's output again.
void SwigluBackward(const at::Tensor& gate_up_N2F, const at::Tensor& out_gradient_NF);

// Sum of the losses of the rows. With `gradient` the logits become d(sum * scale)/d(logits).
// labels [N]: < 0 is ignored.
double CrossEntropy(const at::Tensor& logits_NV, std::span<const int32_t> labels, bool gradient,
                    double scale);

// out[i] = table[ids[i]].
void Embed(const at::Tensor& table_VD, std::span<const int32_t> ids, const at::Tensor& out_ND);
// table_gradient [V, D] S += gradient by id, in the order of the rows.
void EmbedBackward(const at::Tensor& gradient_ND, std::span<const int32_t> ids,
                   const at::Tensor& table_gradient_VD);

// y = x W^T.
void Linear(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& y_NO);
// y = x W^T where the bits of a row depend on that row alone, not on the number of rows or its
// place among them: rows run in blocks of one size. For index keys, whose scores tie where tokens
// repeat: the ties of a document must be those of its decoding (attention-and-moe.md section 1).
void LinearByRow(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& y_NO);
// y = residual + x W^T; y may be residual.
void LinearAdd(const at::Tensor& residual_NO, const at::Tensor& x_NI, const at::Tensor& weight_OI,
               const at::Tensor& y_NO);
// dx = dy W.
void LinearInputGradient(const at::Tensor& dy_NO, const at::Tensor& weight_OI,
                         const at::Tensor& dx_NI);
// weight_gradient [O, I] S += dy^T x. In bf16 the product of this call is rounded to bf16 before it
// is added in fp32, unless products run in fp32 (products.h).
void LinearWeightGradient(const at::Tensor& dy_NO, const at::Tensor& x_NI,
                          const at::Tensor& weight_gradient_OI);

}  // namespace heddle::layers
