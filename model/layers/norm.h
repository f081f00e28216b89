// The normalisation of a block's halves and of the model's end (attention-and-moe.md section 1.1):
//
//   rmsnorm    y = x g / sqrt(mean x^2 + eps)                       .weight
//   layernorm  y = (x - mean) g / sqrt(var x + eps) + b             .weight .bias
//   dyt        y = g tanh(alpha x) + b, alpha a scalar              .alpha .weight .bias
//
// N rows, D width. T is the compute type, S the statistics type (fp32; fp64 where T is fp64).
// Gradients of weights are sums in a fixed order: the same bits for any number of threads.
#pragma once

#include <string>

#include <ATen/core/Tensor.h>

#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::layers {

enum class NormKind { kRms, kLayer, kDyt };
NormKind NormKindOf(const heddle::v1::ModelConfig& config);

class Norm {
 public:
  // Kind and epsilon of the model's norms. `name` is a prefix such as "input_layernorm", or, with
  // a storage of no layer, the whole name: "model.norm".
  Norm(const heddle::v1::ModelConfig& config, const LayerStorage& storage, const std::string& name);
  // Of a kind and an epsilon of its own (latents, index keys).
  Norm(NormKind kind, double eps, const LayerStorage& storage, const std::string& name);

  // y [N, D]; saved [N] S is for the backward (the reciprocal deviation; DyT keeps nothing there).
  void Forward(const at::Tensor& x_ND, const at::Tensor& y_ND, const at::Tensor& saved_N) const;
  // dx = residual + d(norm)/dx . dy; dx may be dy or residual, residual may be undefined. Adds to
  // the gradients of the weights.
  void Backward(const at::Tensor& x_ND, const at::Tensor& saved_N, const at::Tensor& dy_ND,
                const at::Tensor& residual_ND, const at::Tensor& dx_ND) const;

 private:
  void DytBackward(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& residual,
                   const at::Tensor& dx) const;

  NormKind kind_;
  double eps_;
  at::Tensor gain_D_;
  at::Tensor gain_gradient_D_;
  at::Tensor bias_D_;  // undefined for kRms
  at::Tensor bias_gradient_D_;
  at::Tensor alpha_1_;  // kDyt
  at::Tensor alpha_gradient_1_;
};

}  // namespace heddle::layers
