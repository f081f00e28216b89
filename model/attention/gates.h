// A gate of GSA: y = x act(h W + b), one factor per element or per head, with its backward
// (attention-and-moe.md section 7.1). The shape of W decides the form.
//
// N rows, H heads, D head width, D' model width, G columns of the gate: H D or H. T compute type, S
// statistics type; the factor is computed in S.
#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>

#include "model/layers/sublayer.h"

namespace heddle::attention {

enum class GateActivation { kSigmoid, kTanh, kSilu };  // kTanh: (tanh + 1) / 2

class Gate {
 public:
  // Tensors `name`.weight [G, D'] and `name`.bias [G].
  Gate(const layers::LayerStorage& storage, const std::string& name, GateActivation activation);

  int64_t columns() const { return bias_.size(0); }
  // z [N, G] T.
  void Logits(const at::Tensor& h_ND, const at::Tensor& z_NG) const;
  // y = x act(z); y may be x. First dimensions may be strided.
  void Apply(const at::Tensor& z_NG, const at::Tensor& x_NHD, const at::Tensor& y_NHD) const;
  // dx = dy act(z), may be dy; z becomes dL/dz.
  void ApplyBackward(const at::Tensor& z_NG, const at::Tensor& x_NHD, const at::Tensor& dy_NHD,
                     const at::Tensor& dx_NHD) const;
  // Adds to the gradients of weight and bias, and dz W to dh.
  void LogitsBackward(const at::Tensor& h_ND, const at::Tensor& dz_NG,
                      const at::Tensor& dh_ND) const;

 private:
  GateActivation activation_;
  at::Tensor weight_;
  at::Tensor weight_gradient_;
  at::Tensor bias_;
  at::Tensor bias_gradient_;
};

// t = sigmoid(t), t S and contiguous. An element's bits depend on its value alone, not on its place
// in the tensor, as selections need it.
void Sigmoid(const at::Tensor& t);
// dy becomes dy y (1 - y), the gradient before the sigmoid whose result is y. Both S, contiguous.
void SigmoidBackward(const at::Tensor& y, const at::Tensor& dy);

// sums[c] += sum over rows of rows[n, c], n ascending: the same bits for any number of threads.
// rows [N, C] T or S, contiguous; sums [C] S.
void AddColumnSums(const at::Tensor& rows_NC, const at::Tensor& sums_C);

}  // namespace heddle::attention
