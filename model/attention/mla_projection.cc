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

constexpr char kQueryNorm[] = "self_attn.q_a_layernorm";
constexpr char kLatentNorm[] = "self_attn.kv_a_layernorm";

MlaMatrices View(const MlaShape& shape, const std::function<at::Tensor(const std::string&)>& view) {
  MlaMatrices m;
  if (shape.query_latent > 0) {
    m.query_down = view("self_attn.q_a_proj.weight");
    m.query = view("self_attn.q_b_proj.weight");
  } else {
    m.query = view("self_attn.q_proj.weight");
  }
  const at::Tensor down = view("self_attn.kv_a_proj_with_mqa.weight");
  m.latent = down.narrow(0, 0, shape.latent);
  m.rotary = down.narrow(0, shape.latent, shape.rotary);
  m.kv = view("self_attn.kv_b_proj.weight");
  m.out = view("self_attn.o_proj.weight");
  return m;
}

layers::NormKind LatentNormKind(const heddle::v1::ModelConfig& config) {
  return config.attention().mla().latent_norm() == heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM
             ? layers::NormKind::kLayer
             : layers::NormKind::kRms;
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

MlaProjection::MlaProjection(const heddle::v1::ModelConfig& config, const LayerStorage& storage,
                             layers::RopeSet* ropes)
    : tables_(ropes->Tables(config.attention().mla().qk_rope_head_dim())),
      shape_(MlaShapeOf(config, tables_)),
      weights_(View(shape_, [&](const std::string& name) { return storage.Weight(name); })),
      gradients_(View(shape_, [&](const std::string& name) { return storage.Gradient(name); })),
      latent_norm_(LatentNormKind(config), shape_.norm_eps, storage, kLatentNorm) {
  if (shape_.query_latent > 0) {
    query_norm_.emplace(layers::NormKind::kRms, shape_.norm_eps, storage, kQueryNorm);
  }
}

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
    query_norm_->Forward(p.query_down_NQ, p.query_latent_NQ, p.query_rstd_N);
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
  latent_norm_.Forward(p.latent_down_NC, p.latent_NC, p.latent_rstd_N);
  Rotate(p.q_NHK, p.kr_NR, positions, /*inverse=*/false);
  return p;
}

void MlaProjection::Backward(const MlaProjected& p, const at::Tensor& h,
                             std::span<const int32_t> positions, const Gradients& d,
                             BufferPool* scratch, const at::Tensor& dh) const {
  const int64_t n = h.size(0);
  Rotate(d.dq_NHK, d.dkr_NR, positions, /*inverse=*/true);
  const at::Tensor dq = d.dq_NHK.view({n, shape_.query_columns()});
  if (shape_.query_latent > 0) {
    const size_t mark = scratch->Mark();
    const at::Tensor dlatent = scratch->Take({n, shape_.query_latent}, h.scalar_type());
    layers::LinearWeightGradient(dq, p.query_latent_NQ, gradients_.query);
    layers::LinearInputGradient(dq, weights_.query, dlatent);
    query_norm_->Backward(p.query_down_NQ, p.query_rstd_N, dlatent, at::Tensor(), dlatent);
    layers::LinearWeightGradient(dlatent, h, gradients_.query_down);
    layers::LinearInputGradient(dlatent, weights_.query_down, dh);
    scratch->Release(mark);
  } else {
    layers::LinearWeightGradient(dq, h, gradients_.query);
    layers::LinearInputGradient(dq, weights_.query, dh);
  }
  latent_norm_.Backward(p.latent_down_NC, p.latent_rstd_N, d.dlatent_NC, at::Tensor(),
                        d.dlatent_NC);
  layers::LinearWeightGradient(d.dlatent_NC, h, gradients_.latent);
  layers::LinearWeightGradient(d.dkr_NR, h, gradients_.rotary);
  AddInputGradient(d.dlatent_NC, weights_.latent, dh);
  AddInputGradient(d.dkr_NR, weights_.rotary, dh);
}

}  // namespace heddle::attention
