#include "model/attention/indexed_layer.h"

#include <cmath>
#include <utility>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/set_attention.h"
#include "model/attention/sparse_attention.h"
#include "model/layers/layers.h"

namespace heddle::attention {
namespace {

double ScaleOf(const heddle::v1::ModelConfig& config, layers::RopeSet* ropes) {
  const int64_t width = model::HeadsOf(config).dim;
  return ropes->Tables(width).frequencies().softmax_scale_factor /
         std::sqrt(static_cast<double>(width));
}

}  // namespace

IndexedLayer::IndexedLayer(const heddle::v1::ModelConfig& config,
                           const layers::LayerStorage& storage, layers::RopeSet* ropes, Parts parts)
    : projection_(config, storage, ropes),
      parts_(std::move(parts)),
      o_weight_(storage.Weight("self_attn.o_proj.weight")),
      o_gradient_(storage.Gradient("self_attn.o_proj.weight")),
      scale_(ScaleOf(config, ropes)) {}

at::Tensor IndexedLayer::ByHead(const at::Tensor& o) const {
  return o.view({o.size(0), projection_.heads().query, projection_.heads().dim});
}

void IndexedLayer::ProjectRows(std::span<const int32_t> positions, const at::Tensor& h,
                               layers::BufferPool* pool) {
  const int64_t n = h.size(0);
  const at::ScalarType type = h.scalar_type();
  const model::Heads& heads = projection_.heads();
  qkv_ = pool->Take({n, projection_.columns()}, type);
  projection_.Project(h, qkv_);
  projection_.Rotate(positions, /*inverse=*/false, qkv_);
  v_ = SplitHeads(heads, qkv_).v;
  if (parts_.value_gate.has_value()) {
    value_z_ = pool->Take({n, parts_.value_gate->columns()}, type);
    parts_.value_gate->Logits(h, value_z_);
    const at::Tensor gated = pool->Take({n, heads.kv, heads.dim}, type);
    parts_.value_gate->Apply(value_z_, v_, gated);
    v_ = gated;
  }
  if (parts_.output_gate.has_value()) {
    output_z_ = pool->Take({n, parts_.output_gate->columns()}, type);
    parts_.output_gate->Logits(h, output_z_);
  }
}

IndexedLayer::Branch IndexedLayer::Attention(const layers::PassContext& context,
                                             const KeySets& sets) const {
  const int64_t n = qkv_.size(0);
  const model::Heads& heads = projection_.heads();
  const HeadViews views = SplitHeads(heads, qkv_);
  Branch branch;
  branch.o = context.kept->Take({n, heads.query, heads.dim}, qkv_.scalar_type());
  branch.lse = context.kept->Take({n, heads.query}, layers::StatisticsType(qkv_.scalar_type()));
  SetAttention(scale_, sets, SameRows(*context.documents), views.q, views.k, v_, branch.o,
               branch.lse);
  return branch;
}

bool IndexedLayer::SkipsSelection(const layers::PassContext& context) const {
  return parts_.dense_share == 1 && !parts_.indexer->Trains(context) &&
         context.cache_rows == nullptr && parts_.indexer->statistics().empty();
}

void IndexedLayer::Forward(const layers::PassContext& context, const at::Tensor& h,
                           const at::Tensor& residual, const at::Tensor& out) {
  if (h.size(0) == 0) return;
  const size_t mark = context.scratch->Mark();
  ProjectRows(context.documents->positions, h, context.kept);
  const HeadViews heads = SplitHeads(projection_.heads(), qkv_);
  if (context.cache_rows != nullptr) {
    context.cache_rows->k = heads.k;
    context.cache_rows->v = v_;
  }
  sparse_.reset();
  dense_.reset();
  sparse_share_ = 0;
  if (!SkipsSelection(context)) {
    const std::shared_ptr<const Selection> selection = parts_.indexer->Select(context, h, h);
    if (context.pass != layers::Pass::kInference) selection_ = selection;
    sparse_ = Attention(context, selection->sets);
    parts_.indexer->Train(context, *selection, {heads.q, heads.k, sparse_->lse, scale_});
    sparse_share_ = selection->dense ? 1 : 1 - parts_.dense_share;
  }
  if (sparse_share_ != 1) dense_ = Attention(context, CausalSets(*context.documents));
  if (out.defined()) {
    at::Tensor o = Blend(context.scratch);
    if (parts_.output_gate.has_value()) {
      const at::Tensor gated =
          context.scratch->Take({o.size(0), o.size(1), o.size(2)}, o.scalar_type());
      parts_.output_gate->Apply(output_z_, o, gated);
      o = gated;
    }
    layers::LinearAdd(residual, o.view({o.size(0), -1}), o_weight_, out);
  }
  context.scratch->Release(mark);
}

at::Tensor IndexedLayer::Blend(layers::BufferPool* pool) const {
  if (sparse_share_ == 1) return sparse_->o;
  if (sparse_share_ == 0) return dense_->o;
  const at::Tensor& dense = dense_->o;
  at::Tensor o = pool->Take({dense.size(0), dense.size(1), dense.size(2)}, dense.scalar_type());
  o.copy_(dense).mul_(1 - sparse_share_).add_(sparse_->o, sparse_share_);
  return o;
}

void IndexedLayer::AttentionBackward(const layers::PassContext& context, const KeySets& sets,
                                     const Branch& branch, const at::Tensor& d_o,
                                     const HeadViews& d_heads) {
  const HeadViews heads = SplitHeads(projection_.heads(), qkv_);
  SetAttentionBackward(scale_, sets, SameRows(*context.documents), heads.q, heads.k, v_, branch.o,
                       branch.lse, d_o, d_heads.q, d_heads.k, d_heads.v);
}

void IndexedLayer::Backward(const layers::PassContext& context, const at::Tensor& h,
                            const at::Tensor& gradient, const at::Tensor& dh) {
  const int64_t n = h.size(0);
  if (n == 0) return;
  const at::ScalarType type = h.scalar_type();
  const size_t mark = context.scratch->Mark();
  at::Tensor o = Blend(context.scratch);
  const at::Tensor d_o = ByHead(context.scratch->Take({n, o_weight_.size(1)}, type));
  layers::LinearInputGradient(gradient, o_weight_, d_o.view({n, -1}));
  if (parts_.output_gate.has_value()) {
    const at::Tensor gated = ByHead(context.scratch->Take({n, o_weight_.size(1)}, type));
    parts_.output_gate->Apply(output_z_, o, gated);
    layers::LinearWeightGradient(gradient, gated.view({n, -1}), o_gradient_);
    parts_.output_gate->ApplyBackward(output_z_, o, d_o, d_o);
  } else {
    layers::LinearWeightGradient(gradient, o.view({n, -1}), o_gradient_);
  }

  const at::Tensor dqkv = context.scratch->Take({n, projection_.columns()}, type);
  const HeadViews d_heads = SplitHeads(projection_.heads(), dqkv);
  if (dense_.has_value()) {
    const KeySets causal = CausalSets(*context.documents);
    if (sparse_share_ == 0) {
      AttentionBackward(context, causal, *dense_, d_o, d_heads);
    } else {
      const at::Tensor part = context.scratch->Take({n, projection_.columns()}, type);
      const at::Tensor share = ByHead(context.scratch->Take({n, o_weight_.size(1)}, type));
      share.copy_(d_o).mul_(1 - sparse_share_);
      AttentionBackward(context, causal, *dense_, share, d_heads);
      share.copy_(d_o).mul_(sparse_share_);
      AttentionBackward(context, selection_->sets, *sparse_, share,
                        SplitHeads(projection_.heads(), part));
      dqkv.add_(part);
    }
  } else {
    AttentionBackward(context, selection_->sets, *sparse_, d_o, d_heads);
  }

  if (parts_.value_gate.has_value()) {
    parts_.value_gate->ApplyBackward(value_z_, SplitHeads(projection_.heads(), qkv_).v, d_heads.v,
                                     d_heads.v);
  }
  projection_.Rotate(context.documents->positions, /*inverse=*/true, dqkv);
  projection_.Backward(h, dqkv, dh);
  if (parts_.value_gate.has_value()) parts_.value_gate->LogitsBackward(h, value_z_, dh);
  if (parts_.output_gate.has_value()) parts_.output_gate->LogitsBackward(h, output_z_, dh);
  parts_.indexer->Backward(context, h, h);
  context.scratch->Release(mark);
}

IndexedRows IndexedLayer::Project(std::span<const int32_t> positions, const at::Tensor& h,
                                  layers::BufferPool* pool) {
  ProjectRows(positions, h, pool);
  const HeadViews heads = SplitHeads(projection_.heads(), qkv_);
  IndexedRows rows{heads.q, heads.k, v_, at::Tensor(), {}};
  if (parts_.output_gate.has_value()) rows.output_z_NG = output_z_;
  if (parts_.indexer->has_weights()) rows.index = parts_.indexer->Project(positions, h, h, pool);
  return rows;
}

void IndexedLayer::Attend(const IndexedRows& rows, int64_t row, const IndexedCache& cache,
                          const std::vector<int32_t>& selected, const at::Tensor& o) const {
  KeySets sets;
  sets.offsets = {0, static_cast<int64_t>(selected.size())};
  sets.first = selected;
  sets.end = {static_cast<int32_t>(cache.k_TJD.size(0))};
  const at::Tensor lse = o.new_empty({1, o.size(1)}, layers::StatisticsType(o.scalar_type()));
  const at::Tensor q = rows.q_NHD.narrow(0, row, 1);
  if (parts_.dense_share == 0 || static_cast<int64_t>(selected.size()) == cache.k_TJD.size(0)) {
    SparseAttention(scale_, sets, q, cache.k_TJD, cache.v_TJD, o, lse);
    return;
  }
  const at::Tensor sparse = o.new_empty(o.sizes());
  SparseAttention(scale_, sets, q, cache.k_TJD, cache.v_TJD, sparse, lse);
  sets.width = sets.end.front();
  sets.first = {0};
  sets.offsets = {0, 1};
  SparseAttention(scale_, sets, q, cache.k_TJD, cache.v_TJD, o, lse);
  o.mul_(parts_.dense_share).add_(sparse, 1 - parts_.dense_share);
}

void IndexedLayer::Output(const IndexedRows& rows, const at::Tensor& o, const at::Tensor& residual,
                          const at::Tensor& out) const {
  if (parts_.output_gate.has_value()) parts_.output_gate->Apply(rows.output_z_NG, o, o);
  layers::LinearAdd(residual, o.view({o.size(0), -1}), o_weight_, out);
}

}  // namespace heddle::attention
