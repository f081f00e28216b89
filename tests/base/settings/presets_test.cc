// Every preset under configs/ loads, and model presets have the parameter counts of
// attention-and-moe.md section 11, counted here from its formulas.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>

#include "base/settings/settings.h"
#include "tests/base/settings/config_files.h"
#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

using v1::ModelConfig;

int64_t MlaParameters(const ModelConfig& m) {
  const v1::MlaConfig& a = m.attention().mla();
  const int64_t d = m.d_model(), heads = m.n_heads(), rq = a.q_lora_rank(), dc = a.kv_lora_rank();
  const int64_t dn = a.qk_nope_head_dim(), dr = a.qk_rope_head_dim(), dv = a.v_head_dim();
  const int64_t gains = a.latent_norm() == v1::MlaConfig::LATENT_NORM_LAYERNORM ? 2 : 1;
  const int64_t query =
      rq == 0 ? d * heads * (dn + dr) : d * rq + rq * gains + rq * heads * (dn + dr);
  return query + d * (dc + dr) + dc * gains + dc * heads * (dn + dv) + heads * dv * d;
}

int64_t AttentionParameters(const ModelConfig& m, v1::AttentionKind kind) {
  const int64_t d = m.d_model(), hq = m.n_heads();
  const int64_t hk = m.n_kv_heads() > 0 ? m.n_kv_heads() : hq;
  const int64_t width = m.head_dim() > 0 ? m.head_dim() : d / hq;
  const int64_t gqa = 2 * d * hq * width + 2 * d * hk * width;
  const v1::AttentionConfig& a = m.attention();
  switch (kind) {
    case v1::ATTENTION_KIND_DENSE:
    case v1::ATTENTION_KIND_SWA:
      return gqa;
    case v1::ATTENTION_KIND_NSA:
      return gqa + hk * a.nsa().kernel_size() * (2 + width) + 3 * d * hq;
    case v1::ATTENTION_KIND_DSA: {
      const int64_t hi = a.dsa().n_indexer_heads(), di = a.dsa().d_indexer();
      const bool mla = a.dsa().core() == v1::DsaConfig::CORE_MLA;
      const int64_t norm = a.dsa().profile() == v1::DsaConfig::PROFILE_V32 ? 2 * di : 0;
      return (mla ? MlaParameters(m) : gqa) + hi * di * (mla ? a.mla().q_lora_rank() : d) + di * d +
             hi * d + norm;
    }
    case v1::ATTENTION_KIND_GSA: {
      const int64_t hi = a.gsa().n_indexer_heads(), di = a.gsa().d_indexer();
      return gqa + hi * di * d + di * d + hi * d + 2 * hi + (hk + hq) * width * (d + 1);
    }
    case v1::ATTENTION_KIND_MLA:
      return MlaParameters(m);
  }
  return 0;
}

bool IsMoeLayer(const v1::MoeConfig& moe, int layer) {
  if (moe.n_experts() == 0) {
    return false;
  }
  if (moe.layers_size() > 0) {
    return std::find(moe.layers().begin(), moe.layers().end(), layer) != moe.layers().end();
  }
  return layer >= moe.first_dense() && layer % moe.every() == moe.every() - 1;
}

int64_t Parameters(const ModelConfig& m) {
  const int64_t d = m.d_model();
  const int64_t norm = m.norm() == ModelConfig::NORM_RMSNORM ? d : 2 * d;
  const int64_t matrices = m.ffn() == ModelConfig::FFN_SWIGLU ? 3 : 2;
  int64_t total = d * m.vocab_size() * (m.tie_embeddings() ? 1 : 2) + norm;
  for (int layer = 0; layer < m.n_layers(); ++layer) {
    const auto& pattern = m.attention().pattern();
    const auto kind = pattern.empty()
                          ? m.attention().kind()
                          : static_cast<v1::AttentionKind>(pattern.at(layer % pattern.size()));
    total += 2 * norm + AttentionParameters(m, kind);
    const v1::MoeConfig& moe = m.moe();
    total += IsMoeLayer(moe, layer)
                 ? (moe.n_experts() + moe.n_shared()) * matrices * d * moe.d_expert() +
                       d * moe.n_experts()
                 : matrices * d * m.d_ffn();
  }
  return total;
}

std::string Configs() {
  const char* source = std::getenv("HEDDLE_SOURCE_DIR");
  return std::string(source == nullptr ? "." : source) + "/configs";
}

TEST(Presets, ModelsHaveTheirPublishedParameterCounts) {
  const std::map<std::string, int64_t> expected = {
      {"tiny-dense", 4'999'424},
      {"tiny-swa", 4'999'424},
      {"tiny-nsa", 5'020'160},
      {"tiny-dsa", 5'100'032},
      {"tiny-gsa", 5'494'544},
      {"tiny-mla", 5'097'984},
      {"tiny-swa-mla", 5'024'128},
      {"tiny-moe", 5'531'904},
      {"spill-moe", 16'271'616},
      {"small-dense", 30'548'480},
      {"small-swa", 30'548'480},
      {"small-nsa", 30'680'576},
      {"small-dsa", 31'876'608},
      {"small-gsa", 34'502'208},
      {"small-mla", 33'827'328},
      {"small-swa-mla", 31'368'192},
      {"small-moe", 51'716'608},
      {"gsa-24gb", 239'687'984},
      {"gsa-40gb", 415'326'304},
      {"gsa-80gb", 1'730'508'992},
      {"gsa-80gb-plus", 7'435'358'464},
      {"toy-nsa-llama", 2'748'716'032},
      {"nsa-transformer-base", 3'071'138'816},
      {"nsa-transformer-large", 16'753'385'472},
      {"dsa-small", 7'130'240},
      {"dsa-medium", 20'954'368},
      {"dsa-large", 145'601'024},
      {"dsa-v32", 671'877'929'216},
      {"swa-mla-small", 262'564'864},
      {"swa-mla-base", 983'053'824},
      {"swa-mla-large", 1'940'904'448},
      {"swa-mla-xl", 8'578'671'616},
  };
  const ConfigFiles files;
  LoadOptions options;
  options.search_path = {Configs()};
  options.require_implemented = false;
  const std::string path = files.Write("run.yaml", kMinimal);
  const std::vector<std::string> names = ListPresets("model", options.search_path);
  EXPECT_EQ(names.size(), expected.size());
  for (const std::string& name : names) {
    const StatusOr<ResolvedConfig> resolved = Load(path, {"model=" + name}, options);
    ASSERT_OK(resolved) << name;
    ASSERT_EQ(expected.count(name), 1u) << name << " has no expected count";
    EXPECT_EQ(Parameters(resolved->config.model()), expected.at(name)) << name;
  }
}

TEST(Presets, EveryGroupLoads) {
  const ConfigFiles files;
  LoadOptions options;
  options.search_path = {Configs()};
  options.require_implemented = false;
  const std::string path = files.Write("run.yaml", kMinimal);
  const std::vector<std::string> presets = ListPresets("", options.search_path);
  EXPECT_GE(presets.size(), 45u);
  for (const std::string& preset : presets) {
    const size_t slash = preset.find('/');
    std::vector<std::string> choices = {preset.substr(0, slash) + "=" + preset.substr(slash + 1)};
    // Experts are kept somewhere only where there are some.
    if (preset.rfind("memory/", 0) == 0) choices.push_back("model=tiny-moe");
    EXPECT_OK(Load(path, choices, options)) << preset;
  }
}

TEST(Presets, EveryModelIsOneThatThisVersionRuns) {
  LoadOptions options;
  options.search_path = {Configs()};
  for (const std::string& model : ListPresets("model", options.search_path)) {
    EXPECT_OK(Load("tiny", {"data.path=/d", "model=" + model}, options)) << model;
  }
}

}  // namespace
}  // namespace heddle::settings
