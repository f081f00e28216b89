#include "model/recall.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/attention_stack.h"
#include "model/attention/indexed_layer.h"
#include "model/attention/mla_layer.h"
#include "model/attention/sparse_attention.h"
#include "model/block.h"
#include "model/layers/layers.h"
#include "model/model_plan.h"
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

// The heads of a layer and the keys that they were given.
using Heads = attention::MlaAttended;

// Runs a layer as it is and measures its selection on the way.
class RecallProbe : public layers::Sublayer {
 public:
  RecallProbe(layers::Sublayer* layer, int index, uint64_t seed, std::vector<LayerRecall>* found)
      : layer_(layer), index_(index), seed_(seed), found_(found) {}

  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override {
    layers::PassContext selecting = context;
    if (auto* grouped = dynamic_cast<IndexedLayer*>(layer_)) {
      selecting.pass = layers::Pass::kSelect;  // keeps the selection
      grouped->Forward(selecting, h, residual, out);
      const attention::IndexedRows rows =
          grouped->Project(context.documents->positions, h, context.scratch);
      Measure(*context.documents,
              {rows.q_NHD, rows.k_NJD, rows.v_NJD, grouped->scale(), grouped->selection()});
    } else {
      selecting.pass = layers::Pass::kTrain;  // keeps the heads, which are made from the latent
      layer_->Forward(selecting, h, residual, out);
      Measure(*context.documents, dynamic_cast<attention::MlaSublayer&>(*layer_).attended());
    }
  }
  void Backward(const layers::PassContext&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&) override {
    HEDDLE_CHECK(false, "a probe only runs forward");
  }

 private:
  void Measure(const layers::Documents& documents, const Heads& heads) {
    if (heads.selection == nullptr || heads.selection->dense) return;
    const KeySets& sets = heads.selection->sets;
    const at::Tensor& q = heads.q_NHK;
    const at::Tensor out = at::empty({q.size(0), q.size(1), heads.v_NHE.size(2)}, q.options());
    const auto lse = [&](const KeySets& keys) {
      const at::Tensor lse_NH =
          at::empty({q.size(0), q.size(1)}, layers::StatisticsType(q.scalar_type()));
      attention::SparseAttention(heads.scale, keys, q, heads.k_NHK, heads.v_NHE, out, lse_NH);
      return lse_NH.to(at::kDouble);
    };
    Add(documents, sets, lse(attention::CausalSets(documents)), lse(sets),
        lse(RandomSets(sets, documents, seed_, index_)));
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

  layers::Sublayer* layer_;
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
    const heddle::v1::AttentionKind kind = LayerKind(config, storage.layer);
    const bool selects =
        kind == heddle::v1::ATTENTION_KIND_DSA || kind == heddle::v1::ATTENTION_KIND_GSA;
    indexed = indexed || selects;
    RecallProbe probe(attention, storage.layer, seed, &found);
    block.Forward(context, selects ? &probe : attention, x, y);
    std::swap(x, y);
  }
  if (!indexed) return FailedPrecondition("no layer attends to the selection of an indexer");
  if (found.empty()) {
    return FailedPrecondition("no row sees more keys than it selects: give longer documents");
  }
  return found;
}

}  // namespace heddle::model
