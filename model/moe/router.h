// The router of a mixture of experts (attention-and-moe.md section 9): logits, choice of experts,
// their weights, the losses on the logits, and all gradients. Logits and everything behind them are
// fp32 (fp64 where the compute type is fp64), row by row in one order of operations: a token's
// experts do not depend on its batch or on the number of threads.
//
// N tokens, D width, E experts, K experts per token. T compute type, S statistics type.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/layers/sublayer.h"

namespace heddle::v1 {
class MoeConfig;
}

namespace heddle::moe {

// The loss that pushes towards equal loads. With n rows, f_i = counts_i / (n K), P_i = mean over
// the rows of softmax(z)_i:
//   switch      E sum_i f_i P_i                                         (1 where balanced)
//   sequence    per document of T rows: E / (K T) sum_i counts_i mean_t s'_i, s' = s / sum_E s
//   importance  mean_i (E g_i / sum g - 1)^2, g_i = sum over the rows of the weights of expert i
// counts are of the router: assignments that a capacity drops are in them.
enum class BalanceLoss { kSwitch, kSequence, kImportance };

struct RouterOptions {
  int64_t experts = 0;
  int64_t top_k = 1;
  bool sigmoid = false;    // scores: sigmoid(z), else softmax(z) over E
  bool normalize = false;  // weights of a token sum to route_scale
  double route_scale = 1;
  // E is split into `groups` runs of experts; a token chooses among the experts of its best
  // `topk_groups`. A group's score is its best biased score, or the sum of its two best ones.
  int64_t groups = 1;
  int64_t topk_groups = 1;
  bool group_sum_of_two = false;
  double noise_std = 0;
  bool force_balance = false;  // token t takes the experts (t K + j) mod E
  BalanceLoss balance = BalanceLoss::kSwitch;
  double balance_coefficient = 0;
  double z_coefficient = 0;
};
// Sigmoid scores are always normalised, softmax scores where norm_topk is set. Groups are ranked by
// the sum of two where the router balances by its bias: sigmoid scores, or a bias_update_rate.
// (Whether the bias happens to be 0 must not matter: it is, before the first step.)
RouterOptions RouterOptionsOf(const heddle::v1::MoeConfig& config);

// Keys of the noise: the value for (token, expert) is a function of these, the global index of the
// token and the expert alone.
struct NoiseKey {
  uint64_t seed = 0;
  int64_t step = 0;
  int layer = 0;
  int64_t first_token = 0;
};

class Router {
 public:
  // weight [E, D] T, gradient [E, D] S (both may be undefined where only logits are worked on),
  // bias [E], nullable, read at each Select. REQUIRES: K <= topk_groups E / groups, groups divides
  // E.
  Router(const RouterOptions& options, at::Tensor weight_ED, at::Tensor gradient_ED,
         const float* bias);

  const RouterOptions& options() const { return options_; }

  // z = h W^T, plus noise where `noise` is not null and noise_std > 0. The noise is part of the
  // logits in all that follows, and a constant in the gradients.
  void Logits(const at::Tensor& h_ND, const NoiseKey* noise, const at::Tensor& logits_NE) const;

  // The experts of each token in ascending order: the K best by (score + bias descending, index
  // ascending), NaN below every number. Returns the number of tokens with a NaN score.
  int64_t Select(const at::Tensor& logits_NE, int64_t first_token,
                 std::vector<int32_t>* experts_NK) const;

  // weights [N, K] S: route_scale s, s over the K chosen ones where normalised; never the bias.
  void Weigh(const at::Tensor& logits_NE, std::span<const int32_t> experts,
             const at::Tensor& weights_NK) const;

  // What a batch of routed tokens is, for the losses.
  struct Routed {
    const at::Tensor& logits_NE;
    std::span<const int32_t> experts;  // [N, K]
    const at::Tensor& weights_NK;
    const layers::Documents* documents = nullptr;  // of the `sequence` form
    double row_scale = 0;  // 1 / rows of the whole step: a batch of n rows counts n row_scale, so
                           // that losses add up over micro-batches and ranks
  };
  // Adds balance and router_z, each with its coefficient once.
  void AddLosses(const Routed& routed, layers::LayerLosses* losses) const;

  // dlogits [N, E] S = gradient of the losses and of the layer's output through the weights,
  // dweights [N, K] S = dL/dweights through the output. The choice is a constant.
  void LogitsGradient(const Routed& routed, const at::Tensor& dweights_NK,
                      const at::Tensor& dlogits_NE) const;
  // Adds to the gradient of W. The share of h is dlogits W, which the layer adds to its other ones.
  void WeightGradient(const at::Tensor& dlogits_NE, const at::Tensor& h_ND) const;

  const at::Tensor& weight() const { return weight_ED_; }

 private:
  // The balancing loss as a function linear in the scores (or the weights): coefficients by expert,
  // one set for the batch or one per document. The sets include the loss's coefficient and scale.
  struct Balance {
    std::vector<double> of_softmax;  // [sets, E], d loss / d softmax(z)
    std::vector<double> of_share;    // [sets, E], d loss / d(s / sum s)
    std::vector<double> of_weight;   // [sets, E], d loss / d weight
    std::vector<int32_t> row_set;    // [N], empty: set 0
    double importance = 0;           // the loss, where it is not linear
  };
  Balance BalanceOf(const Routed& routed) const;
  void SequenceBalance(const Routed& routed, Balance* balance) const;
  void ImportanceBalance(const Routed& routed, Balance* balance) const;

  template <typename S>
  int64_t SelectRows(const at::Tensor& logits, std::vector<int32_t>* experts) const;

  RouterOptions options_;
  at::Tensor weight_ED_;
  at::Tensor gradient_ED_;
  const float* bias_;
};

}  // namespace heddle::moe
