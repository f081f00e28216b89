// The lightning indexer of DSA (attention-and-moe.md section 6.1), for a GQA or an MLA core:
//
//   qI = u WqI    kI = x WkI    w = x Ww         I[t,s] = sum_j w[t,j] relu(qI[t,j].kI[s])
//
// Profile v32: kI = LayerNorm(x WkI) (gain and bias, eps 1e-6), then RoPE in half layout on the
// first `rotary_dims` dims of qI and kI, w scaled by HI^-1/2 dI^-1/2. Profile seed: none of it.
// Tensors: self_attn.indexer.{q_proj,k_proj,weights_proj}.weight, v32 also k_norm.{weight,bias}.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "model/attention/token_indexer.h"
#include "model/layers/rope.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::attention {

class DsaIndexer final : public TokenIndexer {
 public:
  // rotary_dims (v32 only): even, at most dI; dI / 2 with a GQA core, qk_rope_head_dim with MLA; 0:
  // no rotation. `shared` may be null where index_share_every is 1. A storage without the indexer's
  // tensors is a layer that shares the selection of one before it.
  DsaIndexer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
             layers::RopeSet* ropes, int64_t rotary_dims, SharedSelection* shared);

  IndexRows Project(std::span<const int32_t> positions, const at::Tensor& u_NU,
                    const at::Tensor& x_ND, layers::BufferPool* pool) override;

 protected:
  std::vector<int32_t> CountKeys(const layers::PassContext& context,
                                 const IndexerInputs& inputs) override;
  int32_t CountCached(const IndexerInputs& inputs) const override;
  void KeepGradients(const layers::PassContext& context,
                     const IndexerGradients& gradients) override;
  void AddGradients(const layers::PassContext& context, const at::Tensor& u_NU,
                    const at::Tensor& x_ND) override;

 private:
  struct Matrix {
    at::Tensor weight;    // [out, in] T
    at::Tensor gradient;  // [out, in] S
  };
  static Matrix MatrixOf(const layers::LayerStorage& storage, const char* name);
  void Rotate(std::span<const int32_t> positions, int64_t heads, bool inverse,
              const at::Tensor& rows) const;

  int64_t heads_;
  int64_t width_;
  int32_t topk_;
  bool v32_;
  double weight_scale_ = 1;
  int64_t rotary_dims_;
  const layers::RopeTables* rope_ = nullptr;  // null: no rotation
  Matrix q_;
  Matrix k_;
  Matrix w_;
  Matrix norm_gain_;  // v32
  Matrix norm_bias_;

  // From Project to KeepGradients: k before its norm, in S, and the norm's reciprocal deviation.
  at::Tensor raw_k_;
  at::Tensor norm_rstd_;
  // From KeepGradients to AddGradients.
  at::Tensor dq_;          // [N, HI dI] T
  at::Tensor dk_;          // [N, dI] T
  at::Tensor dw_;          // [N, HI] T
  at::Tensor dnorm_gain_;  // [dI] S
  at::Tensor dnorm_bias_;
};

}  // namespace heddle::attention
