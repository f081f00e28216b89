// Decoding of MLA in absorbed form (attention-and-moe.md section 8), and of DSA on MLA: a cache row
// is the latent and the rotated key part, dc + dr values whatever the number of heads. Quantised,
// the latent has a scale per 128 values and the rotary part stays as it is (section 10).
#include <ATen/ops/empty.h>

#include <optional>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/dsa_indexer.h"
#include "model/attention/mla_absorbed.h"
#include "model/inference/decode_attention.h"

namespace heddle::inference {
namespace {

constexpr int64_t kScaleTile = 128;

class MlaCache : public SequenceCache {
 public:
  MlaCache(const attention::MlaShape& shape, int64_t index_width, at::ScalarType type,
           const CacheQuantization& quantization)
      : rows({1, shape.latent + shape.rotary, kScaleTile, shape.rotary}, type),
        shape_(shape),
        type_(type),
        quantization_(quantization) {
    if (index_width > 0) index.emplace(RowShape{1, index_width}, type);
  }

  void Reserve(int64_t count) override {
    rows.Reserve(count);
    if (index.has_value()) index->Reserve(count);
  }
  void Append(const layers::CacheRows& from, int64_t begin, int64_t end) override {
    const int64_t count = end - begin;
    if (index.has_value()) {
      index->Write(length, from.index_k.narrow(0, begin, count).unsqueeze(1));
    }
    if (!rows.quantized() && quantization_.Due(length + count)) {
      rows.Quantize(quantization_.quantization, /*exact=*/0, length);
    }
    const at::Tensor joined = at::empty({count, 1, shape_.latent + shape_.rotary}, type_);
    joined.squeeze(1).narrow(1, 0, shape_.latent).copy_(from.latent.narrow(0, begin, count));
    joined.squeeze(1)
        .narrow(1, shape_.latent, shape_.rotary)
        .copy_(from.rotary_k.narrow(0, begin, count));
    rows.Write(length, joined);
    length += count;
  }
  int64_t bytes() const override {
    return rows.BytesOf(length) + (index.has_value() ? index->BytesOf(length) : 0);
  }
  int64_t allocated_bytes() const override {
    return rows.allocated_bytes() + (index.has_value() ? index->allocated_bytes() : 0);
  }

  int64_t length = 0;
  RowStore rows;                  // [c; kr]
  std::optional<RowStore> index;  // never quantised

 private:
  attention::MlaShape shape_;
  at::ScalarType type_;
  CacheQuantization quantization_;
};

class DecodeMla : public DecodeAttention {
 public:
  DecodeMla(const DecodeLayerContext& context, const layers::LayerStorage& storage)
      : shared_(context.shared),
        quantization_(context.quantization),
        type_(storage.type),
        mla_(*context.config, storage, context.ropes) {
    const heddle::v1::ModelConfig& config = *context.config;
    if (model::LayerKind(config, storage.layer) != heddle::v1::ATTENTION_KIND_DSA) return;
    indexer_ = std::make_unique<attention::DsaIndexer>(
        config, storage, context.ropes, mla_.shape().rotary, &context.shared->training);
    if (indexer_->has_weights()) index_width_ = config.attention().dsa().d_indexer();
  }

  std::unique_ptr<SequenceCache> MakeCache() const override {
    return std::make_unique<MlaCache>(mla_.shape(), index_width_, type_, quantization_);
  }
  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;

 private:
  const MlaCache& CacheOf(size_t row) const { return *static_cast<const MlaCache*>(caches()[row]); }
  void Select(const attention::IndexRows& rows) const;
  // z [H, C] of one token whose row is stored; `index` null: all rows.
  void Attend(const layers::PassContext& context, const at::Tensor& query_HL, const MlaCache& cache,
              const std::vector<int32_t>* index, const at::Tensor& z_HC) const;

  DecodeShared* shared_;
  CacheQuantization quantization_;
  at::ScalarType type_;
  attention::AbsorbedMla mla_;
  std::unique_ptr<attention::DsaIndexer> indexer_;  // null: plain MLA
  int64_t index_width_ = 0;
};

void DecodeMla::Select(const attention::IndexRows& rows) const {
  shared_->selected.clear();
  for (size_t b = 0; b < caches().size(); ++b) {
    const MlaCache& cache = CacheOf(b);
    const attention::CachedIndexKeys keys{cache.index->View(cache.length).squeeze(1)};
    shared_->selected.push_back(indexer_->SelectCached(rows, static_cast<int64_t>(b), keys));
  }
}

void DecodeMla::Attend(const layers::PassContext& context, const at::Tensor& query,
                       const MlaCache& cache, const std::vector<int32_t>* index,
                       const at::Tensor& z) const {
  const int64_t count = index == nullptr ? cache.length : static_cast<int64_t>(index->size());
  shared_->attended_keys += count;
  if (index == nullptr && !cache.rows.quantized()) {
    mla_.Attend(query, cache.rows.View(cache.length).squeeze(1), z);
    return;
  }
  const size_t mark = context.scratch->Mark();
  const at::ScalarType wide = layers::StatisticsType(type_);
  const at::Tensor rows = context.scratch->Take({count, 1, mla_.row_width()}, wide);
  if (index == nullptr) {
    cache.rows.ReadFirst(rows);
  } else {
    cache.rows.Read(*index, rows);
  }
  const at::Tensor wide_query = context.scratch->Take({query.size(0), query.size(1)}, wide);
  wide_query.copy_(query);
  mla_.Attend(wide_query, rows.squeeze(1), z);
  context.scratch->Release(mark);
}

void DecodeMla::Forward(const layers::PassContext& context, const at::Tensor& h,
                        const at::Tensor& residual, const at::Tensor& out) {
  const size_t n = static_cast<size_t>(h.size(0));
  HEDDLE_CHECK(caches().size() == n, "one cache per row");
  const std::span<const int32_t> positions = context.documents->positions;
  const size_t mark = context.scratch->Mark();
  const attention::AbsorbedMla::Tokens tokens = mla_.Project(h, positions, context.scratch);
  layers::CacheRows cache_rows;
  cache_rows.latent = tokens.latent_BC;
  cache_rows.rotary_k = tokens.rotary_BR;
  attention::IndexRows index_rows;
  if (index_width_ > 0) {
    index_rows = indexer_->Project(positions, tokens.indexer_u_BU, h, context.scratch);
    cache_rows.index_k = index_rows.key_NI;
  }
  AppendRows(cache_rows);
  if (index_width_ > 0) Select(index_rows);
  HEDDLE_CHECK(indexer_ == nullptr || shared_->selected.size() == n,
               "no layer selects before this");
  const at::Tensor z =
      context.scratch->Take({h.size(0), mla_.shape().heads, mla_.shape().latent}, h.scalar_type());
  for (size_t b = 0; b < n; ++b) {
    const int64_t row = static_cast<int64_t>(b);
    Attend(context, tokens.query_BHL[row], CacheOf(b),
           indexer_ == nullptr ? nullptr : &shared_->selected[b], z[row]);
  }
  mla_.Output(z, residual, context.scratch, out);
  context.scratch->Release(mark);
}

}  // namespace

std::unique_ptr<DecodeAttention> MakeDecodeMla(const DecodeLayerContext& context,
                                               const layers::LayerStorage& storage) {
  return std::make_unique<DecodeMla>(context, storage);
}

}  // namespace heddle::inference
