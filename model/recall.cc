#include "model/recall.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/attention_stack.h"
#include "model/attention/indexed_layer.h"
#include "model/attention/sparse_attention.h"
#include "model/block.h"
#include "model/layers/layers.h"
#include "model/packed_batch.h"
#include "model/store_views.h"

namespace heddle::model {
namespace {

using attention::IndexedLayer;
using attention::KeySets;

// Random sets of the sizes of `sets`, ascending.
KeySets RandomSets(const KeySets& sets, const layers::Documents& documents, uint64_t seed,
                   int layer) {
  KeySets random = sets;
  RngCursor rng(Rng(seed, "recall").Child(static_cast<uint64_t>(layer)));
  std::vector<int32_t> visible;
  for (size_t t = 0; t < documents.positions.size(); ++t) {
    const int32_t row = static_cast<int32_t>(t);
    const int32_t first = row - documents.positions[t];
    visible.resize(static_cast<size_t>(row - first + 1));
    std::iota(visible.begin(), visible.end(), first);
    const int64_t begin = sets.offsets[t];
    const int64_t count = sets.offsets[t + 1] - begin;
    for (int64_t i = 0; i < count; ++i) {  // the first `count` of a Fisher-Yates shuffle
      const uint64_t left = visible.size() - static_cast<size_t>(i);
      std::swap(visible[static_cast<size_t>(i)],
                visible[static_cast<size_t>(i) + static_cast<size_t>(rng.Below(left))]);
      random.first[static_cast<size_t>(begin + i)] = visible[static_cast<size_t>(i)];
    }
    std::sort(random.first.begin() + begin, random.first.begin() + begin + count);
  }
  return random;
}

// Runs a layer as it is and measures its selection on the way.
class RecallProbe : public layers::Sublayer {
 public:
  RecallProbe(IndexedLayer* layer, int index, uint64_t seed, std::vector<LayerRecall>* found)
      : layer_(layer), index_(index), seed_(seed), found_(found) {}

  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override {
    layers::PassContext selecting = context;
    selecting.pass = layers::Pass::kSelect;  // keeps the selection
    layer_->Forward(selecting, h, residual, out);
    Measure(context, h);
  }
  void Backward(const layers::PassContext&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&) override {
    HEDDLE_CHECK(false, "a probe only runs forward");
  }

 private:
  void Measure(const layers::PassContext& context, const at::Tensor& h) {
    const attention::Selection* selection = layer_->selection();
    if (selection == nullptr || selection->dense) return;
    const layers::Documents& documents = *context.documents;
    const attention::IndexedRows rows = layer_->Project(documents.positions, h, context.scratch);
    const auto lse = [&](const KeySets& sets) {
      const at::Tensor out = at::empty_like(rows.q_NHD, at::MemoryFormat::Contiguous);
      const at::Tensor lse_NH = at::empty({rows.q_NHD.size(0), rows.q_NHD.size(1)},
                                          layers::StatisticsType(h.scalar_type()));
      attention::SparseAttention(layer_->scale(), sets, rows.q_NHD, rows.k_NJD, rows.v_NJD, out,
                                 lse_NH);
      return lse_NH.to(at::kDouble);
    };
    const at::Tensor all = lse(attention::CausalSets(documents));
    const at::Tensor chosen = lse(selection->sets);
    const at::Tensor drawn = lse(RandomSets(selection->sets, documents, seed_, index_));
    Add(documents, selection->sets, all, chosen, drawn);
  }

  // exp(lse over a set - lse over all) is the set's share of the mass.
  void Add(const layers::Documents& documents, const KeySets& sets, const at::Tensor& all,
           const at::Tensor& chosen, const at::Tensor& drawn) {
    LayerRecall sum;
    sum.layer = index_;
    const int64_t heads = all.size(1);
    for (int64_t t = 0; t < all.size(0); ++t) {
      const size_t row = static_cast<size_t>(t);
      const int64_t count = sets.offsets[row + 1] - sets.offsets[row];
      if (count > documents.positions[row]) continue;
      ++sum.rows;
      sum.keys += static_cast<double>(count);
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = t * heads + head;
        const double total = all.data_ptr<double>()[at];
        sum.recall += std::exp(chosen.data_ptr<double>()[at] - total);
        sum.random += std::exp(drawn.data_ptr<double>()[at] - total);
      }
    }
    if (sum.rows == 0) return;
    const double pairs = static_cast<double>(sum.rows * heads);
    sum.keys /= static_cast<double>(sum.rows);
    sum.recall /= pairs;
    sum.random /= pairs;
    found_->push_back(sum);
  }

  IndexedLayer* layer_;
  int index_;
  uint64_t seed_;
  std::vector<LayerRecall>* found_;
};

}  // namespace

StatusOr<std::vector<LayerRecall>> MeasureRecall(const heddle::v1::ModelConfig& config,
                                                 ParameterStore* store, const PackedBatch& packed,
                                                 uint64_t seed) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config.vocab_size()));
  const c10::InferenceMode no_graph;
  const std::vector<layers::LayerStorage> storages = StoragesOf(*store);
  attention::AttentionStack stack(config, storages);
  layers::BufferPool kept;
  layers::BufferPool scratch;
  layers::Documents documents;
  documents.cu_seqlens = batch.cu_seqlens;
  documents.positions = batch.positions;
  documents.longest = batch.longest_document;
  stack.Begin(documents);
  layers::PassContext context;
  context.documents = &documents;
  context.kept = &kept;
  context.scratch = &scratch;
  const int64_t n = documents.rows();
  const at::ScalarType type = ComputeType(store->precision());
  at::Tensor x = at::empty({n, config.d_model()}, type);
  at::Tensor y = at::empty({n, config.d_model()}, type);
  layers::Embed(ModelStorage(*store).Weight("model.embed_tokens.weight"), batch.ids, x);
  std::vector<LayerRecall> found;
  bool indexed = false;
  for (const layers::LayerStorage& storage : storages) {
    kept.Release(0);
    scratch.Release(0);
    Block block(config, storage);
    block.feed_forward()->Begin(documents);
    layers::Sublayer* attention = stack.layer(storage.layer);
    auto* with_indexer = dynamic_cast<IndexedLayer*>(attention);
    indexed = indexed || with_indexer != nullptr;
    RecallProbe probe(with_indexer, storage.layer, seed, &found);
    block.Forward(context, with_indexer != nullptr ? &probe : attention, x, y);
    std::swap(x, y);
  }
  if (!indexed)
    return FailedPrecondition(
        "no layer has an indexer over grouped queries (DSA on MLA is not measured)");
  if (found.empty()) {
    return FailedPrecondition("no row sees more keys than it selects: give longer documents");
  }
  return found;
}

}  // namespace heddle::model
