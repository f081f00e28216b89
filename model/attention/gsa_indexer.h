// The indexer of GSA with its adaptive key counts (attention-and-moe.md sections 7.1 to 7.3):
//
//   I[t,s] = sum_j sigmoid(x[t].ww_j + cw_j) act(qI[t,j].kI[s] / sqrt(dI) + beta_j)
//
// act is sigmoid or relu; no rotation. Trained by the KL of DSA on softmax(I / tau_I). Tensors:
// self_attn.indexer.{q_proj,k_proj,weights_proj}.weight, weights_proj.bias (cw), bias (beta);
// adaptive_k learned: adaptive_k.{fc1,fc2}.{weight,bias}, which no loss trains. Buffer of
// variance_causal: vref [1].
#pragma once

#include <array>
#include <span>
#include <vector>

#include "model/attention/adaptive_k.h"
#include "model/attention/token_indexer.h"

namespace heddle::attention {

class GsaIndexer final : public TokenIndexer {
 public:
  GsaIndexer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage);

  IndexRows Project(std::span<const int32_t> positions, const at::Tensor& u_NU,
                    const at::Tensor& x_ND, layers::BufferPool* pool) override;

  // variance_causal: {sum of v_t, rows} over the rows with at least two visible keys, v_t the
  // population variance of the row's visible scores, of every pass that counts, in both stages.
  std::span<double> statistics() override;
  // vref <- mean of v_t at the first step that has such a row, then 0.99 vref + 0.01 mean. vref 0
  // means "not yet known": until then every row counts as lying at the mean, so that all ranks and
  // micro-batches of the first step use the same k. A step without such rows changes nothing.
  void UpdateBuffers() override;

 protected:
  std::vector<int32_t> CountKeys(const layers::PassContext& context,
                                 const IndexerInputs& inputs) override;
  int32_t CountCached(const IndexerInputs& inputs) const override;
  bool Measures(const layers::PassContext& context) const override;
  void KeepGradients(const layers::PassContext& context,
                     const IndexerGradients& gradients) override;
  void AddGradients(const layers::PassContext& context, const at::Tensor& u_NU,
                    const at::Tensor& x_ND) override;

 private:
  // adaptive_ with the MLP's present weights.
  AdaptiveK Adaptive() const;

  layers::LayerStorage storage_;
  int64_t heads_;
  int64_t width_;
  kernels::indexer::Activation activation_;
  AdaptiveK adaptive_;
  float* vref_;  // null: not variance_causal
  std::array<double, 2> statistics_{};
  at::Tensor w_;  // from Project to KeepGradients
  // From KeepGradients to AddGradients.
  at::Tensor dq_;     // [N, HI dI] T
  at::Tensor dk_;     // [N, dI] T
  at::Tensor dw_;     // [N, HI] T, before the sigmoid
  at::Tensor dbeta_;  // [HI] S
};

}  // namespace heddle::attention
