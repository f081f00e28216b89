// The feed-forward function of a block, f(x) = down(act(in x)), as the dense half of a block and as
// the body of an expert (attention-and-moe.md sections 1.1 and 9):
//
//   swiglu  down(silu(gate x) * up x)     gate_proj, up_proj (end to end), down_proj    3 D F
//   gelu    down(gelu(up x))              up_proj, down_proj                            2 D F
//   silu    down(silu(up x))              up_proj, down_proj                            2 D F
//
// gelu(x) = x Phi(x) with the exact error function, not its tanh approximation. No biases.
// N rows, D width, F hidden width, C columns of `in`: 2 F for swiglu, F for the others.
#pragma once

#include <memory>
#include <string>

#include <ATen/core/Tensor.h>

#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::layers {

enum class Activation { kSwiglu, kGelu, kSilu };
// ModelConfig.ffn.
Activation ActivationOf(const heddle::v1::ModelConfig& config);

// out = residual + f(h), names "mlp.*". The first product is kept for the backward, which computes
// the hidden values again.
std::unique_ptr<Sublayer> MakeFeedForward(const heddle::v1::ModelConfig& config,
                                          const LayerStorage& storage);

// Views of one feed-forward function and of its gradients.
struct FeedForwardTensors {
  at::Tensor in_CD;
  at::Tensor down_DF;
  at::Tensor in_gradient_CD;
  at::Tensor down_gradient_DF;
  int64_t columns() const { return in_CD.size(0); }
  int64_t hidden() const { return down_DF.size(1); }
};
// `prefix` such as "mlp." or "mlp.experts.3."; the hidden width is that of the plan.
FeedForwardTensors ViewFeedForward(Activation activation, const LayerStorage& storage,
                                   const std::string& prefix);

// hidden = act(pre).
void Activate(Activation activation, const at::Tensor& pre_NC, const at::Tensor& hidden_NF);
// `pre` becomes its gradient; `hidden_gradient` becomes the forward's hidden values again.
void ActivateBackward(Activation activation, const at::Tensor& pre_NC,
                      const at::Tensor& hidden_gradient_NF);
// Of rows whose output is weight f(x), with hidden_gradient = dL/d(weight f) through `down` alone:
// `pre` becomes its gradient (weight included), hidden_gradient weight times the hidden values, and
// dweight [N] S = dL/dweight.
void ActivateWeightedBackward(Activation activation, const at::Tensor& weight_N,
                              const at::Tensor& pre_NC, const at::Tensor& hidden_gradient_NF,
                              const at::Tensor& dweight_N);

}  // namespace heddle::layers
