#include "model/block.h"

#include <ATen/ops/from_blob.h>

#include "heddle/v1/config.pb.h"
#include "model/layers/layers.h"

namespace heddle::model {
namespace {

at::ScalarType StatisticsType(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// One matrix of tensors that lie end to end, the first being `name` (ModelPlan invariant 2).
at::Tensor ViewJoined(const ModelPlan& plan, const std::string& name, int64_t rows, void* flat,
                      at::ScalarType type) {
  const TensorSpec* spec = plan.Find(name);
  HEDDLE_CHECK(spec != nullptr, name);
  char* data =
      static_cast<char*>(flat) + spec->offset * static_cast<int64_t>(c10::elementSize(type));
  return at::from_blob(data, {rows, spec->shape[1]}, at::TensorOptions().dtype(type));
}

layers::RopeArgs RopeArgsOf(const BlockContext& context, bool inverse) {
  return {context.heads.query + context.heads.kv, context.heads.dim, inverse, *context.positions};
}

}  // namespace

at::Tensor ViewTensor(const ModelPlan& plan, const std::string& name, void* flat,
                      at::ScalarType type) {
  const TensorSpec* spec = plan.Find(name);
  HEDDLE_CHECK(spec != nullptr, name);
  char* data =
      static_cast<char*>(flat) + spec->offset * static_cast<int64_t>(c10::elementSize(type));
  return at::from_blob(data, spec->shape, at::TensorOptions().dtype(type));
}

Status CheckBlocks(const heddle::v1::ModelConfig& config) {
  using heddle::v1::ModelConfig;
  bool known = config.ffn() == ModelConfig::FFN_SWIGLU &&
               config.norm() == ModelConfig::NORM_RMSNORM && config.moe().n_experts() == 0 &&
               !config.attention().qkv_bias();
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    const heddle::v1::AttentionKind kind = LayerKind(config, layer);
    known = known &&
            (kind == heddle::v1::ATTENTION_KIND_DENSE || kind == heddle::v1::ATTENTION_KIND_SWA);
  }
  return known ? OkStatus()
               : InvalidArgument(
                     "model: blocks of dense and swa attention with swiglu and rmsnorm "
                     "are all that is composed here");
}

BlockTensors ViewBlock(const ModelPlan& plan, int layer, void* flat, at::ScalarType type) {
  const std::string prefix = Str("model.layers.", layer, ".");
  const auto rows = [&](const char* name) { return plan.Find(prefix + name)->shape[0]; };
  const int64_t qkv_rows = rows("self_attn.q_proj.weight") + 2 * rows("self_attn.k_proj.weight");
  BlockTensors t;
  t.input_norm_D = ViewTensor(plan, prefix + "input_layernorm.weight", flat, type);
  t.qkv_CD = ViewJoined(plan, prefix + "self_attn.q_proj.weight", qkv_rows, flat, type);
  t.o_DHd = ViewTensor(plan, prefix + "self_attn.o_proj.weight", flat, type);
  t.post_norm_D = ViewTensor(plan, prefix + "post_attention_layernorm.weight", flat, type);
  t.gate_up_2FD = ViewJoined(plan, prefix + "mlp.gate_proj.weight",
                             2 * rows("mlp.gate_proj.weight"), flat, type);
  t.down_DF = ViewTensor(plan, prefix + "mlp.down_proj.weight", flat, type);
  return t;
}

HeadViews SplitHeads(const Heads& heads, const at::Tensor& qkv) {
  const int64_t rows = qkv.size(0);
  const int64_t total = heads.query + 2 * heads.kv;
  const at::Tensor by_head = qkv.view({rows, total, heads.dim});
  return {by_head.narrow(1, 0, heads.query), by_head.narrow(1, heads.query, heads.kv),
          by_head.narrow(1, heads.query + heads.kv, heads.kv)};
}

void BlockForward(const BlockTensors& w, const BlockContext& context, const at::Tensor& x,
                  const at::Tensor& y, bool keep, layers::BufferPool* pool, BlockSaved* s) {
  const int64_t n = x.size(0);
  const int64_t d = x.size(1);
  const at::ScalarType type = x.scalar_type();
  const at::ScalarType statistics = StatisticsType(type);
  s->x = x;
  s->h1 = pool->Take({n, d}, type);
  s->rstd1 = pool->Take({n}, statistics);
  s->qkv = pool->Take({n, w.qkv_CD.size(0)}, type);
  s->o = pool->Take({n, w.o_DHd.size(1)}, type);
  s->x2 = pool->Take({n, d}, type);
  s->h2 = pool->Take({n, d}, type);
  s->rstd2 = pool->Take({n}, statistics);
  s->gate_up = pool->Take({n, w.gate_up_2FD.size(0)}, type);

  layers::RmsNorm(x, w.input_norm_D, context.norm_eps, s->h1, s->rstd1);
  layers::Linear(s->h1, w.qkv_CD, s->qkv);
  layers::ApplyRope(*context.rope, RopeArgsOf(context, /*inverse=*/false), s->qkv);
  const HeadViews heads = SplitHeads(context.heads, s->qkv);
  const at::Tensor o = s->o.view({n, context.heads.query, context.heads.dim});
  context.core->Forward(heads.q, heads.k, heads.v, o, keep ? &s->attention : nullptr);
  layers::LinearAdd(x, s->o, w.o_DHd, s->x2);

  layers::RmsNorm(s->x2, w.post_norm_D, context.norm_eps, s->h2, s->rstd2);
  layers::Linear(s->h2, w.gate_up_2FD, s->gate_up);
  if (!y.defined()) return;
  const size_t mark = pool->Mark();
  const at::Tensor hidden = pool->Take({n, w.down_DF.size(1)}, type);
  layers::Swiglu(s->gate_up, hidden);
  layers::LinearAdd(s->x2, hidden, w.down_DF, y);
  pool->Release(mark);
}

void BlockBackward(const BlockTensors& w, const BlockTensors& dw, const BlockContext& context,
                   BlockSaved* s, layers::BufferPool* scratch, const at::Tensor& gradient) {
  const int64_t n = gradient.size(0);
  const int64_t d = gradient.size(1);
  const at::ScalarType type = gradient.scalar_type();
  const size_t mark = scratch->Mark();
  const at::Tensor dh = scratch->Take({n, d}, type);
  {
    const at::Tensor hidden = scratch->Take({n, w.down_DF.size(1)}, type);
    layers::LinearInputGradient(gradient, w.down_DF, hidden);
    layers::SwigluBackward(s->gate_up, hidden);  // hidden is the forward's value again
    layers::LinearWeightGradient(gradient, hidden, dw.down_DF);
    layers::LinearInputGradient(s->gate_up, w.gate_up_2FD, dh);
    layers::LinearWeightGradient(s->gate_up, s->h2, dw.gate_up_2FD);
  }
  layers::RmsNormBackward(s->x2, w.post_norm_D, s->rstd2, dh, gradient, gradient, dw.post_norm_D);

  const at::Tensor d_o = scratch->Take({n, w.o_DHd.size(1)}, type);
  const at::Tensor dqkv = scratch->Take({n, w.qkv_CD.size(0)}, type);
  layers::LinearInputGradient(gradient, w.o_DHd, d_o);
  layers::LinearWeightGradient(gradient, s->o, dw.o_DHd);
  const HeadViews heads = SplitHeads(context.heads, s->qkv);
  const HeadViews d_heads = SplitHeads(context.heads, dqkv);
  const auto by_head = [&](const at::Tensor& t) {
    return t.view({n, context.heads.query, context.heads.dim});
  };
  context.core->Backward(heads.q, heads.k, heads.v, by_head(s->o), s->attention, by_head(d_o),
                         d_heads.q, d_heads.k, d_heads.v);
  layers::ApplyRope(*context.rope, RopeArgsOf(context, /*inverse=*/true), dqkv);
  layers::LinearInputGradient(dqkv, w.qkv_CD, dh);
  layers::LinearWeightGradient(dqkv, s->h1, dw.qkv_CD);
  layers::RmsNormBackward(s->x, w.input_norm_D, s->rstd1, dh, gradient, gradient, dw.input_norm_D);
  scratch->Release(mark);
}

}  // namespace heddle::model
