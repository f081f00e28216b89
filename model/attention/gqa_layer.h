// Attention on grouped queries, keys and values without parameters of its own beside the
// projections: dense and sliding window (attention-and-moe.md sections 2 and 4).
//
//   qkv = h Wqkv (+ bias), q and k rotated     o = core(q, k, v)     out = residual + o Wo
#pragma once

#include <memory>

#include "model/attention/attention.h"
#include "model/layers/rope.h"
#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::attention {

// Views of a joined projection [N, (H + 2 J) D].
struct HeadViews {
  at::Tensor q;  // [N, H, D]
  at::Tensor k;  // [N, J, D]
  at::Tensor v;  // [N, J, D]
};
HeadViews SplitHeads(const model::Heads& heads, const at::Tensor& qkv_NC);

// The joined projection of q, k, v as dense, swa, nsa, dsa and gsa have it: weights, optional
// biases, rotation of q and k.
class QkvProjection {
 public:
  QkvProjection(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
                layers::RopeSet* ropes);

  int64_t columns() const { return weight_CD_.size(0); }
  const model::Heads& heads() const { return heads_; }
  // qkv [N, C] = h W^T (+ bias), not rotated.
  void Project(const at::Tensor& h_ND, const at::Tensor& qkv_NC) const;
  // q and k of each row, in place.
  void Rotate(std::span<const int32_t> positions, bool inverse, const at::Tensor& qkv_NC) const;
  // dqkv is dL/d(projection before the rotation). Overwrites dh.
  void Backward(const at::Tensor& h_ND, const at::Tensor& dqkv_NC, const at::Tensor& dh_ND) const;

 private:
  model::Heads heads_;
  const layers::RopeTables* rope_;
  at::Tensor weight_CD_;
  at::Tensor weight_gradient_CD_;
  at::Tensor bias_C_;  // undefined: none
  at::Tensor bias_gradient_C_;
};

// `core` is shared by the layers of its kind and outlives the layer; its Begin is the caller's.
std::unique_ptr<layers::Sublayer> MakeGqa(const heddle::v1::ModelConfig& config,
                                          const layers::LayerStorage& storage,
                                          layers::RopeSet* ropes, AttentionCore* core);

}  // namespace heddle::attention
