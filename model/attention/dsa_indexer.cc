#include "model/attention/dsa_indexer.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/layers/layers.h"

namespace heddle::attention {
namespace {

constexpr double kNormEps = 1e-6;
constexpr char kQueryProjection[] = "self_attn.indexer.q_proj.weight";

TokenIndexerOptions OptionsOf(const heddle::v1::DsaConfig& dsa) {
  TokenIndexerOptions options;
  options.kl_weight = dsa.kl_weight();
  options.tie_break = dsa.tie_break() == heddle::v1::DsaConfig::TIE_BREAK_NEWEST
                          ? kernels::indexer::TieBreak::kNewest
                          : kernels::indexer::TieBreak::kOldest;
  options.least_count = dsa.topk();
  return options;
}

}  // namespace

DsaIndexer::DsaIndexer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
                       layers::RopeSet* ropes, int64_t rotary_dims, SharedSelection* shared)
    : TokenIndexer(OptionsOf(config.attention().dsa()), storage.Has(kQueryProjection), shared),
      heads_(config.attention().dsa().n_indexer_heads()),
      width_(config.attention().dsa().d_indexer()),
      topk_(config.attention().dsa().topk()),
      v32_(config.attention().dsa().profile() == heddle::v1::DsaConfig::PROFILE_V32),
      rotary_dims_(rotary_dims) {
  if (!has_weights()) return;
  q_ = MatrixOf(storage, kQueryProjection);
  k_ = MatrixOf(storage, "self_attn.indexer.k_proj.weight");
  w_ = MatrixOf(storage, "self_attn.indexer.weights_proj.weight");
  if (!v32_) return;
  weight_scale_ = 1.0 / std::sqrt(static_cast<double>(heads_ * width_));
  norm_gain_ = MatrixOf(storage, "self_attn.indexer.k_norm.weight");
  norm_bias_ = MatrixOf(storage, "self_attn.indexer.k_norm.bias");
  HEDDLE_CHECK(rotary_dims % 2 == 0 && rotary_dims <= width_, "rotary dims ", rotary_dims);
  if (rotary_dims > 0) rope_ = &ropes->HalfLayout(rotary_dims);
}

DsaIndexer::Matrix DsaIndexer::MatrixOf(const layers::LayerStorage& storage, const char* name) {
  return {storage.Weight(name), storage.Gradient(name)};
}

void DsaIndexer::Rotate(std::span<const int32_t> positions, int64_t heads, bool inverse,
                        const at::Tensor& rows) const {
  if (rope_ == nullptr) return;
  layers::RopeArgs args;
  args.heads = heads;
  args.head_dim = rotary_dims_;
  args.inverse = inverse;
  args.positions = positions;
  args.head_stride = width_;
  layers::ApplyRope(*rope_, args, rows);
}

IndexRows DsaIndexer::Project(std::span<const int32_t> positions, const at::Tensor& u,
                              const at::Tensor& x, layers::BufferPool* pool) {
  const int64_t n = x.size(0);
  const at::ScalarType type = x.scalar_type();
  const at::ScalarType statistics = layers::StatisticsType(type);
  const at::Tensor q_T = pool->Take({n, heads_ * width_}, type);
  const at::Tensor w_T = pool->Take({n, heads_}, type);
  at::Tensor key = pool->Take({n, width_}, type);
  layers::Linear(u, q_.weight, q_T);
  layers::LinearByRow(x, k_.weight, key);
  layers::Linear(x, w_.weight, w_T);
  const at::Tensor q = Widen(q_T, pool);
  const at::Tensor w = Widen(w_T, pool);
  at::Tensor k = Widen(key, pool);
  if (v32_) {
    raw_k_ = k;
    k = pool->Take({n, width_}, statistics);
    norm_rstd_ = pool->Take({n}, statistics);
    layers::LayerNorm(raw_k_, norm_gain_.weight.to(statistics), norm_bias_.weight.to(statistics),
                      kNormEps, k, norm_rstd_);
    Rotate(positions, heads_, /*inverse=*/false, q);
    Rotate(positions, 1, /*inverse=*/false, k);
    w.mul_(weight_scale_);
    key = ConvertTo(k, type, pool);
    k = Widen(key, pool);
  }
  IndexRows rows;
  rows.inputs.q_NHI = q.view({n, heads_, width_});
  rows.inputs.k_NI = k;
  rows.inputs.w_NH = w;
  rows.key_NI = key;
  return rows;
}

std::vector<int32_t> DsaIndexer::CountKeys(const layers::PassContext& context,
                                           const IndexerInputs& /*inputs*/) {
  std::vector<int32_t> counts;
  counts.reserve(context.documents->positions.size());
  for (const int32_t position : context.documents->positions) {
    counts.push_back(std::min(position + 1, topk_));
  }
  return counts;
}

int32_t DsaIndexer::CountCached(const IndexerInputs& inputs) const {
  return std::min(static_cast<int32_t>(inputs.k_NI.size(0)), topk_);
}

void DsaIndexer::KeepGradients(const layers::PassContext& context,
                               const IndexerGradients& gradients) {
  const at::ScalarType type = q_.weight.scalar_type();
  const int64_t n = gradients.dk_NI.size(0);
  const at::Tensor dq = gradients.dq_NHI.view({n, heads_ * width_});
  at::Tensor dk = gradients.dk_NI;
  if (v32_) {
    const std::span<const int32_t> positions = context.documents->positions;
    Rotate(positions, heads_, /*inverse=*/true, dq);
    Rotate(positions, 1, /*inverse=*/true, dk);
    gradients.dw_NH.mul_(weight_scale_);
    dnorm_gain_ = at::zeros({width_}, dk.options());
    dnorm_bias_ = at::zeros({width_}, dk.options());
    layers::LayerNormBackward(raw_k_, norm_gain_.weight.to(dk.scalar_type()), norm_rstd_, dk,
                              at::Tensor(), dk, dnorm_gain_, dnorm_bias_);
  }
  const auto keep = [&](const at::Tensor& gradient) {
    at::Tensor kept = context.kept->Take({n, gradient.size(1)}, type);
    kept.copy_(gradient);
    return kept;
  };
  dq_ = keep(dq);
  dk_ = keep(dk);
  dw_ = keep(gradients.dw_NH);
}

void DsaIndexer::AddGradients(const layers::PassContext& /*context*/, const at::Tensor& u,
                              const at::Tensor& x) {
  layers::LinearWeightGradient(dq_, u, q_.gradient);
  layers::LinearWeightGradient(dk_, x, k_.gradient);
  layers::LinearWeightGradient(dw_, x, w_.gradient);
  if (!v32_) return;
  norm_gain_.gradient.add_(dnorm_gain_);
  norm_bias_.gradient.add_(dnorm_bias_);
}

}  // namespace heddle::attention
