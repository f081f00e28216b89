#include "model/attention/mla_projection.h"

#include <cmath>
#include <functional>
#include <string>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/layers/layers.h"
#include "model/layers/rope.h"

namespace heddle::attention {
namespace {

using layers::BufferPool;
using layers::LayerStorage;

MlaTensors View(const MlaShape& shape, const LayerStorage& storage,
                const std::function<at::Tensor(const std::string&)>& view) {
  MlaTensors t;
  if (shape.query_latent > 0) {
    t.query_down = view("self_attn.q_a_proj.weight");
    t.query_norm = view("self_attn.q_a_layernorm.weight");
    t.query = view("self_attn.q_b_proj.weight");
  } else {
    t.query = view("self_attn.q_proj.weight");
  }
  const at::Tensor down = view("self_attn.kv_a_proj_with_mqa.weight");
  t.latent = down.narrow(0, 0, shape.latent);
  t.rotary = down.narrow(0, shape.latent, shape.rotary);
  t.latent_norm = view("self_attn.kv_a_layernorm.weight");
  if (storage.Has("self_attn.kv_a_layernorm.bias")) {
    t.latent_norm_bias = view("self_attn.kv_a_layernorm.bias");
  }
  t.kv = view("self_attn.kv_b_proj.weight");
  t.out = view("self_attn.o_proj.weight");
  return t;
}

// dx += dy W.
void AddInputGradient(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx) {
  layers::LinearAdd(dx, dy, weight.t(), dx);
}

}  // namespace

MlaShape MlaShapeOf(const heddle::v1::ModelConfig& config, const layers::RopeTables& tables) {
  const heddle::v1::MlaConfig& mla = config.attention().mla();
  MlaShape shape;
  shape.heads = config.n_heads();
  shape.nope = mla.qk_nope_head_dim();
  shape.rotary = mla.qk_rope_head_dim();
  shape.value = mla.v_head_dim();
  shape.latent = mla.kv_lora_rank();
  shape.query_latent = mla.q_lora_rank();
  shape.norm_eps = config.norm_eps();
  shape.scale =
      tables.frequencies().softmax_scale_factor / std::sqrt(static_cast<double>(shape.key()));
  return shape;
}

MlaTensors MlaWeights(const MlaShape& shape, const LayerStorage& storage) {
  return View(shape, storage, [&](const std::string& name) { return storage.Weight(name); });
}
MlaTensors MlaGradients(const MlaShape& shape, const LayerStorage& storage) {
  return View(shape, storage, [&](const std::string& name) { return storage.Gradient(name); });
}

MlaProjection::MlaProjection(const MlaShape& shape, MlaTensors weights,
                             const layers::RopeTables& tables)
    : shape_(shape), weights_(std::move(weights)), tables_(tables) {}

void MlaProjection::Rotate(const at::Tensor& q, const at::Tensor& kr,
                           std::span<const int32_t> positions, bool inverse) const {
  // The last dr columns of each head.
  const at::Tensor columns = q.view({q.size(0), shape_.query_columns()})
                                 .narrow(1, shape_.nope, shape_.query_columns() - shape_.nope);
  layers::RopeArgs args{shape_.heads, shape_.rotary, inverse, positions, shape_.key()};
  layers::ApplyRope(tables_, args, columns);
  args.heads = 1;
  layers::ApplyRope(tables_, args, kr);
}

MlaProjected MlaProjection::Forward(const at::Tensor& h, std::span<const int32_t> positions,
                                    BufferPool* pool, BufferPool* cached) const {
  const int64_t n = h.size(0);
  const at::ScalarType type = h.scalar_type();
  const at::ScalarType statistics = type == at::kDouble ? at::kDouble : at::kFloat;
  MlaProjected p;
  p.q_NHK = pool->Take({n, shape_.heads, shape_.key()}, type);
  const at::Tensor q = p.q_NHK.view({n, shape_.query_columns()});
  if (shape_.query_latent > 0) {
    p.query_down_NQ = pool->Take({n, shape_.query_latent}, type);
    p.query_rstd_N = pool->Take({n}, statistics);
    p.query_latent_NQ = pool->Take({n, shape_.query_latent}, type);
    layers::Linear(h, weights_.query_down, p.query_down_NQ);
    layers::RmsNorm(p.query_down_NQ, weights_.query_norm, shape_.norm_eps, p.query_latent_NQ,
                    p.query_rstd_N);
    layers::Linear(p.query_latent_NQ, weights_.query, q);
  } else {
    layers::Linear(h, weights_.query, q);
  }
  p.latent_down_NC = pool->Take({n, shape_.latent}, type);
  p.latent_rstd_N = pool->Take({n}, statistics);
  p.latent_NC = cached->Take({n, shape_.latent}, type);
  p.kr_NR = cached->Take({n, shape_.rotary}, type);
  layers::Linear(h, weights_.latent, p.latent_down_NC);
  layers::Linear(h, weights_.rotary, p.kr_NR);
  if (weights_.latent_norm_bias.defined()) {
    p.latent_mean_N = pool->Take({n}, statistics);
    layers::LayerNorm(p.latent_down_NC, weights_.latent_norm, weights_.latent_norm_bias,
                      shape_.norm_eps, p.latent_NC, p.latent_mean_N, p.latent_rstd_N);
  } else {
    layers::RmsNorm(p.latent_down_NC, weights_.latent_norm, shape_.norm_eps, p.latent_NC,
                    p.latent_rstd_N);
  }
  Rotate(p.q_NHK, p.kr_NR, positions, /*inverse=*/false);
  return p;
}

void MlaProjection::Backward(const MlaProjected& p, const at::Tensor& h,
                             std::span<const int32_t> positions, const Gradients& d,
                             const MlaTensors& gradients, BufferPool* scratch,
                             const at::Tensor& dh) const {
  const int64_t n = h.size(0);
  Rotate(d.dq_NHK, d.dkr_NR, positions, /*inverse=*/true);
  const at::Tensor dq = d.dq_NHK.view({n, shape_.query_columns()});
  if (shape_.query_latent > 0) {
    const size_t mark = scratch->Mark();
    const at::Tensor dlatent = scratch->Take({n, shape_.query_latent}, h.scalar_type());
    layers::LinearWeightGradient(dq, p.query_latent_NQ, gradients.query);
    layers::LinearInputGradient(dq, weights_.query, dlatent);
    layers::RmsNormBackward(p.query_down_NQ, weights_.query_norm, p.query_rstd_N, dlatent,
                            at::Tensor(), dlatent, gradients.query_norm);
    layers::LinearWeightGradient(dlatent, h, gradients.query_down);
    layers::LinearInputGradient(dlatent, weights_.query_down, dh);
    scratch->Release(mark);
  } else {
    layers::LinearWeightGradient(dq, h, gradients.query);
    layers::LinearInputGradient(dq, weights_.query, dh);
  }
  if (weights_.latent_norm_bias.defined()) {
    layers::LayerNormBackward(p.latent_down_NC, weights_.latent_norm, p.latent_mean_N,
                              p.latent_rstd_N, d.dlatent_NC, at::Tensor(), d.dlatent_NC,
                              gradients.latent_norm, gradients.latent_norm_bias);
  } else {
    layers::RmsNormBackward(p.latent_down_NC, weights_.latent_norm, p.latent_rstd_N, d.dlatent_NC,
                            at::Tensor(), d.dlatent_NC, gradients.latent_norm);
  }
  layers::LinearWeightGradient(d.dlatent_NC, h, gradients.latent);
  layers::LinearWeightGradient(d.dkr_NR, h, gradients.rotary);
  AddInputGradient(d.dlatent_NC, weights_.latent, dh);
  AddInputGradient(d.dkr_NR, weights_.rotary, dh);
}

}  // namespace heddle::attention
