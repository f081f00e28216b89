#include "model/attention/nsa_layer.h"

#include <utility>

#include "base/status/status.h"
#include "model/attention/conversion.h"
#include "model/attention/set_attention.h"
#include "model/layers/layers.h"

namespace heddle::attention {
namespace {

using layers::BufferPool;

// Weights, or gradients through the same names.
template <typename View>
NsaParameters ViewParameters(const NsaShape& shape, const View& view) {
  NsaParameters p;
  if (shape.separate) {
    p.slc = {view("k_proj_slc.weight"), view("v_proj_slc.weight")};
    p.win = {view("k_proj_win.weight"), view("v_proj_win.weight")};
  }
  if (shape.compression.type != CompressType::kAveragePool) {
    p.k_compress.weight = view("compress.k_weight");
    p.v_compress.weight = view("compress.v_weight");
  }
  p.k_compress.pe = view("compress.k_pe");
  p.gate_GD = view("gate_proj.weight");
  p.o_DC = view("o_proj.weight");
  return p;
}

at::Tensor ByHead(const at::Tensor& rows_NC, int64_t heads) {
  return rows_NC.view({rows_NC.size(0), heads, rows_NC.size(1) / heads});
}
at::Tensor Flat(const at::Tensor& rows_NHD) {
  return rows_NHD.view({rows_NHD.size(0), rows_NHD.size(1) * rows_NHD.size(2)});
}

at::Tensor TakeHeads(int64_t rows, int64_t heads, int64_t dim, at::ScalarType type,
                     BufferPool* pool) {
  return pool->Take({rows, heads, dim}, type);
}

void AddInPlace(const at::Tensor& sum, const at::Tensor& term) {
  at::Tensor to = sum;
  to.add_(term);
}

}  // namespace

NsaWeights::NsaWeights(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
                       layers::RopeSet* ropes)
    : shape_(NsaShapeOf(config)),
      rope_(&ropes->Tables(shape_.heads.dim)),
      qkv_(config, storage, ropes),
      weights_(ViewParameters(
          shape_, [&](const std::string& name) { return storage.Weight("self_attn." + name); })),
      gradients_(ViewParameters(
          shape_, [&](const std::string& name) { return storage.Gradient("self_attn." + name); })) {
}

void NsaWeights::Rotate(std::span<const int32_t> positions, int64_t heads, bool inverse,
                        const at::Tensor& rows) const {
  layers::ApplyRope(*rope_, {heads, shape_.heads.dim, inverse, positions}, rows);
}

NsaRows NsaWeights::Project(const at::Tensor& h, std::span<const int32_t> positions,
                            BufferPool* pool) const {
  const int64_t n = h.size(0);
  const model::Heads& heads = shape_.heads;
  const at::ScalarType type = h.scalar_type();
  NsaRows rows;
  rows.qkv_NC = pool->Take({n, qkv_.columns()}, type);
  qkv_.Project(h, rows.qkv_NC);
  const HeadViews views = SplitHeads(heads, rows.qkv_NC);
  rows.q = views.q;
  rows.raw_v = views.v;
  if (shape_.separate) {
    rows.raw_k = views.k;
    Rotate(positions, heads.query, /*inverse=*/false, rows.qkv_NC);
    const auto project = [&](const at::Tensor& weight, bool rotated) {
      const at::Tensor out = pool->Take({n, heads.kv * heads.dim}, type);
      layers::Linear(h, weight, out);
      if (rotated) Rotate(positions, heads.kv, /*inverse=*/false, out);
      return ByHead(out, heads.kv);
    };
    rows.k = project(weights_.slc.k_KD, /*rotated=*/true);
    rows.v = project(weights_.slc.v_KD, /*rotated=*/false);
    rows.window_k = project(weights_.win.k_KD, /*rotated=*/true);
    rows.window_v = project(weights_.win.v_KD, /*rotated=*/false);
  } else {
    rows.raw_k = TakeHeads(n, heads.kv, heads.dim, type, pool);
    rows.raw_k.copy_(views.k);
    Rotate(positions, heads.query + heads.kv, /*inverse=*/false, rows.qkv_NC);
    rows.k = rows.window_k = views.k;
    rows.v = rows.window_v = views.v;
  }
  rows.gate_logits = pool->Take({n, kNsaBranches * heads.query}, type);
  layers::Linear(h, weights_.gate_GD, rows.gate_logits);
  return rows;
}

void NsaWeights::CompressRows(const CompressionWindows& windows, const at::Tensor& raw_k,
                              const at::Tensor& raw_v, BufferPool* pool, BufferPool* scratch,
                              at::Tensor* kc, at::Tensor* vc) const {
  const model::Heads& heads = shape_.heads;
  *kc = TakeHeads(windows.count(), heads.kv, heads.dim, raw_k.scalar_type(), pool);
  *vc = TakeHeads(windows.count(), heads.kv, heads.dim, raw_k.scalar_type(), pool);
  Compress(shape_.compression, windows, weights_.k_compress, raw_k, scratch, *kc);
  Compress(shape_.compression, windows, weights_.v_compress, raw_v, scratch, *vc);
  Rotate(windows.position, heads.kv, /*inverse=*/false, Flat(*kc));
}

void NsaWeights::Output(const at::Tensor& residual, const at::Tensor& o,
                        const at::Tensor& out) const {
  layers::LinearAdd(residual, o, weights_.o_DC, out);
}

namespace {

class NsaLayer : public layers::Sublayer {
 public:
  NsaLayer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
           layers::RopeSet* ropes)
      : weights_(config, storage, ropes) {}

  void Begin(const layers::Documents& documents) override;
  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;
  void Backward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override;

 private:
  // Gradients of what Project makes, before the rotations, of type S.
  struct RowGradients {
    at::Tensor qkv_NC;
    at::Tensor k, v;                // [N, J, D] kv: separate
    at::Tensor window_k, window_v;  // [N, J, D] kv: separate
  };
  // Where the backward of one branch writes, overwriting.
  struct BranchGradients {
    at::Tensor q, k, v;
  };

  const NsaShape& shape() const { return weights_.shape(); }
  int64_t rows() const { return geometry_.queries.count(); }

  void BranchBackward(int64_t branch, const at::Tensor& d_o, const BranchGradients& gradients,
                      BufferPool* scratch) const;
  RowGradients AttentionBackward(const at::Tensor& d_o, BufferPool* scratch) const;
  void TokensBackward(const at::Tensor& d_o, const RowGradients& rows, BufferPool* scratch) const;
  void CompressedBackward(const at::Tensor& d_o, const RowGradients& rows,
                          BufferPool* scratch) const;
  void ProjectionBackward(const at::Tensor& h, const RowGradients& rows, const at::Tensor& dlogits,
                          BufferPool* scratch, const at::Tensor& dh) const;

  NsaWeights weights_;
  // Of the micro-batch.
  CompressionWindows windows_;
  NsaGeometry geometry_;
  KeyDocuments token_documents_;
  KeyDocuments window_documents_;
  // Of the last forward; its tensors only if the pass keeps. The selection also serves kRecompute.
  NsaRows rows_;
  NsaKeys keys_;
  NsaAttended attended_;
  SelectedBlocks selected_;
  at::Tensor o_;
};

void NsaLayer::Begin(const layers::Documents& documents) {
  windows_ = WindowsOf(shape().compression, documents);
  geometry_ = GeometryOf(shape(), QueriesOf(documents, windows_));
  token_documents_ = SameRows(documents);
  window_documents_ = RowsOf(documents.cu_seqlens, windows_.documents);
  selected_ = SelectedBlocks();
}

void NsaLayer::Forward(const layers::PassContext& context, const at::Tensor& h,
                       const at::Tensor& residual, const at::Tensor& out) {
  HEDDLE_CHECK(h.size(0) == rows(), "Begin knows other documents");
  BufferPool* kept = context.kept;
  rows_ = weights_.Project(h, context.documents->positions, kept);
  keys_ = {.k = rows_.k, .v = rows_.v, .window_k = rows_.window_k, .window_v = rows_.window_v};
  weights_.CompressRows(windows_, rows_.raw_k, rows_.raw_v, kept, context.scratch, &keys_.kc,
                        &keys_.vc);
  attended_ = TakeAttended(shape(), h.size(0), h.scalar_type(), kept);
  AttendCompressed(shape(), geometry_, rows_.q, keys_, attended_);
  if (context.pass != layers::Pass::kRecompute) {
    selected_ = SelectBlocks(shape(), geometry_.queries, rows_.q, keys_.kc, attended_.lse[0],
                             context.scratch);
    if (layers::Counts(context.pass) && context.counts != nullptr) {
      context.counts->nan_rows += selected_.nan_rows;
    }
  }
  AttendTokens(shape(), geometry_, selected_.sets, token_documents_, rows_.q, keys_, attended_);
  o_ = kept->Take({h.size(0), weights_.weights().o_DC.size(1)}, h.scalar_type());
  CombineBranches(rows_.gate_logits, attended_.out, o_);
  if (context.cache_rows != nullptr) {
    context.cache_rows->k = rows_.k;
    context.cache_rows->v = rows_.v;
    context.cache_rows->raw_k = rows_.raw_k;
    if (shape().separate) {
      context.cache_rows->raw_v = rows_.raw_v;
      context.cache_rows->window_k = rows_.window_k;
      context.cache_rows->window_v = rows_.window_v;
    }
  }
  if (out.defined()) weights_.Output(residual, o_, out);
}

void NsaLayer::Backward(const layers::PassContext& context, const at::Tensor& h,
                        const at::Tensor& gradient, const at::Tensor& dh) {
  BufferPool* scratch = context.scratch;
  const size_t mark = scratch->Mark();
  const at::Tensor d_o = scratch->Take({h.size(0), o_.size(1)}, h.scalar_type());
  const at::Tensor dlogits = scratch->Take({h.size(0), rows_.gate_logits.size(1)}, h.scalar_type());
  layers::LinearInputGradient(gradient, weights_.weights().o_DC, d_o);
  layers::LinearWeightGradient(gradient, o_, weights_.gradients().o_DC);
  GateGradients(rows_.gate_logits, attended_.out, d_o, dlogits);
  const RowGradients row_gradients = AttentionBackward(d_o, scratch);
  ProjectionBackward(h, row_gradients, dlogits, scratch, dh);
  scratch->Release(mark);
}

NsaLayer::RowGradients NsaLayer::AttentionBackward(const at::Tensor& d_o,
                                                   BufferPool* scratch) const {
  const at::ScalarType statistics = layers::StatisticsType(d_o.scalar_type());
  const model::Heads& heads = shape().heads;
  const auto take_kv = [&] { return TakeHeads(rows(), heads.kv, heads.dim, statistics, scratch); };
  RowGradients out;
  out.qkv_NC = scratch->Take({rows(), rows_.qkv_NC.size(1)}, statistics);
  if (shape().separate) {
    out.k = take_kv();
    out.v = take_kv();
    out.window_k = take_kv();
    out.window_v = take_kv();
    at::Tensor raw_kv = out.qkv_NC.narrow(1, heads.query * heads.dim, 2 * heads.kv * heads.dim);
    raw_kv.zero_();
  }
  TokensBackward(d_o, out, scratch);
  CompressedBackward(d_o, out, scratch);
  return out;
}

// The gradients are of S, so that the terms of a row are rounded once, after they are added.
void NsaLayer::BranchBackward(int64_t branch, const at::Tensor& d_o,
                              const BranchGradients& gradients, BufferPool* scratch) const {
  const size_t b = static_cast<size_t>(branch);
  const KeySets* const sets[] = {&geometry_.compressed, &selected_.sets, &geometry_.window};
  const at::Tensor keys[] = {keys_.kc, keys_.k, keys_.window_k};
  const at::Tensor values[] = {keys_.vc, keys_.v, keys_.window_v};
  const size_t mark = scratch->Mark();
  const at::Tensor dbranch =
      TakeHeads(rows(), shape().heads.query, shape().heads.dim, d_o.scalar_type(), scratch);
  BranchGradient(rows_.gate_logits, branch, d_o, dbranch);
  SetAttentionBackward(shape().selection.scale, *sets[b],
                       branch == 0 ? window_documents_ : token_documents_, rows_.q, keys[b],
                       values[b], attended_.out[b], attended_.lse[b], dbranch, gradients.q,
                       gradients.k, gradients.v);
  scratch->Release(mark);
}

// Window, then selection: dq, and dk and dv of their keys, rotated back. Overwrites q's part of
// `out`, and k's and v's if shared.
void NsaLayer::TokensBackward(const at::Tensor& d_o, const RowGradients& out,
                              BufferPool* scratch) const {
  const model::Heads& heads = shape().heads;
  const at::ScalarType statistics = layers::StatisticsType(d_o.scalar_type());
  const HeadViews sums = SplitHeads(heads, out.qkv_NC);
  const size_t mark = scratch->Mark();
  const at::Tensor dq = TakeHeads(rows(), heads.query, heads.dim, statistics, scratch);
  if (shape().separate) {
    BranchBackward(2, d_o, {sums.q, out.window_k, out.window_v}, scratch);
    BranchBackward(1, d_o, {dq, out.k, out.v}, scratch);
    for (const at::Tensor* keys : {&out.k, &out.window_k}) {
      weights_.Rotate(geometry_.queries.position, heads.kv, /*inverse=*/true, Flat(*keys));
    }
  } else {
    const at::Tensor dk = TakeHeads(rows(), heads.kv, heads.dim, statistics, scratch);
    const at::Tensor dv = TakeHeads(rows(), heads.kv, heads.dim, statistics, scratch);
    BranchBackward(2, d_o, {sums.q, sums.k, sums.v}, scratch);
    BranchBackward(1, d_o, {dq, dk, dv}, scratch);
    AddInPlace(sums.k, dk);
    AddInPlace(sums.v, dv);
  }
  AddInPlace(sums.q, dq);
  scratch->Release(mark);
}

// Adds dq, rotates the joined rows back, then adds the gradient of the raw keys and values.
void NsaLayer::CompressedBackward(const at::Tensor& d_o, const RowGradients& out,
                                  BufferPool* scratch) const {
  const model::Heads& heads = shape().heads;
  const at::ScalarType statistics = layers::StatisticsType(d_o.scalar_type());
  const HeadViews sums = SplitHeads(heads, out.qkv_NC);
  const NsaParameters& w = weights_.weights();
  const NsaParameters& dw = weights_.gradients();
  const size_t mark = scratch->Mark();
  const at::Tensor dq = TakeHeads(rows(), heads.query, heads.dim, statistics, scratch);
  const at::Tensor dkc = TakeHeads(windows_.count(), heads.kv, heads.dim, statistics, scratch);
  const at::Tensor dvc = TakeHeads(windows_.count(), heads.kv, heads.dim, statistics, scratch);
  BranchBackward(0, d_o, {dq, dkc, dvc}, scratch);
  AddInPlace(sums.q, dq);
  weights_.Rotate(geometry_.queries.position, heads.query + (shape().separate ? 0 : heads.kv),
                  /*inverse=*/true, out.qkv_NC);
  weights_.Rotate(windows_.position, heads.kv, /*inverse=*/true, Flat(dkc));
  CompressBackward(shape().compression, windows_, w.k_compress, rows_.raw_k, dkc, scratch, sums.k,
                   dw.k_compress);
  CompressBackward(shape().compression, windows_, w.v_compress, rows_.raw_v, dvc, scratch, sums.v,
                   dw.v_compress);
  scratch->Release(mark);
}

void NsaLayer::ProjectionBackward(const at::Tensor& h, const RowGradients& rows,
                                  const at::Tensor& dlogits, BufferPool* scratch,
                                  const at::Tensor& dh) const {
  const at::ScalarType type = h.scalar_type();
  const NsaParameters& w = weights_.weights();
  const NsaParameters& dw = weights_.gradients();
  weights_.qkv().Backward(h, Converted(rows.qkv_NC, type, scratch), dh);
  // dh += dy W, dW += dy^T h.
  const auto add = [&](const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dweight) {
    layers::LinearAdd(dh, dy, weight.t(), dh);
    layers::LinearWeightGradient(dy, h, dweight);
  };
  add(dlogits, w.gate_GD, dw.gate_GD);
  if (!shape().separate) return;
  const auto rounded = [&](const at::Tensor& dy_NJD) {
    return Converted(Flat(dy_NJD), type, scratch);
  };
  add(rounded(rows.k), w.slc.k_KD, dw.slc.k_KD);
  add(rounded(rows.v), w.slc.v_KD, dw.slc.v_KD);
  add(rounded(rows.window_k), w.win.k_KD, dw.win.k_KD);
  add(rounded(rows.window_v), w.win.v_KD, dw.win.v_KD);
}

}  // namespace

std::unique_ptr<layers::Sublayer> MakeNsa(const heddle::v1::ModelConfig& config,
                                          const layers::LayerStorage& storage,
                                          layers::RopeSet* ropes) {
  return std::make_unique<NsaLayer>(config, storage, ropes);
}

}  // namespace heddle::attention
