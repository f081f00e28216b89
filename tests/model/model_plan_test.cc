#include "model/model_plan.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "heddle/v1/config.pb.h"
#include "tests/model/plan_configs.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using plan_test::DsaOnMla;
using plan_test::OfKind;
using plan_test::TinyDense;

ModelConfig SmallDense() {
  ModelConfig config;
  config.set_vocab_size(8192);
  config.set_d_model(512);
  config.set_n_layers(8);
  config.set_n_heads(8);
  config.set_n_kv_heads(2);
  config.set_head_dim(64);
  config.set_d_ffn(1376);
  config.set_tie_embeddings(false);
  return config;
}

ModelConfig Swa(ModelConfig config, int window, int sinks) {
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_SWA);
  config.mutable_attention()->mutable_swa()->set_window(window);
  config.mutable_attention()->mutable_swa()->set_sink_size(sinks);
  return config;
}

int64_t Parameters(const ModelConfig& config) {
  const StatusOr<ModelPlan> plan = PlanModel(config);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? plan->parameters : 0;
}

// attention-and-moe.md section 11: every preset that is shipped.
TEST(ModelPlan, CountsThePresetsExactly) {
  const std::map<std::string, int64_t> expected = {
      {"tiny-dense", 4'999'424},        {"tiny-swa", 4'999'424},
      {"tiny-nsa", 5'020'160},          {"tiny-dsa", 5'100'032},
      {"tiny-gsa", 5'494'544},          {"tiny-mla", 5'097'984},
      {"tiny-swa-mla", 5'024'128},      {"tiny-moe", 5'531'904},
      {"small-dense", 30'548'480},      {"small-swa", 30'548'480},
      {"small-nsa", 30'680'576},        {"small-dsa", 31'876'608},
      {"small-gsa", 34'502'208},        {"small-mla", 33'827'328},
      {"small-swa-mla", 31'368'192},    {"small-moe", 51'716'608},
      {"gsa-24gb", 239'687'984},        {"gsa-40gb", 415'326'304},
      {"gsa-80gb", 1'730'508'992},      {"gsa-80gb-plus", 7'435'358'464},
      {"toy-nsa-llama", 2'748'716'032}, {"nsa-transformer-base", 3'071'138'816},
      {"dsa-small", 7'130'240},         {"nsa-transformer-large", 16'753'385'472},
      {"dsa-medium", 20'954'368},       {"dsa-large", 145'601'024},
      {"dsa-v32", 671'877'929'216},     {"swa-mla-small", 262'564'864},
      {"swa-mla-base", 983'053'824},    {"swa-mla-large", 1'940'904'448},
      {"swa-mla-xl", 8'578'671'616},    {"spill-moe", 16'271'616},
  };
  const std::vector<std::string> names = settings::ListPresets("model", plan_test::PresetPath());
  EXPECT_EQ(names.size(), expected.size());
  for (const std::string& name : names) {
    const StatusOr<ModelConfig> config = plan_test::Preset(name);
    ASSERT_TRUE(config.ok()) << name << ": " << config.status();
    EXPECT_EQ(Parameters(*config), expected.at(name)) << name;
  }
  ModelConfig llama = *plan_test::Preset("toy-nsa-llama");
  llama.mutable_attention()->mutable_nsa()->set_compress_type(
      heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR);
  EXPECT_EQ(Parameters(llama), 2'765'492'224);
  llama.mutable_attention()->mutable_nsa()->clear_compress_type();
  llama.set_n_layers(32);
  EXPECT_EQ(Parameters(llama), 7'842'045'952);
}

TEST(ModelPlan, NamesTensorsAsTheContractSays) {
  const ModelPlan plan = *PlanModel(SmallDense());
  std::set<std::string> names;
  for (const TensorSpec& tensor : plan.tensors) names.insert(tensor.name);
  EXPECT_EQ(names.size(), plan.tensors.size());
  for (const char* name :
       {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.7.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight",
        "model.layers.3.self_attn.v_proj.weight", "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.mlp.down_proj.weight"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
  EXPECT_EQ(names.size(), 3u + 8u * 9u);
  EXPECT_EQ(plan.Find("model.layers.0.self_attn.k_proj.weight")->shape,
            (std::vector<int64_t>{128, 512}));
  EXPECT_EQ(plan.Find("model.layers.0.mlp.down_proj.weight")->shape,
            (std::vector<int64_t>{512, 1376}));
  EXPECT_EQ(PlanModel(TinyDense())->Find("lm_head.weight"), nullptr);
}

TEST(ModelPlan, LaysTensorsOutWithoutOverlapAndKeepsGroupsJoined) {
  ModelConfig odd = TinyDense();
  odd.set_d_model(36);
  odd.set_head_dim(6);
  odd.set_d_ffn(50);
  odd.set_vocab_size(101);
  for (const ModelConfig& config : {TinyDense(), odd}) {
    const ModelPlan plan = *PlanModel(config);
    int64_t end = 0;
    for (const TensorSpec& tensor : plan.tensors) {
      EXPECT_GE(tensor.offset, end) << tensor.name;
      const bool joined = tensor.name.find("k_proj") != std::string::npos ||
                          tensor.name.find("v_proj") != std::string::npos ||
                          tensor.name.find("up_proj") != std::string::npos;
      if (joined) {
        EXPECT_EQ(tensor.offset, end) << tensor.name;
      } else {
        EXPECT_EQ(tensor.offset % kFlatAlignment, 0) << tensor.name;
      }
      end = tensor.offset + tensor.elements;
    }
    EXPECT_GE(plan.flat_elements, end);
    int64_t unit_end = 0;
    for (const UnitSpec& unit : plan.units) {
      EXPECT_EQ(unit.offset, unit_end) << unit.name;
      unit_end += unit.elements;
    }
    EXPECT_EQ(unit_end, plan.flat_elements);
    EXPECT_EQ(plan.units.size(), 2u + 4u);
  }
}

// Names of one block without its prefix, with their shapes.
std::map<std::string, std::vector<int64_t>> BlockTensors(const ModelConfig& config, int layer) {
  const StatusOr<ModelPlan> plan = PlanModel(config);
  EXPECT_TRUE(plan.ok()) << plan.status();
  const std::string prefix = Str("model.layers.", layer, ".");
  std::map<std::string, std::vector<int64_t>> tensors;
  for (const TensorSpec& tensor : plan->tensors) {
    if (tensor.name.rfind(prefix, 0) == 0) {
      tensors[tensor.name.substr(prefix.size())] = tensor.shape;
    }
  }
  return tensors;
}

using Shapes = std::map<std::string, std::vector<int64_t>>;

// What a block of `config` has beside the norms and the feed-forward layer of TinyDense.
Shapes AttentionTensors(const ModelConfig& config) {
  Shapes tensors = BlockTensors(config, 1);
  for (const char* name : {"input_layernorm.weight", "post_attention_layernorm.weight",
                           "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}) {
    EXPECT_EQ(tensors.erase(name), 1u) << name;
  }
  return tensors;
}

const Shapes kProjections = {{"self_attn.q_proj.weight", {256, 256}},
                             {"self_attn.k_proj.weight", {128, 256}},
                             {"self_attn.v_proj.weight", {128, 256}},
                             {"self_attn.o_proj.weight", {256, 256}}};

Shapes With(Shapes tensors, const Shapes& more) {
  tensors.insert(more.begin(), more.end());
  return tensors;
}

TEST(ModelPlan, NamesTensorsOfNsaByCompressionAndProjections) {
  using heddle::v1::NsaConfig;
  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_NSA);
  NsaConfig* nsa = config.mutable_attention()->mutable_nsa();
  const Shapes common = With(kProjections, {{"self_attn.compress.k_pe", {2, 16, 64}},
                                            {"self_attn.gate_proj.weight", {12, 256}}});
  EXPECT_EQ(AttentionTensors(config), With(common, {{"self_attn.compress.k_weight", {2, 16}},
                                                    {"self_attn.compress.v_weight", {2, 16}}}));
  nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_LINEAR);
  EXPECT_EQ(AttentionTensors(config),
            With(common, {{"self_attn.compress.k_weight", {2, 1024, 64}},
                          {"self_attn.compress.v_weight", {2, 1024, 64}}}));
  nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_AVGPOOL);
  EXPECT_EQ(AttentionTensors(config), common);
  nsa->set_kv(NsaConfig::KV_SEPARATE);
  EXPECT_EQ(AttentionTensors(config), With(common, {{"self_attn.k_proj_slc.weight", {128, 256}},
                                                    {"self_attn.v_proj_slc.weight", {128, 256}},
                                                    {"self_attn.k_proj_win.weight", {128, 256}},
                                                    {"self_attn.v_proj_win.weight", {128, 256}}}));
}

// The dsa layers alone count: of the pattern below they are 0, 1, 3, 4, 6, 7.
TEST(ModelPlan, DsaLayersThatShareASelectionHaveNoIndexer) {
  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_DSA);
  config.set_n_layers(8);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->clear_kind();
  for (const heddle::v1::AttentionKind kind :
       {heddle::v1::ATTENTION_KIND_DSA, heddle::v1::ATTENTION_KIND_DSA,
        heddle::v1::ATTENTION_KIND_SWA}) {
    attention->add_pattern(kind);
  }
  const double all = FlopsPerToken(config, 512).forward_weights;
  const int64_t cache = KvCacheBytes(config, 100, 2);
  const int64_t parameters = PlanModel(config)->parameters;
  attention->mutable_dsa()->set_index_share_every(3);
  const StatusOr<ModelPlan> plan = PlanModel(config);
  ASSERT_TRUE(plan.ok());
  std::vector<int> with_indexer;
  for (int layer = 0; layer < 8; ++layer) {
    const bool found = plan->Find("model.layers." + std::to_string(layer) +
                                  ".self_attn.indexer.q_proj.weight") != nullptr;
    EXPECT_EQ(found, LayerHasIndexer(config, layer));
    if (found) with_indexer.push_back(layer);
  }
  EXPECT_EQ(with_indexer, (std::vector<int>{0, 4}));
  // Four indexers fewer of 256 (2 x 32 + 32 + 2) weights and a norm of 2 x 32.
  EXPECT_EQ(parameters - plan->parameters, 4 * (256 * 98 + 64));
  EXPECT_EQ(all - FlopsPerToken(config, 512).forward_weights, 4 * 2.0 * 256 * 98);
  EXPECT_EQ(cache - KvCacheBytes(config, 100, 2), 4 * 100 * 32 * 2);
}

TEST(ModelPlan, NamesTensorsOfIndexersAndGates) {
  using heddle::v1::GsaConfig;
  ModelConfig dsa = OfKind(heddle::v1::ATTENTION_KIND_DSA);
  const Shapes seed = With(kProjections, {{"self_attn.indexer.q_proj.weight", {64, 256}},
                                          {"self_attn.indexer.k_proj.weight", {32, 256}},
                                          {"self_attn.indexer.weights_proj.weight", {2, 256}}});
  EXPECT_EQ(AttentionTensors(dsa), With(seed, {{"self_attn.indexer.k_norm.weight", {32}},
                                               {"self_attn.indexer.k_norm.bias", {32}}}));
  dsa.mutable_attention()->mutable_dsa()->set_profile(heddle::v1::DsaConfig::PROFILE_SEED);
  EXPECT_EQ(AttentionTensors(dsa), seed);

  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_GSA);
  GsaConfig* gsa = config.mutable_attention()->mutable_gsa();
  const Shapes indexer =
      With(seed, {{"self_attn.indexer.weights_proj.bias", {2}}, {"self_attn.indexer.bias", {2}}});
  const Shapes value = {{"self_attn.value_gate.weight", {128, 256}},
                        {"self_attn.value_gate.bias", {128}}};
  const Shapes output = {{"self_attn.output_gate.weight", {256, 256}},
                         {"self_attn.output_gate.bias", {256}}};
  EXPECT_EQ(AttentionTensors(config), With(With(indexer, value), output));
  gsa->set_use_value_gate(false);
  EXPECT_EQ(AttentionTensors(config), With(indexer, output));
  gsa->set_gate_form(GsaConfig::GATE_FORM_PER_HEAD);
  EXPECT_EQ(AttentionTensors(config).at("self_attn.output_gate.weight"),
            (std::vector<int64_t>{4, 256}));
  gsa->set_use_output_gate(false);
  EXPECT_EQ(AttentionTensors(config), indexer);
  gsa->set_adaptive_k(GsaConfig::ADAPTIVE_K_LEARNED);
  EXPECT_EQ(AttentionTensors(config),
            With(indexer, {{"self_attn.indexer.adaptive_k.fc1.weight", {32, 3}},
                           {"self_attn.indexer.adaptive_k.fc1.bias", {32}},
                           {"self_attn.indexer.adaptive_k.fc2.weight", {1, 32}},
                           {"self_attn.indexer.adaptive_k.fc2.bias", {1}}}));
}

TEST(ModelPlan, NamesTensorsOfLatentAttention) {
  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_MLA);
  heddle::v1::MlaConfig* mla = config.mutable_attention()->mutable_mla();
  const Shapes common = {{"self_attn.kv_a_proj_with_mqa.weight", {160, 256}},
                         {"self_attn.kv_a_layernorm.weight", {128}},
                         {"self_attn.kv_b_proj.weight", {384, 128}},
                         {"self_attn.o_proj.weight", {256, 256}}};
  EXPECT_EQ(AttentionTensors(config), With(common, {{"self_attn.q_proj.weight", {256, 256}}}));
  mla->set_q_lora_rank(48);
  mla->set_latent_norm(heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM);
  const Shapes lora = With(common, {{"self_attn.q_a_proj.weight", {48, 256}},
                                    {"self_attn.q_a_layernorm.weight", {48}},
                                    {"self_attn.q_b_proj.weight", {256, 48}},
                                    {"self_attn.kv_a_layernorm.bias", {128}}});
  // The query latent is always RMS-normalised: no bias there.
  EXPECT_EQ(AttentionTensors(config), lora);
  // The indexer reads the q latent where there is one.
  EXPECT_EQ(AttentionTensors(DsaOnMla(48)).at("self_attn.indexer.q_proj.weight"),
            (std::vector<int64_t>{64, 48}));
  EXPECT_EQ(AttentionTensors(DsaOnMla(48)).at("self_attn.indexer.k_proj.weight"),
            (std::vector<int64_t>{32, 256}));
  EXPECT_EQ(AttentionTensors(DsaOnMla(0)).at("self_attn.indexer.q_proj.weight"),
            (std::vector<int64_t>{64, 256}));
}

TEST(ModelPlan, NamesTensorsOfExpertsNormsAndFeedForwardForms) {
  ModelConfig config = TinyDense();
  heddle::v1::MoeConfig* moe = config.mutable_moe();
  moe->set_n_experts(3);
  moe->set_n_shared(2);
  moe->set_d_expert(20);
  moe->set_every(2);
  Shapes block = BlockTensors(config, 1);
  EXPECT_EQ(block.at("mlp.gate.weight"), (std::vector<int64_t>{3, 256}));
  EXPECT_EQ(block.at("mlp.experts.2.gate_proj.weight"), (std::vector<int64_t>{20, 256}));
  EXPECT_EQ(block.at("mlp.experts.2.down_proj.weight"), (std::vector<int64_t>{256, 20}));
  EXPECT_EQ(block.at("mlp.shared_experts.up_proj.weight"), (std::vector<int64_t>{40, 256}));
  EXPECT_FALSE(block.contains("mlp.gate_proj.weight"));
  EXPECT_FALSE(block.contains("mlp.experts.3.up_proj.weight"));
  EXPECT_TRUE(BlockTensors(config, 0).contains("mlp.gate_proj.weight"));
  config.set_ffn(ModelConfig::FFN_GELU);
  config.set_norm(ModelConfig::NORM_DYT);
  block = BlockTensors(config, 1);
  EXPECT_FALSE(block.contains("mlp.experts.0.gate_proj.weight"));
  EXPECT_EQ(block.at("mlp.experts.0.up_proj.weight"), (std::vector<int64_t>{20, 256}));
  EXPECT_FALSE(BlockTensors(config, 0).contains("mlp.gate_proj.weight"));
  EXPECT_EQ(block.at("input_layernorm.alpha"), (std::vector<int64_t>{1}));
  EXPECT_EQ(block.at("post_attention_layernorm.bias"), (std::vector<int64_t>{256}));
  const ModelPlan plan = *PlanModel(config);
  EXPECT_NE(plan.Find("model.norm.alpha"), nullptr);
  config.set_norm(ModelConfig::NORM_LAYERNORM);
  EXPECT_EQ(BlockTensors(config, 1).count("input_layernorm.alpha"), 0u);
  EXPECT_NE(PlanModel(config)->Find("model.norm.bias"), nullptr);
  config.mutable_attention()->set_qkv_bias(true);
  EXPECT_EQ(BlockTensors(config, 0).at("self_attn.k_proj.bias"), (std::vector<int64_t>{128}));
}

TEST(ModelPlan, ChoosesLayersWithExperts) {
  const auto layers = [](const ModelConfig& config) {
    std::vector<int> found;
    for (int layer = 0; layer < 12; ++layer) {
      if (LayerHasExperts(config, layer)) found.push_back(layer);
    }
    return found;
  };
  ModelConfig config;
  EXPECT_TRUE(layers(config).empty());
  heddle::v1::MoeConfig* moe = config.mutable_moe();
  moe->set_n_experts(4);
  EXPECT_EQ(layers(config).size(), 12u);
  moe->set_every(4);
  EXPECT_EQ(layers(config), (std::vector<int>{3, 7, 11}));
  moe->set_first_dense(4);
  EXPECT_EQ(layers(config), (std::vector<int>{7, 11}));
  moe->add_layers(2);
  moe->add_layers(5);
  EXPECT_EQ(layers(config), (std::vector<int>{2, 5}));
}

// Groups that layers use as one matrix: each name follows the one before without a gap.
TEST(ModelPlan, JoinsTheMatricesThatReadTheSameInput) {
  ModelConfig nsa = OfKind(heddle::v1::ATTENTION_KIND_NSA);
  nsa.mutable_attention()->mutable_nsa()->set_kv(heddle::v1::NsaConfig::KV_SEPARATE);
  ModelConfig moe = TinyDense();
  moe.mutable_moe()->set_n_experts(3);
  moe.mutable_moe()->set_n_shared(1);
  moe.mutable_moe()->set_d_expert(21);
  moe.set_d_model(35);
  moe.set_vocab_size(11);
  ModelConfig bias = moe;
  bias.mutable_attention()->set_qkv_bias(true);
  ModelConfig lora = OfKind(heddle::v1::ATTENTION_KIND_MLA);
  lora.mutable_attention()->mutable_mla()->set_q_lora_rank(33);
  const std::string attn = "self_attn.";
  const struct {
    ModelConfig config;
    std::vector<std::string> names;
  } groups[] = {
      {nsa,
       {attn + "q_proj.weight", attn + "k_proj.weight", attn + "v_proj.weight",
        attn + "k_proj_slc.weight", attn + "v_proj_slc.weight", attn + "k_proj_win.weight",
        attn + "v_proj_win.weight"}},
      {bias, {attn + "q_proj.bias", attn + "k_proj.bias", attn + "v_proj.bias"}},
      {moe, {"mlp.experts.1.gate_proj.weight", "mlp.experts.1.up_proj.weight"}},
      {moe, {"mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"}},
      {OfKind(heddle::v1::ATTENTION_KIND_DSA),
       {attn + "indexer.q_proj.weight", attn + "indexer.k_proj.weight",
        attn + "indexer.weights_proj.weight"}},
      {DsaOnMla(33), {attn + "indexer.k_proj.weight", attn + "indexer.weights_proj.weight"}},
      {OfKind(heddle::v1::ATTENTION_KIND_GSA),
       {attn + "value_gate.weight", attn + "output_gate.weight"}},
      {OfKind(heddle::v1::ATTENTION_KIND_GSA),
       {attn + "value_gate.bias", attn + "output_gate.bias"}},
      {OfKind(heddle::v1::ATTENTION_KIND_MLA),
       {attn + "q_proj.weight", attn + "kv_a_proj_with_mqa.weight"}},
      {lora, {attn + "q_a_proj.weight", attn + "kv_a_proj_with_mqa.weight"}},
  };
  for (const auto& group : groups) {
    const StatusOr<ModelPlan> plan = PlanModel(group.config);
    ASSERT_TRUE(plan.ok()) << plan.status();
    for (size_t i = 1; i < group.names.size(); ++i) {
      const TensorSpec* before = plan->Find("model.layers.2." + group.names[i - 1]);
      const TensorSpec* tensor = plan->Find("model.layers.2." + group.names[i]);
      ASSERT_NE(before, nullptr) << group.names[i - 1];
      ASSERT_NE(tensor, nullptr) << group.names[i];
      EXPECT_EQ(tensor->offset, before->offset + before->elements) << tensor->name;
      EXPECT_EQ(tensor->shape.back(),
                tensor->shape.size() == 1 ? tensor->elements : before->shape.back());
    }
  }
}

TEST(ModelPlan, KeepsRouterBiasAndScoreVarianceAsBuffers) {
  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_GSA);
  config.mutable_moe()->set_n_experts(5);
  config.mutable_moe()->set_every(2);
  const ModelPlan plan = *PlanModel(config);
  ASSERT_EQ(plan.buffers.size(), 6u);
  const TensorSpec* bias = plan.FindBuffer("model.layers.3.mlp.gate.e_score_correction_bias");
  ASSERT_NE(bias, nullptr);
  EXPECT_EQ(bias->shape, (std::vector<int64_t>{5}));
  EXPECT_EQ(plan.units[static_cast<size_t>(bias->unit)].name, "block.3");
  EXPECT_EQ(plan.FindBuffer("model.layers.2.mlp.gate.e_score_correction_bias"), nullptr);
  EXPECT_EQ(plan.FindBuffer("model.layers.2.self_attn.indexer.vref")->elements, 1);
  EXPECT_EQ(plan.Find("model.layers.2.self_attn.indexer.vref"), nullptr);
  int64_t end = 0;
  for (const TensorSpec& buffer : plan.buffers) {
    EXPECT_GE(buffer.offset, end) << buffer.name;
    end = buffer.offset + buffer.elements;
  }
  EXPECT_GE(plan.buffer_elements, end);
  config.mutable_attention()->mutable_gsa()->set_use_adaptive_k(false);
  EXPECT_EQ(PlanModel(config)->buffers.size(), 2u);
}

TEST(ModelPlan, MarksWhatOnlyTheIndexersLossTrains) {
  for (const ModelConfig& config :
       {OfKind(heddle::v1::ATTENTION_KIND_GSA), DsaOnMla(48), DsaOnMla(0)}) {
    int marked = 0;
    const ModelPlan plan = *PlanModel(config);
    for (const TensorSpec& tensor : plan.tensors) {
      EXPECT_EQ(tensor.indexer, tensor.name.find(".indexer.") != std::string::npos) << tensor.name;
      marked += tensor.indexer ? 1 : 0;
    }
    EXPECT_EQ(marked, 4 * 5);
  }
}

// attention-and-moe.md sections 5.2, 6.1, 7.1 and 8.
TEST(ModelPlan, ChoosesInitialValuesByKind) {
  const auto spec = [](const ModelConfig& config, const std::string& name) {
    const ModelPlan plan = *PlanModel(config);
    const TensorSpec* found = plan.Find("model.layers.1." + name);
    EXPECT_NE(found, nullptr) << name;
    return *found;
  };
  const auto uniform = [&](const ModelConfig& config, const std::string& name, double bound) {
    const TensorSpec tensor = spec(config, name);
    EXPECT_EQ(tensor.init, InitKind::kUniform) << name;
    EXPECT_NEAR(tensor.init_value, bound, 1e-12) << name;
  };
  const auto constant = [&](const ModelConfig& config, const std::string& name, double value) {
    const TensorSpec tensor = spec(config, name);
    EXPECT_EQ(tensor.init, InitKind::kConstant) << name;
    EXPECT_EQ(tensor.init_value, value) << name;
  };
  ModelConfig nsa = OfKind(heddle::v1::ATTENTION_KIND_NSA);
  constant(nsa, "self_attn.compress.k_weight", 1.0 / 16);
  constant(nsa, "self_attn.compress.k_pe", 0);
  nsa.mutable_attention()->mutable_nsa()->set_compress_type(
      heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR);
  EXPECT_EQ(spec(nsa, "self_attn.compress.v_weight").init, InitKind::kDiagonal);
  EXPECT_EQ(spec(nsa, "self_attn.compress.v_weight").init_value, 1.0 / 16);
  nsa.mutable_attention()->mutable_nsa()->set_compress_init(
      heddle::v1::NsaConfig::COMPRESS_INIT_XAVIER);
  uniform(nsa, "self_attn.compress.v_weight", std::sqrt(6.0 / ((1024 + 2) * 64)));
  uniform(nsa, "self_attn.compress.k_pe", std::sqrt(6.0 / ((16 + 2) * 64)));
  uniform(nsa, "self_attn.k_proj.weight", std::sqrt(6.0 / (128 + 256)));
  uniform(nsa, "self_attn.gate_proj.weight", std::sqrt(6.0 / (12 + 256)));
  nsa.mutable_attention()->mutable_nsa()->clear_compress_type();
  uniform(nsa, "self_attn.compress.k_weight", std::sqrt(6.0 / (16 + 2)));

  uniform(OfKind(heddle::v1::ATTENTION_KIND_DSA), "self_attn.indexer.q_proj.weight", 1.0 / 16);
  uniform(DsaOnMla(64), "self_attn.indexer.q_proj.weight", 1.0 / 8);

  const ModelConfig gsa = OfKind(heddle::v1::ATTENTION_KIND_GSA);
  uniform(gsa, "self_attn.q_proj.weight", std::sqrt(0.5) * std::sqrt(6.0 / 512));
  uniform(gsa, "self_attn.o_proj.weight", std::sqrt(6.0 / 512) / std::sqrt(8.0));
  uniform(gsa, "self_attn.indexer.k_proj.weight", std::sqrt(6.0 / (32 + 256)));
  uniform(gsa, "self_attn.indexer.weights_proj.weight", 0.1 * std::sqrt(6.0 / (2 + 256)));
  uniform(gsa, "self_attn.value_gate.weight", 0.1 * std::sqrt(6.0 / (128 + 256)));
  uniform(gsa, "mlp.down_proj.weight", 1.0 / std::sqrt(688.0));
  constant(gsa, "self_attn.indexer.weights_proj.bias", 0);
  constant(gsa, "self_attn.indexer.bias", 0);
  constant(gsa, "self_attn.value_gate.bias", 0.5);
  constant(gsa, "self_attn.output_gate.bias", 0.5);
  const TensorSpec out = spec(OfKind(heddle::v1::ATTENTION_KIND_MLA), "self_attn.o_proj.weight");
  EXPECT_EQ(out.init_stddev, 0.02);
  ModelConfig dyt = TinyDense();
  dyt.set_norm(ModelConfig::NORM_DYT);
  constant(dyt, "input_layernorm.alpha", 0.5);
  constant(dyt, "input_layernorm.bias", 0);
  EXPECT_EQ(spec(dyt, "input_layernorm.weight").init, InitKind::kOnes);
}

TEST(ModelPlan, DecaysNoNormAndScalesMatricesIntoTheResidualStream) {
  const ModelPlan plan = *PlanModel(TinyDense());
  EXPECT_FALSE(plan.Find("model.layers.1.input_layernorm.weight")->decays);
  EXPECT_FALSE(plan.Find("model.norm.weight")->decays);
  EXPECT_TRUE(plan.Find("model.embed_tokens.weight")->decays);
  EXPECT_DOUBLE_EQ(plan.Find("model.layers.1.mlp.up_proj.weight")->init_stddev, 0.02);
  EXPECT_NEAR(plan.Find("model.layers.1.self_attn.o_proj.weight")->init_stddev,
              0.02 / std::sqrt(8.0), 1e-15);
}

// Hand count for tiny-dense: 2 x (4 (d (2 Hq + 2 Hk) D + 3 d ff) + d V), C = 2 Hq (Dk + Dv) = 1024.
TEST(ModelPlan, CountsFlopsAsByHand) {
  const TokenFlops dense = FlopsPerToken(TinyDense(), 1024);
  EXPECT_DOUBLE_EQ(dense.forward_weights,
                   2.0 * (4 * (256.0 * 12 * 64 + 3 * 256.0 * 688) + 256.0 * 8192));
  EXPECT_DOUBLE_EQ(dense.forward_core, 4 * 1024.0 * 1025 / 2);
  EXPECT_DOUBLE_EQ(dense.training, 3 * dense.forward_weights + 3.5 * dense.forward_core);
}

TEST(ModelPlan, CountsVisibleKeysOfAWindowWithSinks) {
  const ModelConfig config = Swa(TinyDense(), 6, 2);
  double sum = 0;
  for (int64_t t = 0; t < 40; ++t) {
    // |S_t| = min(t+1, W + min(A, max(0, t+1-W))), attention-and-moe.md section 4.
    const int64_t expected =
        std::min<int64_t>(t + 1, 6 + std::min<int64_t>(2, std::max<int64_t>(0, t + 1 - 6)));
    EXPECT_EQ(VisibleKeys(config, 0, t), expected) << t;
    sum += static_cast<double>(expected);
  }
  EXPECT_DOUBLE_EQ(FlopsPerToken(config, 40).forward_core, 4 * 1024.0 * sum / 40);
}

TEST(ModelPlan, CountsCacheBytes) {
  // Per token and layer: b Hk (Dk + Dv).
  EXPECT_EQ(KvCacheBytes(TinyDense(), 100, 2), 100 * 4 * 2 * 128 * 2);
  // A window's cache does not grow: b Hk (Dk + Dv) (W + A).
  EXPECT_EQ(KvCacheBytes(Swa(TinyDense(), 64, 4), 100, 2), 68 * 4 * 2 * 128 * 2);
  EXPECT_EQ(KvCacheBytes(Swa(TinyDense(), 64, 4), 10'000, 2), 68 * 4 * 2 * 128 * 2);
}

TEST(ModelPlan, NamesEveryProblemAtOnce) {
  ModelConfig config = TinyDense();
  config.set_n_kv_heads(3);
  config.set_head_dim(33);
  config.set_dropout(0.1);
  config.set_norm_eps(0);
  config.mutable_attention()->mutable_nsa()->set_topk(2);
  const Status status = PlanModel(config).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  for (const char* key : {"model.n_kv_heads", "model.head_dim", "model.dropout", "model.norm_eps",
                          "model.attention.nsa.topk"}) {
    EXPECT_NE(Message(status).find(key), std::string::npos) << key << " in " << status;
  }
}

// One contradiction each, as overrides of tiny-dense; refused with the same key by the plan and by
// the settings, which see them first in `heddle submit`.
TEST(ModelPlan, RefusesWhatContradictsItselfAsTheSettingsDo) {
  const struct {
    std::vector<std::string> overrides;
    const char* key;
    const char* rule;
  } cases[] = {
      {{"model.n_kv_heads=3"}, "model.n_kv_heads", "must divide"},
      {{"model.head_dim=33"}, "model.head_dim", "must be even"},
      {{"model.d_model=250", "model.head_dim=auto"}, "model.head_dim", "give it"},
      {{"mla.qk_rope_head_dim=3", "model.attention.kind=mla"},
       "model.attention.mla.qk_rope_head_dim",
       "must be even"},
      {{"model.attention.kind=dsa", "dsa.d_indexer=34"}, "model.attention.dsa.d_indexer", "even"},
      {{"model.attention.kind=dsa", "dsa.core=mla", "mla.qk_rope_head_dim=64", "dsa.d_indexer=32"},
       "model.attention.dsa.d_indexer",
       "at least the rotated"},
      {{"model.attention.kind=dsa", "dsa.core=mla"}, "model.attention.dsa.core", "needs the sizes"},
      {{"model.attention.kind=dsa", "dsa.topk=0"}, "model.attention.dsa.topk", "(is 0)"},
      {{"model.attention.kind=swa", "swa.window=0"}, "model.attention.swa.window", "(is 0)"},
      {{"model.attention.kind=nsa", "nsa.window_size=0"},
       "model.attention.nsa.window_size",
       "(is 0)"},
      {{"model.attention.kind=nsa", "nsa.topk=2"}, "model.attention.nsa.topk", "init_blocks"},
      {{"model.attention.kind=nsa", "nsa.kernel_size=24"},
       "model.attention.nsa.kernel_stride",
       "divide kernel_size"},
      {{"model.attention.kind=nsa", "nsa.block_size=40"},
       "model.attention.nsa.kernel_stride",
       "divide block_size"},
      {{"model.attention.kind=nsa", "nsa.kernel_size=128"},
       "model.attention.nsa.kernel_size",
       "at most block_size"},
      {{"model.attention.kind=gsa", "gsa.k_min=3000"}, "model.attention.gsa.k_min", "k_base"},
      {{"model.attention.kind=gsa", "gsa.k_base=5000"}, "model.attention.gsa.k_base", "k_max"},
      {{"model.moe.n_experts=2", "model.moe.top_k=3"}, "model.moe.top_k", "at most n_experts"},
      {{"model.moe.n_experts=4", "model.moe.n_groups=3"}, "model.moe.n_groups", "must divide"},
      {{"model.moe.n_experts=4", "model.moe.topk_groups=2"}, "model.moe.topk_groups", "n_groups"},
      {{"model.moe.n_experts=8", "model.moe.n_groups=4", "model.moe.top_k=3"},
       "model.moe.top_k",
       "topk_groups hold 2"},
      {{"model.moe.n_experts=4", "model.moe.layers=[9]"}, "model.moe.layers[0]", "below"},
      {{"model.moe.n_experts=60000", "model.n_layers=100"}, "model.moe.n_experts", "tensors"},
      {{"model.attention.kind=mla", "model.attention.qkv_bias=true"},
       "model.attention.qkv_bias",
       "only dense and swa"},
      {{"model.norm_eps=0"}, "model.norm_eps", "must be > 0"},
  };
  settings::LoadOptions options;
  options.search_path = plan_test::PresetPath();
  for (const auto& wrong : cases) {
    std::vector<std::string> overrides = {"data.path=/d"};
    overrides.insert(overrides.end(), wrong.overrides.begin(), wrong.overrides.end());
    const Status refused = settings::Load("tiny", overrides, options).status();
    EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument) << wrong.rule;
    EXPECT_NE(Message(refused).find(Str(wrong.key, ": ")), std::string::npos) << refused;
    ModelConfig config = *plan_test::Preset("tiny-dense");
    plan_test::Set(wrong.overrides, &config);
    const Status status = PlanModel(config).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << wrong.rule;
    EXPECT_EQ(Message(status).rfind(Str(wrong.key, ": "), 0), 0u) << status;
    EXPECT_NE(Message(status).find(wrong.rule), std::string::npos) << status;
  }
}

TEST(ModelPlan, RefusesMoreParametersThanCanBeCounted) {
  ModelConfig config = TinyDense();
  config.set_d_model(1048576);
  config.set_d_ffn(4194304);
  config.set_n_layers(4096);
  EXPECT_NE(Message(PlanModel(config).status()).find("parameters"), std::string::npos);
}

TEST(ModelPlan, NeedsNoHeadWidthWhereEveryLayerProjectsToALatent) {
  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_MLA);
  config.set_n_kv_heads(3);
  config.set_head_dim(33);
  EXPECT_TRUE(PlanModel(config).ok());
  config.mutable_attention()->add_pattern(heddle::v1::ATTENTION_KIND_MLA);
  config.mutable_attention()->add_pattern(heddle::v1::ATTENTION_KIND_SWA);
  EXPECT_FALSE(PlanModel(config).ok());
}

TEST(ModelPlan, EstimatesNothingForAModelItRefuses) {
  ModelConfig config = TinyDense();
  config.set_n_heads(0);
  EXPECT_EQ(EstimateMemory(config, heddle::v1::TrainingConfig(), {}).Total(), 0);
}

// Two units on their way through messages; ranks of one host need none.
TEST(ModelPlan, WhatMpiReceivesIsPlanned) {
  heddle::v1::TrainingConfig training;
  heddle::v1::ParallelConfig parallel;
  parallel.mutable_ranks()->set_max(2);
  parallel.set_shard(heddle::v1::ParallelConfig::SHARD_FULL);
  const int64_t shared = EstimateMemory(SmallDense(), training, parallel).gathered;
  parallel.set_backend(heddle::v1::ParallelConfig::BACKEND_MPI);
  int64_t largest = 0;
  for (const UnitSpec& unit : PlanModel(SmallDense())->units) {
    largest = std::max(largest, 2 * SliceElements(unit, 2));
  }
  EXPECT_EQ(EstimateMemory(SmallDense(), training, parallel).gathered - shared, 2 * 4 * largest);
  parallel.set_shard(heddle::v1::ParallelConfig::SHARD_NONE);
  EXPECT_EQ(EstimateMemory(SmallDense(), training, parallel).gathered, (16 << 20) * 3 / 2);
}

TEST(ModelPlan, StateOfARankShrinksWithTheRanks) {
  heddle::v1::TrainingConfig training;
  heddle::v1::ParallelConfig parallel;
  const MemoryEstimate whole = EstimateMemory(SmallDense(), training, parallel);
  for (const int ranks : {2, 3, 4, 8}) {
    parallel.mutable_ranks()->set_max(ranks);
    parallel.set_shard(heddle::v1::ParallelConfig::SHARD_FULL);
    const MemoryEstimate full = EstimateMemory(SmallDense(), training, parallel);
    const double share = 1.0 / ranks;
    EXPECT_NEAR(static_cast<double>(full.master), share * static_cast<double>(whole.master),
                0.001 * static_cast<double>(whole.master));
    EXPECT_NEAR(static_cast<double>(full.moments), share * static_cast<double>(whole.moments),
                0.001 * static_cast<double>(whole.moments));
    EXPECT_NEAR(static_cast<double>(full.compute_weights),
                share * static_cast<double>(whole.compute_weights),
                0.001 * static_cast<double>(whole.compute_weights));
    EXPECT_GT(full.gathered, 0);
    EXPECT_LT(full.Total(), whole.Total());
    parallel.set_shard(heddle::v1::ParallelConfig::SHARD_OPTIMIZER);
    const MemoryEstimate optimizer = EstimateMemory(SmallDense(), training, parallel);
    EXPECT_EQ(optimizer.master, full.master);
    EXPECT_GT(optimizer.compute_weights, whole.compute_weights) << "the gathered model";
  }
}

TEST(ModelPlan, AccumulationLooksAtTheConfigurationOnly) {
  using heddle::v1::ParallelConfig;
  using heddle::v1::TrainingConfig;
  TrainingConfig training;
  ParallelConfig parallel;
  parallel.mutable_ranks()->set_max(2);
  EXPECT_EQ(AccumulationOf(training, parallel), TrainingConfig::ACCUMULATION_SYNC_LAST);
  parallel.set_shard(ParallelConfig::SHARD_FULL);
  EXPECT_EQ(AccumulationOf(training, parallel), TrainingConfig::ACCUMULATION_SYNC_EACH);
  training.set_gradient_accumulation_steps(4);
  EXPECT_EQ(AccumulationOf(training, parallel), TrainingConfig::ACCUMULATION_SYNC_LAST);
  EXPECT_EQ(MicroBatchesPerRank(training, parallel), 4);
  training.set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  EXPECT_EQ(AccumulationOf(training, parallel), TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  training.set_micro_batch_size(2);
  training.set_global_batch_size(10);
  EXPECT_EQ(MicroBatchesPerRank(training, parallel), 3);
}

TEST(ModelPlan, EstimatesLessMemoryWithRecomputation) {
  heddle::v1::TrainingConfig training;
  const MemoryEstimate all = EstimateMemory(SmallDense(), training, {});
  const ModelPlan plan = *PlanModel(SmallDense());
  EXPECT_EQ(all.master, 4 * plan.flat_elements);
  EXPECT_EQ(all.moments, 8 * plan.flat_elements);
  training.set_moments(heddle::v1::TrainingConfig::MOMENTS_BF16);
  EXPECT_EQ(EstimateMemory(SmallDense(), training, {}).moments, 4 * plan.flat_elements);
  training.set_optimizer(heddle::v1::TrainingConfig::OPTIMIZER_LION);
  EXPECT_EQ(EstimateMemory(SmallDense(), training, {}).moments, 2 * plan.flat_elements);
  training = {};
  EXPECT_EQ(all.compute_weights, 2 * plan.flat_elements);
  training.set_gradient_checkpointing(heddle::v1::TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  const MemoryEstimate full = EstimateMemory(SmallDense(), training, {});
  EXPECT_LT(full.activations, all.activations / 3);
  training.set_gradient_checkpointing(heddle::v1::TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE);
  const MemoryEstimate selective = EstimateMemory(SmallDense(), training, {});
  EXPECT_LT(selective.activations, all.activations * 3 / 4);
  EXPECT_GT(selective.activations, full.activations);
  training.set_precision(heddle::v1::TrainingConfig::PRECISION_FP32);
  EXPECT_EQ(EstimateMemory(SmallDense(), training, {}).compute_weights, 0);
}

}  // namespace
}  // namespace heddle::model
