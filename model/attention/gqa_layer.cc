#include "model/attention/gqa_layer.h"

#include <ATen/ops/sum.h>

#include "heddle/v1/config.pb.h"
#include "model/layers/layers.h"

namespace heddle::attention {

HeadViews SplitHeads(const model::Heads& heads, const at::Tensor& qkv) {
  const int64_t rows = qkv.size(0);
  const int64_t total = heads.query + 2 * heads.kv;
  const at::Tensor by_head = qkv.view({rows, total, heads.dim});
  return {by_head.narrow(1, 0, heads.query), by_head.narrow(1, heads.query, heads.kv),
          by_head.narrow(1, heads.query + heads.kv, heads.kv)};
}

QkvProjection::QkvProjection(const heddle::v1::ModelConfig& config,
                             const layers::LayerStorage& storage, layers::RopeSet* ropes)
    : heads_(model::HeadsOf(config)), rope_(&ropes->Tables(heads_.dim)) {
  const int64_t columns = (heads_.query + 2 * heads_.kv) * heads_.dim;
  weight_CD_ = storage.JoinedWeight("self_attn.q_proj.weight", columns);
  weight_gradient_CD_ = storage.JoinedGradient("self_attn.q_proj.weight", columns);
  if (storage.Has("self_attn.q_proj.bias")) {
    bias_C_ = storage.JoinedWeight("self_attn.q_proj.bias", columns);
    bias_gradient_C_ = storage.JoinedGradient("self_attn.q_proj.bias", columns);
  }
}

void QkvProjection::Project(const at::Tensor& h, const at::Tensor& qkv) const {
  layers::Linear(h, weight_CD_, qkv);
  if (bias_C_.defined()) qkv.add_(bias_C_);
}

void QkvProjection::Rotate(std::span<const int32_t> positions, bool inverse,
                           const at::Tensor& qkv) const {
  layers::ApplyRope(*rope_, {heads_.query + heads_.kv, heads_.dim, inverse, positions}, qkv);
}

void QkvProjection::Backward(const at::Tensor& h, const at::Tensor& dqkv,
                             const at::Tensor& dh) const {
  layers::LinearInputGradient(dqkv, weight_CD_, dh);
  layers::LinearWeightGradient(dqkv, h, weight_gradient_CD_);
  if (bias_C_.defined()) {
    bias_gradient_C_.add_(at::sum(dqkv, {0}, /*keepdim=*/false, bias_gradient_C_.scalar_type()));
  }
}

namespace {

class GqaLayer : public layers::Sublayer {
 public:
  GqaLayer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
           layers::RopeSet* ropes, AttentionCore* core)
      : projection_(config, storage, ropes),
        core_(core),
        o_weight_(storage.Weight("self_attn.o_proj.weight")),
        o_gradient_(storage.Gradient("self_attn.o_proj.weight")) {}

  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;
  void Backward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override;

 private:
  at::Tensor ByHead(const at::Tensor& o) const {
    return o.view({o.size(0), projection_.heads().query, projection_.heads().dim});
  }

  QkvProjection projection_;
  AttentionCore* core_;
  at::Tensor o_weight_;
  at::Tensor o_gradient_;
  // Of the last forward that keeps.
  at::Tensor qkv_;  // rotated
  at::Tensor o_;
  Saved saved_;
};

void GqaLayer::Forward(const layers::PassContext& context, const at::Tensor& h,
                       const at::Tensor& residual, const at::Tensor& out) {
  const int64_t n = h.size(0);
  qkv_ = context.kept->Take({n, projection_.columns()}, h.scalar_type());
  o_ = context.kept->Take({n, o_weight_.size(1)}, h.scalar_type());
  projection_.Project(h, qkv_);
  projection_.Rotate(context.documents->positions, /*inverse=*/false, qkv_);
  const HeadViews heads = SplitHeads(projection_.heads(), qkv_);
  core_->Forward(heads.q, heads.k, heads.v, ByHead(o_),
                 layers::Keeps(context.pass) ? &saved_ : nullptr);
  if (context.cache_rows != nullptr) {
    context.cache_rows->k = heads.k;
    context.cache_rows->v = heads.v;
  }
  if (out.defined()) layers::LinearAdd(residual, o_, o_weight_, out);
}

void GqaLayer::Backward(const layers::PassContext& context, const at::Tensor& h,
                        const at::Tensor& gradient, const at::Tensor& dh) {
  const int64_t n = h.size(0);
  const size_t mark = context.scratch->Mark();
  const at::Tensor d_o = context.scratch->Take({n, o_weight_.size(1)}, h.scalar_type());
  const at::Tensor dqkv = context.scratch->Take({n, projection_.columns()}, h.scalar_type());
  layers::LinearInputGradient(gradient, o_weight_, d_o);
  layers::LinearWeightGradient(gradient, o_, o_gradient_);
  const HeadViews heads = SplitHeads(projection_.heads(), qkv_);
  const HeadViews d_heads = SplitHeads(projection_.heads(), dqkv);
  core_->Backward(heads.q, heads.k, heads.v, ByHead(o_), saved_, ByHead(d_o), d_heads.q, d_heads.k,
                  d_heads.v);
  projection_.Rotate(context.documents->positions, /*inverse=*/true, dqkv);
  projection_.Backward(h, dqkv, dh);
  context.scratch->Release(mark);
}

}  // namespace

std::unique_ptr<layers::Sublayer> MakeGqa(const heddle::v1::ModelConfig& config,
                                          const layers::LayerStorage& storage,
                                          layers::RopeSet* ropes, AttentionCore* core) {
  return std::make_unique<GqaLayer>(config, storage, ropes, core);
}

}  // namespace heddle::attention
