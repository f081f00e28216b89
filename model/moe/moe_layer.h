// Mixture of experts as the feed-forward half of a block (attention-and-moe.md section 9):
//
//   out = residual + shared(h) + sum over the K chosen experts i of g_i f_i(h)
//
// f_i and `shared` have the form of ModelConfig.ffn; `shared` is one function of hidden width
// n_shared d_expert, always on and unknown to the router.
#pragma once

#include <cstdint>
#include <memory>

#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::moe {

// Since the layer was made, over passes that count.
struct MoeCounters {
  int64_t assignments = 0;  // (token, expert) pairs that the router chose
  int64_t dropped = 0;      // of them, beyond the capacity of their expert
  int64_t nan_tokens = 0;   // tokens with a NaN among their scores
};

// Passes: kSelect keeps the routing, kRecompute takes it instead of routing again; the weights of
// the experts are computed anew from the same logits. kInference neither adds noise nor drops
// tokens, so that a row's result does not depend on its batch: decoding is Forward on n rows.
//
// Losses: the balancing loss in the form of moe.aux_form and z_loss mean (logsumexp z)^2 over the
// logits, noise included. A batch of n rows counts n StepInfo::row_scale.
//
// Capacity (moe.capacity_factor > 0): an expert takes the first ceil(factor N K / E) of its tokens
// in a micro-batch of N; the others get nothing from it, and their other weights stay as they are.
//
// Balancing bias (buffer mlp.gate.e_score_correction_bias): statistics() counts the router's
// assignments per expert; UpdateBuffers adds moe.bias_update_rate sign(mean - count), less the mean
// of these steps where moe.bias_center is set.
//
// Results do not depend on the number of threads. Gradients are those of the mathematics: through
// the weights to the router, to the experts and to h; the choice is a constant.
class MoeLayer : public layers::Sublayer {
 public:
  virtual const MoeCounters& counters() const = 0;
};

// Names "mlp.gate.weight" [E, D], "mlp.experts.{e}.*", "mlp.shared_experts.*" where n_shared > 0;
// gate_proj and up_proj of an expert lie end to end. The buffer may be absent: no bias.
// REQUIRES: PlanModel accepts the configuration.
std::unique_ptr<MoeLayer> MakeMoe(const heddle::v1::ModelConfig& config,
                                  const layers::LayerStorage& storage);

}  // namespace heddle::moe
