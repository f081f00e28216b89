// Layers of DSA and GSA for tests: configurations, their tensors, and decoding token by token.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "model/attention/dsa_layer.h"
#include "model/attention/gsa_layer.h"
#include "tests/model/attention/layer_harness.h"

namespace heddle::model_test {

// Odd sizes on purpose: no width is a multiple of the vector length.
inline heddle::v1::ModelConfig GqaConfig(int64_t d_model = 10) {
  heddle::v1::ModelConfig config = SmallModel(d_model);
  config.set_n_heads(4);
  config.set_n_kv_heads(2);
  config.set_head_dim(6);
  return config;
}

inline heddle::v1::ModelConfig DsaConfig(heddle::v1::DsaConfig::Profile profile, int32_t topk,
                                         int64_t d_model = 10) {
  heddle::v1::ModelConfig config = GqaConfig(d_model);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  heddle::v1::DsaConfig* dsa = attention->mutable_dsa();
  dsa->set_n_indexer_heads(3);
  dsa->set_d_indexer(8);
  dsa->set_topk(topk);
  dsa->set_profile(profile);
  return config;
}

// Adaptive k of 3 .. 7 about a base of 5.
inline heddle::v1::ModelConfig GsaConfig(int64_t d_model = 10) {
  heddle::v1::ModelConfig config = GqaConfig(d_model);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->set_kind(heddle::v1::ATTENTION_KIND_GSA);
  heddle::v1::GsaConfig* gsa = attention->mutable_gsa();
  gsa->set_n_indexer_heads(3);
  gsa->set_d_indexer(8);
  gsa->set_k_base(5);
  gsa->set_k_min(3);
  gsa->set_k_max(7);
  return config;
}

inline heddle::v1::ModelConfig FixedGsaConfig(int32_t k, int64_t d_model = 10) {
  heddle::v1::ModelConfig config = GsaConfig(d_model);
  heddle::v1::GsaConfig* gsa = config.mutable_attention()->mutable_gsa();
  gsa->set_use_adaptive_k(false);
  gsa->set_k_base(k);
  return config;
}

// A layer and what it stands on.
struct IndexedFixture {
  std::unique_ptr<LayerHarness> harness;
  std::unique_ptr<attention::SharedSelection> shared;
  std::unique_ptr<attention::IndexedLayer> layer;

  float* vref() const { return harness->storage().Buffer("self_attn.indexer.vref"); }
};

inline IndexedFixture MakeIndexed(const heddle::v1::ModelConfig& config,
                                  at::ScalarType type = at::kDouble, uint64_t seed = 5) {
  IndexedFixture f;
  f.shared = std::make_unique<attention::SharedSelection>();
  f.harness = std::make_unique<LayerHarness>(config, type);
  const bool dsa = config.attention().kind() == heddle::v1::ATTENTION_KIND_DSA;
  f.layer = dsa ? attention::MakeDsa(f.harness->config(), f.harness->storage(), f.harness->ropes(),
                                     f.shared.get())
                : attention::MakeGsa(f.harness->config(), f.harness->storage(), f.harness->ropes());
  f.harness->ropes()->Ensure(64);
  f.harness->Randomize(seed);
  return f;
}

inline bool IsIndexer(const std::string& name) {
  return name.find(".indexer.") != std::string::npos;
}
inline bool IsTrainedByKl(const std::string& name) {
  return IsIndexer(name) && name.find(".adaptive_k.") == std::string::npos;
}

// The keys of each row of the layer's last forward, counted from its document's start.
inline std::vector<std::vector<int32_t>> SelectedKeys(const attention::Selection& selection,
                                                      const TestDocuments& documents) {
  std::vector<std::vector<int32_t>> rows;
  const attention::KeySets& sets = selection.sets;
  for (int64_t t = 0; t < documents.rows(); ++t) {
    const int32_t start = static_cast<int32_t>(t) - documents.positions()[static_cast<size_t>(t)];
    std::vector<int32_t> keys;
    for (int64_t i = sets.offsets[static_cast<size_t>(t)];
         i < sets.offsets[static_cast<size_t>(t) + 1]; ++i) {
      const int32_t first = sets.first[static_cast<size_t>(i)];
      const int64_t end =
          std::min<int64_t>(int64_t{first} + sets.width, sets.end[static_cast<size_t>(t)]);
      for (int32_t s = first; s < end; ++s) keys.push_back(s - start);
    }
    rows.push_back(keys);
  }
  return rows;
}

// One sequence, token by token over a cache. h [T, D]; `selected` receives each step's keys.
inline at::Tensor DecodeAll(attention::IndexedLayer* layer, const at::Tensor& h,
                            std::vector<std::vector<int32_t>>* selected = nullptr) {
  const int64_t length = h.size(0);
  const at::Tensor out = at::zeros(h.sizes(), h.options());
  at::Tensor k, v, index_k;
  layers::BufferPool pool;
  for (int64_t t = 0; t < length; ++t) {
    const std::vector<int32_t> positions = {static_cast<int32_t>(t)};
    const at::Tensor row = h.narrow(0, t, 1);
    const attention::IndexedRows rows = layer->Project(positions, row, &pool);
    if (!k.defined()) {
      k = at::zeros({length, rows.k_NJD.size(1), rows.k_NJD.size(2)}, h.options());
      v = at::zeros({length, rows.v_NJD.size(1), rows.v_NJD.size(2)}, h.options());
      index_k = at::zeros({length, rows.index.key_NI.size(1)}, h.options());
    }
    k.narrow(0, t, 1).copy_(rows.k_NJD);
    v.narrow(0, t, 1).copy_(rows.v_NJD);
    index_k.narrow(0, t, 1).copy_(rows.index.key_NI);
    const attention::IndexedCache cache{
        k.narrow(0, 0, t + 1), v.narrow(0, 0, t + 1), {index_k.narrow(0, 0, t + 1)}};
    const std::vector<int32_t> keys = layer->indexer().SelectCached(rows.index, 0, cache.index);
    const at::Tensor o = at::zeros({1, rows.q_NHD.size(1), rows.q_NHD.size(2)}, h.options());
    layer->Attend(rows, 0, cache, keys, o);
    layer->Output(rows, o, at::zeros(row.sizes(), h.options()), out.narrow(0, t, 1));
    if (selected != nullptr) selected->push_back(keys);
    pool.Release(0);
  }
  return out;
}

}  // namespace heddle::model_test
