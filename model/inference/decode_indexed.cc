// Decoding of GSA, and of DSA with grouped queries (attention-and-moe.md 6.4, 7.4): every cached
// index key is scored, the selected keys and values are read. Values are cached behind their gate.
// Layers that share a selection cache no index keys.
#include <optional>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/dsa_layer.h"
#include "model/attention/gsa_layer.h"
#include "model/inference/decode_attention.h"
#include "model/inference/decode_sparse.h"

namespace heddle::inference {
namespace {

class IndexedCache : public SequenceCache {
 public:
  // index_width 0: no index keys.
  IndexedCache(const KvCacheShape& shape, int64_t index_width, at::ScalarType type,
               const CacheQuantization& quantization)
      : kv(shape, type, quantization) {
    if (index_width > 0) index.emplace(RowShape{1, index_width}, type);
  }

  void Reserve(int64_t length) override {
    kv.Reserve(length);
    if (index.has_value()) index->Reserve(length);
  }
  void Append(const layers::CacheRows& rows, int64_t begin, int64_t end) override {
    if (index.has_value()) {
      index->Write(kv.length(), rows.index_k.narrow(0, begin, end - begin).unsqueeze(1));
    }
    kv.Append(rows.k.narrow(0, begin, end - begin), rows.v.narrow(0, begin, end - begin));
  }
  int64_t bytes() const override {
    return kv.bytes() + (index.has_value() ? index->BytesOf(kv.length()) : 0);
  }
  int64_t allocated_bytes() const override {
    return kv.allocated_bytes() + (index.has_value() ? index->allocated_bytes() : 0);
  }

  KvCache kv;
  std::optional<RowStore> index;  // never quantised
};

class DecodeIndexed : public DecodeAttention {
 public:
  DecodeIndexed(const DecodeLayerContext& context, const layers::LayerStorage& storage)
      : shared_(context.shared), quantization_(context.quantization), type_(storage.type) {
    const heddle::v1::ModelConfig& config = *context.config;
    const bool gsa = model::LayerKind(config, storage.layer) == heddle::v1::ATTENTION_KIND_GSA;
    layer_ = gsa ? attention::MakeGsa(config, storage, context.ropes)
                 : attention::MakeDsa(config, storage, context.ropes, &context.shared->training);
    shares_ = !gsa;
    const model::Heads heads = model::HeadsOf(config);
    shape_ = {heads.kv, heads.dim, heads.dim};
    if (layer_->indexer().has_weights()) {
      index_width_ =
          gsa ? config.attention().gsa().d_indexer() : config.attention().dsa().d_indexer();
    }
  }

  std::unique_ptr<SequenceCache> MakeCache() const override {
    return std::make_unique<IndexedCache>(shape_, index_width_, type_, quantization_);
  }
  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;

 private:
  const IndexedCache& CacheOf(size_t row) const {
    return *static_cast<const IndexedCache*>(caches()[row]);
  }
  // The keys of each row, by the layer's own indexer.
  std::vector<std::vector<int32_t>> Select(const attention::IndexedRows& rows) const;
  // [B, H, D] S, of scratch: over the rows of `index` by query, or over all (null).
  at::Tensor Attend(const layers::PassContext& context, const at::Tensor& q,
                    const std::vector<std::vector<int32_t>>* index) const;

  DecodeShared* shared_;
  bool shares_ = false;
  CacheQuantization quantization_;
  at::ScalarType type_;
  std::unique_ptr<attention::IndexedLayer> layer_;
  KvCacheShape shape_;
  int64_t index_width_ = 0;
};

std::vector<std::vector<int32_t>> DecodeIndexed::Select(const attention::IndexedRows& rows) const {
  std::vector<std::vector<int32_t>> selected;
  for (size_t b = 0; b < caches().size(); ++b) {
    const IndexedCache& cache = CacheOf(b);
    const attention::CachedIndexKeys keys{cache.index->View(cache.kv.length()).squeeze(1)};
    selected.push_back(layer_->indexer().SelectCached(rows.index, static_cast<int64_t>(b), keys));
  }
  return selected;
}

at::Tensor DecodeIndexed::Attend(const layers::PassContext& context, const at::Tensor& q,
                                 const std::vector<std::vector<int32_t>>* index) const {
  std::vector<RowsOf> rows;
  for (size_t b = 0; b < caches().size(); ++b) {
    rows.push_back({&CacheOf(b).kv, index == nullptr ? nullptr : &(*index)[b]});
  }
  const at::Tensor o = context.scratch->Take({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const at::Tensor lse = context.scratch->Take({q.size(0), q.size(1)}, q.scalar_type());
  const GatheredRows gathered = Gather(rows, q.scalar_type(), context.scratch);
  shared_->attended_keys += gathered.k_MJD.size(0) * gathered.k_MJD.size(1);
  AttendGathered(layer_->scale(), WholeStretches(gathered), q, gathered.k_MJD, gathered.v_MJE, o,
                 lse);
  return o;
}

void DecodeIndexed::Forward(const layers::PassContext& context, const at::Tensor& h,
                            const at::Tensor& residual, const at::Tensor& out) {
  const size_t n = static_cast<size_t>(h.size(0));
  HEDDLE_CHECK(caches().size() == n, "one cache per row");
  const size_t mark = context.scratch->Mark();
  const attention::IndexedRows rows =
      layer_->Project(context.documents->positions, h, context.scratch);
  layers::CacheRows cache_rows;
  cache_rows.k = rows.k_NJD;
  cache_rows.v = rows.v_NJD;
  cache_rows.index_k = rows.index.key_NI;
  AppendRows(cache_rows);
  const at::Tensor q = WidenQuery(rows.q_NHD, context.scratch);
  const double dense_share = layer_->dense_share();
  at::Tensor attended;
  if (dense_share < 1) {
    // GSA selects for itself; of DSA's layers one may select for those after it.
    std::vector<std::vector<int32_t>> own;
    if (index_width_ > 0) (shares_ ? shared_->selected : own) = Select(rows);
    const std::vector<std::vector<int32_t>>& selected = shares_ ? shared_->selected : own;
    HEDDLE_CHECK(selected.size() == n, "no layer selects before this");
    attended = Attend(context, q, &selected);
  }
  if (dense_share > 0) {
    const at::Tensor dense = Attend(context, q, nullptr);
    attended = dense_share == 1 ? dense : attended.mul_(1 - dense_share).add_(dense, dense_share);
  }
  const at::Tensor o = context.scratch->Take({q.size(0), q.size(1), q.size(2)}, type_);
  o.copy_(attended);
  layer_->Output(rows, o, residual, out);
  context.scratch->Release(mark);
}

}  // namespace

std::unique_ptr<DecodeAttention> MakeDecodeIndexed(const DecodeLayerContext& context,
                                                   const layers::LayerStorage& storage) {
  return std::make_unique<DecodeIndexed>(context, storage);
}

}  // namespace heddle::inference
