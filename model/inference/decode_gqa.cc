// Decoding of dense and sliding-window layers: every row of the cache is visible to the newest
// token, so attention needs no mask (kv_cache.h).
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>

#include <cmath>
#include <tuple>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/gqa_layer.h"
#include "model/inference/decode_attention.h"
#include "model/inference/decode_sparse.h"
#include "model/layers/layers.h"
#include "model/layers/products.h"

namespace heddle::inference {
namespace {

class GqaCache : public SequenceCache {
 public:
  GqaCache(const KvCacheShape& shape, at::ScalarType type, const CacheQuantization& quantization)
      : kv(shape, type, quantization) {}

  void Reserve(int64_t length) override { kv.Reserve(length); }
  void Append(const layers::CacheRows& rows, int64_t begin, int64_t end) override {
    kv.Append(rows.k.narrow(0, begin, end - begin), rows.v.narrow(0, begin, end - begin));
  }
  int64_t bytes() const override { return kv.bytes(); }
  int64_t allocated_bytes() const override { return kv.allocated_bytes(); }

  KvCache kv;
};

class DecodeGqa : public DecodeAttention {
 public:
  DecodeGqa(const DecodeLayerContext& context, const layers::LayerStorage& storage)
      : shared_(context.shared),
        projection_(*context.config, storage, context.ropes),
        o_weight_(storage.Weight("self_attn.o_proj.weight")),
        quantization_(context.quantization),
        type_(storage.type) {
    const model::Heads& heads = projection_.heads();
    scale_ = context.ropes->Tables(heads.dim).frequencies().softmax_scale_factor /
             std::sqrt(static_cast<double>(heads.dim));
    shape_ = {heads.kv, heads.dim, heads.dim};
    if (model::LayerKind(*context.config, storage.layer) == heddle::v1::ATTENTION_KIND_SWA) {
      const model::Window window = model::WindowOf(*context.config);
      shape_.window = window.keys;
      shape_.sinks = window.sinks;
    }
  }

  std::unique_ptr<SequenceCache> MakeCache() const override {
    return std::make_unique<GqaCache>(shape_, type_, quantization_);
  }
  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;

 private:
  // out[b] = attention of q[b] over the cache of row b; both [B, H, D].
  void Attend(const layers::PassContext& context, const at::Tensor& q, const at::Tensor& out) const;
  void AttendWide(const at::Tensor& q_1HD, const KvCache& cache, const at::Tensor& out_1HD) const;
  const KvCache& CacheOf(int64_t row) const {
    return static_cast<const GqaCache*>(caches()[static_cast<size_t>(row)])->kv;
  }

  DecodeShared* shared_;
  attention::QkvProjection projection_;
  at::Tensor o_weight_;
  CacheQuantization quantization_;
  at::ScalarType type_;
  double scale_ = 0;
  KvCacheShape shape_;
};

// Rows that are not quantised are attended to where they lie.
void DecodeGqa::AttendWide(const at::Tensor& q, const KvCache& cache, const at::Tensor& out) const {
  const auto batched = [](const at::Tensor& t) {
    return layers::Widened(t).unsqueeze(0).transpose(1, 2);
  };
  const at::Tensor o = std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
      batched(q), batched(cache.keys().View(cache.rows())),
      batched(cache.values().View(cache.rows())), /*dropout_p=*/0.0, /*is_causal=*/false,
      /*attn_mask=*/std::nullopt, scale_));
  out.copy_(o.transpose(1, 2).squeeze(0));
}

void DecodeGqa::Attend(const layers::PassContext& context, const at::Tensor& q,
                       const at::Tensor& out) const {
  std::vector<int64_t> rows;
  std::vector<RowsOf> quantized;
  for (int64_t b = 0; b < q.size(0); ++b) {
    shared_->attended_keys += CacheOf(b).rows() * shape_.kv_heads;
    if (CacheOf(b).quantized()) {
      rows.push_back(b);
      quantized.push_back({&CacheOf(b), nullptr});
    } else {
      AttendWide(q.narrow(0, b, 1), CacheOf(b), out.narrow(0, b, 1));
    }
  }
  if (rows.empty()) return;
  const size_t mark = context.scratch->Mark();
  const at::ScalarType wide = layers::StatisticsType(type_);
  const int64_t n = static_cast<int64_t>(rows.size());
  const GatheredRows gathered = Gather(quantized, wide, context.scratch);
  const at::Tensor query = context.scratch->Take({n, q.size(1), q.size(2)}, wide);
  const at::Tensor o = context.scratch->Take({n, q.size(1), q.size(2)}, wide);
  const at::Tensor lse = context.scratch->Take({n, q.size(1)}, wide);
  for (int64_t i = 0; i < n; ++i) query[i].copy_(q[rows[static_cast<size_t>(i)]]);
  AttendGathered(scale_, WholeStretches(gathered), query, gathered.k_MJD, gathered.v_MJE, o, lse);
  for (int64_t i = 0; i < n; ++i) out[rows[static_cast<size_t>(i)]].copy_(o[i]);
  context.scratch->Release(mark);
}

void DecodeGqa::Forward(const layers::PassContext& context, const at::Tensor& h,
                        const at::Tensor& residual, const at::Tensor& out) {
  const int64_t n = h.size(0);
  HEDDLE_CHECK(static_cast<int64_t>(caches().size()) == n, "one cache per row");
  const at::Tensor qkv = context.kept->Take({n, projection_.columns()}, h.scalar_type());
  const at::Tensor o = context.kept->Take({n, o_weight_.size(1)}, h.scalar_type());
  projection_.Project(h, qkv);
  projection_.Rotate(context.documents->positions, /*inverse=*/false, qkv);
  const attention::HeadViews heads = attention::SplitHeads(projection_.heads(), qkv);
  layers::CacheRows rows;
  rows.k = heads.k;
  rows.v = heads.v;
  AppendRows(rows);
  Attend(context, heads.q, o.view({n, projection_.heads().query, projection_.heads().dim}));
  layers::LinearAdd(residual, o, o_weight_, out);
}

}  // namespace

std::unique_ptr<DecodeAttention> MakeDecodeGqa(const DecodeLayerContext& context,
                                               const layers::LayerStorage& storage) {
  return std::make_unique<DecodeGqa>(context, storage);
}

}  // namespace heddle::inference
