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
  heddle::v1::ModelConfig config;
  config.set_d_model(static_cast<int32_t>(d_model));
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

inline std::vector<NamedShape> GqaTensors(const heddle::v1::ModelConfig& config) {
  const model::Heads heads = model::HeadsOf(config);
  const int64_t d = config.d_model();
  return {{"self_attn.q_proj.weight", {heads.query * heads.dim, d}},
          {"self_attn.k_proj.weight", {heads.kv * heads.dim, d}, true},
          {"self_attn.v_proj.weight", {heads.kv * heads.dim, d}, true},
          {"self_attn.o_proj.weight", {d, heads.query * heads.dim}}};
}

inline void AddIndexer(int64_t heads, int64_t width, int64_t d, std::vector<NamedShape>* tensors) {
  tensors->push_back({"self_attn.indexer.q_proj.weight", {heads * width, d}});
  tensors->push_back({"self_attn.indexer.k_proj.weight", {width, d}});
  tensors->push_back({"self_attn.indexer.weights_proj.weight", {heads, d}});
}

inline std::vector<NamedShape> DsaTensors(const heddle::v1::ModelConfig& config) {
  const heddle::v1::DsaConfig& dsa = config.attention().dsa();
  std::vector<NamedShape> tensors = GqaTensors(config);
  AddIndexer(dsa.n_indexer_heads(), dsa.d_indexer(), config.d_model(), &tensors);
  if (dsa.profile() == heddle::v1::DsaConfig::PROFILE_V32) {
    tensors.push_back({"self_attn.indexer.k_norm.weight", {dsa.d_indexer()}});
    tensors.push_back({"self_attn.indexer.k_norm.bias", {dsa.d_indexer()}});
  }
  return tensors;
}

inline std::vector<NamedShape> GsaTensors(const heddle::v1::ModelConfig& config) {
  const heddle::v1::GsaConfig& gsa = config.attention().gsa();
  const model::Heads heads = model::HeadsOf(config);
  const int64_t d = config.d_model();
  std::vector<NamedShape> tensors = GqaTensors(config);
  AddIndexer(gsa.n_indexer_heads(), gsa.d_indexer(), d, &tensors);
  tensors.push_back({"self_attn.indexer.weights_proj.bias", {gsa.n_indexer_heads()}});
  tensors.push_back({"self_attn.indexer.bias", {gsa.n_indexer_heads()}});
  const int64_t width =
      gsa.gate_form() == heddle::v1::GsaConfig::GATE_FORM_PER_HEAD ? 1 : heads.dim;
  const auto gate = [&](const std::string& name, int64_t columns) {
    tensors.push_back({"self_attn." + name + ".weight", {columns, d}});
    tensors.push_back({"self_attn." + name + ".bias", {columns}});
  };
  if (gsa.use_value_gate()) gate("value_gate", heads.kv * width);
  if (gsa.use_output_gate()) gate("output_gate", heads.query * width);
  if (gsa.use_adaptive_k() && gsa.adaptive_k() == heddle::v1::GsaConfig::ADAPTIVE_K_LEARNED) {
    const std::string mlp = "self_attn.indexer.k_mlp.";
    tensors.push_back({mlp + "0.weight", {32, 3}});
    tensors.push_back({mlp + "0.bias", {32}});
    tensors.push_back({mlp + "2.weight", {1, 32}});
    tensors.push_back({mlp + "2.bias", {1}});
  }
  return tensors;
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
  if (config.attention().kind() == heddle::v1::ATTENTION_KIND_DSA) {
    f.harness = std::make_unique<LayerHarness>(config, type, DsaTensors(config));
    f.layer = attention::MakeDsa(f.harness->config(), f.harness->storage(), f.harness->ropes(),
                                 f.shared.get());
  } else {
    f.harness = std::make_unique<LayerHarness>(
        config, type, GsaTensors(config), std::vector<NamedShape>{{"self_attn.indexer.vref", {1}}});
    f.layer = attention::MakeGsa(f.harness->config(), f.harness->storage(), f.harness->ropes());
  }
  f.harness->ropes()->Ensure(64);
  f.harness->Randomize(seed);
  return f;
}

inline bool IsIndexer(const std::string& name) {
  return name.find(".indexer.") != std::string::npos;
}
inline bool IsTrainedByKl(const std::string& name) {
  return IsIndexer(name) && name.find(".k_mlp.") == std::string::npos;
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
