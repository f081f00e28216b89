// config.json against Transformers' keys, both directions (formats.md F14).
#include "model/hf/config_json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"
#include "tests/model/tiny_model.h"

namespace heddle::hf {
namespace {

using heddle::v1::ModelConfig;
using model_test::Kind;
using model_test::TinyConfig;
using nlohmann::json;

ModelConfig Qwen2() {
  ModelConfig config = TinyConfig(Kind::kDense, false);
  config.mutable_attention()->set_qkv_bias(true);
  return config;
}

ModelConfig Mixtral() {
  ModelConfig config = TinyConfig(Kind::kDense, false);
  config.mutable_moe()->set_n_experts(4);
  config.mutable_moe()->set_d_expert(28);
  return config;
}

ModelConfig Deepseek() {
  ModelConfig config = TinyConfig(Kind::kDense, false);
  config.clear_head_dim();
  config.set_n_kv_heads(4);
  config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_MLA);
  heddle::v1::MlaConfig* mla = config.mutable_attention()->mutable_mla();
  mla->set_q_lora_rank(11);
  mla->set_kv_lora_rank(7);
  mla->set_qk_nope_head_dim(5);
  mla->set_qk_rope_head_dim(4);
  mla->set_v_head_dim(3);
  heddle::v1::MoeConfig* moe = config.mutable_moe();
  moe->set_n_experts(8);
  moe->set_top_k(2);
  moe->set_n_shared(1);
  moe->set_d_expert(6);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_n_groups(2);
  moe->set_topk_groups(1);
  moe->set_route_scale(2.5);
  moe->set_first_dense(1);
  return config;
}

// What a reader that knows nothing of heddle would see.
StatusOr<ModelConfig> ReadWithoutOurGroup(const std::string& text) {
  json object = json::parse(text);
  object.erase("heddle");
  return ReadConfigJson(object.dump());
}

TEST(ConfigJson, NamesTheArchitectureThatComputesTheSame) {
  heddle::v1::ModelConfig dense = TinyConfig(Kind::kDense, true);
  const json llama = json::parse(WriteConfigJson(dense));
  EXPECT_EQ(llama["model_type"], "llama");
  EXPECT_EQ(llama["architectures"][0], "LlamaForCausalLM");
  EXPECT_EQ(llama["num_key_value_heads"], 2);
  EXPECT_EQ(llama["head_dim"], 6);
  heddle::v1::ModelConfig swa = TinyConfig(Kind::kSwa, true);
  EXPECT_EQ(json::parse(WriteConfigJson(swa))["model_type"], "heddle");
  swa.mutable_attention()->mutable_swa()->set_sink_size(0);
  const json mistral = json::parse(WriteConfigJson(swa));
  EXPECT_EQ(mistral["model_type"], "mistral");
  EXPECT_EQ(mistral["sliding_window"], 5);
  EXPECT_EQ(json::parse(WriteConfigJson(TinyConfig(Kind::kHybrid, true)))["model_type"], "heddle");
  dense.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  EXPECT_EQ(json::parse(WriteConfigJson(dense))["model_type"], "heddle");
}

TEST(ConfigJson, ReadsOldAndNewRopeKeysOfTransformers) {
  const heddle::v1::ModelConfig old = *ReadConfigJson(
      R"({"model_type":"llama","hidden_size":64,"num_attention_heads":4,"vocab_size":10,
          "num_hidden_layers":2,"intermediate_size":96,"rope_theta":500000.0,
          "rope_scaling":{"type":"llama3","factor":8.0,"low_freq_factor":1.0,
          "high_freq_factor":4.0,"original_max_position_embeddings":8192}})");
  EXPECT_EQ(old.rope().theta(), 500000.0);
  EXPECT_EQ(old.rope().scaling().type(), heddle::v1::RopeScalingConfig::TYPE_LLAMA3);
  EXPECT_EQ(old.n_kv_heads(), 4);
  EXPECT_EQ(old.head_dim(), 16);
  const heddle::v1::ModelConfig fresh = *ReadConfigJson(
      R"({"model_type":"mistral","hidden_size":64,"num_attention_heads":4,"vocab_size":10,
          "num_hidden_layers":2,"intermediate_size":96,"sliding_window":7,
          "rope_parameters":{"rope_type":"default","rope_theta":1e6}})");
  EXPECT_EQ(fresh.rope().theta(), 1e6);
  EXPECT_EQ(fresh.attention().swa().window(), 7);
  EXPECT_EQ(fresh.attention().swa().sink_size(), 0);
}

TEST(ConfigJson, RefusesWhatItDoesNotCompute) {
  for (const char* text :
       {"[]", "{", R"({"model_type":"gpt2"})", R"({"model_type":"llama","attention_bias":true})",
        R"({"model_type":"llama","hidden_act":"gelu"})",
        R"({"model_type":"llama","rope_scaling":{"rope_type":"dynamic","factor":2}})",
        R"({"model_type":"llama","hidden_size":"64"})", R"({"heddle":{"d_modell":3}})",
        R"({"heddle":{"ffn":"relu"}})", R"({"heddle":{"d_model":4294967296}})"}) {
    EXPECT_EQ(ReadConfigJson(text).status().code(), StatusCode::kInvalidArgument) << text;
  }
}

TEST(ConfigJson, KnowsFiveArchitecturesOfTransformers) {
  const struct {
    ModelConfig config;
    const char* model_type;
    const char* model_class;
  } known[] = {{TinyConfig(Kind::kDense, true), "llama", "LlamaForCausalLM"},
               {Qwen2(), "qwen2", "Qwen2ForCausalLM"},
               {Mixtral(), "mixtral", "MixtralForCausalLM"},
               {Deepseek(), "deepseek_v3", "DeepseekV3ForCausalLM"}};
  for (const auto& row : known) {
    ASSERT_TRUE(model::PlanModel(row.config).ok()) << row.model_type;
    const std::string text = WriteConfigJson(row.config);
    const json object = json::parse(text);
    EXPECT_EQ(object["model_type"], row.model_type);
    EXPECT_EQ(object["architectures"][0], row.model_class);
    // Read back without our own group: the same tensors and the same text again.
    const StatusOr<ModelConfig> back = ReadWithoutOurGroup(text);
    ASSERT_TRUE(back.ok()) << row.model_type << ": " << back.status();
    json again = json::parse(WriteConfigJson(*back));
    json before = object;
    again.erase("heddle");
    before.erase("heddle");
    EXPECT_EQ(again, before) << row.model_type;
    const model::ModelPlan plan = *model::PlanModel(row.config);
    const model::ModelPlan read = *model::PlanModel(*back);
    ASSERT_EQ(plan.tensors.size(), read.tensors.size());
    for (size_t i = 0; i < plan.tensors.size(); ++i) {
      EXPECT_EQ(plan.tensors[i].name, read.tensors[i].name);
      EXPECT_EQ(plan.tensors[i].shape, read.tensors[i].shape);
    }
    // And with it: exactly what was written.
    EXPECT_EQ(ReadConfigJson(text)->moe().SerializeAsString(),
              row.config.moe().SerializeAsString());
  }
}

// One option away from what Transformers computes: our own type.
TEST(ConfigJson, WritesItsOwnTypeForEverythingElse) {
  const auto ours = [](ModelConfig config, const std::function<void(ModelConfig*)>& change) {
    change(&config);
    EXPECT_TRUE(model::PlanModel(config).ok()) << model::PlanModel(config).status();
    return json::parse(WriteConfigJson(config))["model_type"] == "heddle";
  };
  using C = ModelConfig;
  const ModelConfig llama = TinyConfig(Kind::kDense, true);
  EXPECT_TRUE(ours(llama, [](C* c) { c->set_norm(C::NORM_LAYERNORM); }));
  EXPECT_TRUE(ours(llama, [](C* c) { c->set_ffn(C::FFN_GELU); }));
  EXPECT_TRUE(ours(llama, [](C* c) {
    c->mutable_rope()->mutable_scaling()->set_type(heddle::v1::RopeScalingConfig::TYPE_NTK);
  }));
  EXPECT_TRUE(ours(llama, [](C* c) { c->set_d_model(21); }));
  EXPECT_TRUE(ours(Mixtral(), [](C* c) { c->mutable_moe()->set_norm_topk(false); }));
  EXPECT_TRUE(ours(Mixtral(), [](C* c) { c->mutable_moe()->set_n_shared(1); }));
  EXPECT_TRUE(ours(Mixtral(), [](C* c) { c->mutable_moe()->set_every(2); }));
  EXPECT_TRUE(ours(Mixtral(), [](C* c) { c->mutable_moe()->set_capacity_factor(1); }));
  EXPECT_TRUE(ours(Mixtral(), [](C* c) {
    c->mutable_moe()->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  }));
  EXPECT_TRUE(ours(Deepseek(), [](C* c) { c->set_norm_eps(1e-5); }));
  EXPECT_TRUE(ours(Deepseek(), [](C* c) {
    c->mutable_attention()->mutable_mla()->set_latent_norm(
        heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM);
  }));
  EXPECT_TRUE(ours(Deepseek(), [](C* c) { c->mutable_moe()->set_n_shared(0); }));
  EXPECT_TRUE(ours(Deepseek(), [](C* c) {
    c->mutable_moe()->set_router(heddle::v1::MoeConfig::ROUTER_SOFTMAX);
  }));
  EXPECT_FALSE(
      ours(Deepseek(), [](C* c) { c->mutable_attention()->mutable_mla()->set_q_lora_rank(0); }));
  EXPECT_TRUE(
      ours(llama, [](C* c) { c->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_GSA); }));
}

TEST(ConfigJson, ReadsWhichLayersOfQwen2HaveTheWindow) {
  const std::string sizes =
      R"("model_type":"qwen2","hidden_size":64,"num_attention_heads":4,"vocab_size":10,
         "num_hidden_layers":4,"intermediate_size":96,"sliding_window":7,)";
  ModelConfig config =
      *ReadConfigJson("{" + sizes + R"("use_sliding_window":true,"max_window_layers":3})");
  EXPECT_TRUE(config.attention().qkv_bias());
  EXPECT_EQ(model::LayerKind(config, 2), heddle::v1::ATTENTION_KIND_DENSE);
  EXPECT_EQ(model::LayerKind(config, 3), heddle::v1::ATTENTION_KIND_SWA);
  EXPECT_EQ(model::WindowOf(config).keys, 7);
  EXPECT_EQ(model::WindowOf(config).sinks, 0);
  const json written = json::parse(WriteConfigJson(config));
  EXPECT_EQ(written["model_type"], "qwen2");
  EXPECT_EQ(written["max_window_layers"], 3);
  EXPECT_EQ(written["layer_types"][3], "sliding_attention");
  config = *ReadConfigJson("{" + sizes + R"("use_sliding_window":true,"max_window_layers":0})");
  EXPECT_EQ(config.attention().kind(), heddle::v1::ATTENTION_KIND_SWA);
  config = *ReadConfigJson("{" + sizes + R"("max_window_layers":0})");
  EXPECT_EQ(config.attention().kind(), heddle::v1::ATTENTION_KIND_DENSE);
  config = *ReadConfigJson("{" + sizes + R"("use_sliding_window":true,"layer_types":[
      "sliding_attention","full_attention","full_attention","full_attention"]})");
  EXPECT_EQ(model::LayerKind(config, 0), heddle::v1::ATTENTION_KIND_SWA);
  EXPECT_EQ(json::parse(WriteConfigJson(config))["model_type"], "heddle");
  EXPECT_FALSE(ReadConfigJson("{" + sizes + R"("layer_types":["full_attention"]})").ok());
}

// yarn: a factor A on cosines and sines of whole heads is A^2 on the scores; DeepSeek has it there.
TEST(ConfigJson, MapsYarnCorrectionsToTheSoftmaxScale) {
  const auto read = [](const std::string& type, const std::string& scaling) {
    return ReadConfigJson(R"({"model_type":")" + type + R"(","hidden_size":64,"vocab_size":10,
        "num_attention_heads":4,"num_hidden_layers":2,"intermediate_size":96,"qk_rope_head_dim":4,
        "first_k_dense_replace":1,
        "max_position_embeddings":256,"rope_scaling":{"type":"yarn","factor":4.0,
        "original_max_position_embeddings":64)" +
                          scaling + "}}");
  };
  const auto mscale = [&](const std::string& type, const std::string& scaling) {
    const StatusOr<ModelConfig> config = read(type, scaling);
    EXPECT_TRUE(config.ok()) << config.status();
    return config->rope().scaling().mscale();
  };
  EXPECT_NEAR(mscale("llama", ""), 1.0, 1e-12);
  EXPECT_NEAR(mscale("llama", R"(,"attention_factor":1.0)"), 0.0, 1e-12);
  EXPECT_NEAR(mscale("llama", R"(,"attention_factor":1.5)"), 0.5 / (0.1 * std::log(4.0)), 1e-12);
  EXPECT_NEAR(mscale("llama", R"(,"mscale":0.7,"mscale_all_dim":0.7)"), 0.0, 1e-12);
  EXPECT_FALSE(read("llama", R"(,"attention_factor":0.5)").ok());
  EXPECT_FALSE(read("llama", R"(,"truncate":false)").ok());
  EXPECT_NEAR(mscale("deepseek_v3", R"(,"mscale":0.7,"mscale_all_dim":0.7)"), 0.7, 1e-12);
  EXPECT_FALSE(read("deepseek_v3", R"(,"mscale":1.0,"mscale_all_dim":0.7)").ok());
  EXPECT_FALSE(read("deepseek_v3", "").ok());
  for (const char* scaling : {"", R"(,"attention_factor":1.5)"}) {
    const ModelConfig config = *read("llama", scaling);
    const ModelConfig back = *ReadWithoutOurGroup(WriteConfigJson(config));
    EXPECT_NEAR(back.rope().scaling().mscale(), config.rope().scaling().mscale(), 1e-12);
  }
  const ModelConfig deep = *read("deepseek_v3", R"(,"mscale":0.7,"mscale_all_dim":0.7)");
  EXPECT_EQ(json::parse(WriteConfigJson(deep))["rope_scaling"]["mscale_all_dim"], 0.7);
}

// Transformers scales by yarn even where the longest document is the original one.
TEST(ConfigJson, KeepsYarnActiveWhereTransformersDoes) {
  const ModelConfig config = *ReadConfigJson(
      R"({"model_type":"qwen2","max_position_embeddings":64,"rope_scaling":{"type":"yarn",
          "factor":4.0,"original_max_position_embeddings":64}})");
  EXPECT_EQ(config.max_position_embeddings(), 256);
}

TEST(ConfigJson, ReadsDeepseekWithItsDefaults) {
  const ModelConfig config = *ReadConfigJson(R"({"model_type":"deepseek_v3"})");
  EXPECT_EQ(config.attention().mla().q_lora_rank(), 1536);
  EXPECT_EQ(config.moe().n_experts(), 256);
  EXPECT_EQ(config.moe().topk_groups(), 4);
  EXPECT_EQ(config.moe().first_dense(), 3);
  EXPECT_EQ(config.rope().layout(), heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  EXPECT_EQ(model::PlanModel(config)->parameters, 671'026'404'352);
  EXPECT_EQ(ReadConfigJson(R"({"model_type":"deepseek_v3","q_lora_rank":null})")
                ->attention()
                .mla()
                .q_lora_rank(),
            0);
  const ModelConfig v32 = *ReadConfigJson(R"({"model_type":"deepseek_v32"})");
  EXPECT_TRUE(model::LayerUsesLatent(v32, 0));
  // The preset of the same name (attention-and-moe.md section 11).
  EXPECT_EQ(model::PlanModel(v32)->parameters, 671'877'929'216);
}

// product.md section 5: the sizes of MLA make it the core of dsa layers.
TEST(ConfigJson, TakesMlaAsTheCoreWhereItsSizesStand) {
  const auto core = [](const char* attention) {
    return ReadConfigJson(Str(R"({"model_type":"heddle","heddle":{"attention":)", attention, "}}"))
        ->attention()
        .dsa()
        .core();
  };
  EXPECT_EQ(core(R"({"kind":"dsa","mla":{"kv_lora_rank":8}})"), heddle::v1::DsaConfig::CORE_MLA);
  EXPECT_EQ(core(R"({"kind":"dsa","dsa":{"topk":4}})"), heddle::v1::DsaConfig::CORE_GQA);
  EXPECT_EQ(core(R"({"kind":"dsa","dsa":{"core":"gqa"},"mla":{"kv_lora_rank":8}})"),
            heddle::v1::DsaConfig::CORE_GQA);
}

TEST(ConfigJson, RefusesOptionsOfKnownModelsThatItDoesNotCompute) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"model_type":"llama","attention_dropout":0.1})", "attention_dropout"},
      {R"({"model_type":"llama","quantization_config":{"quant_method":"fp8"}})",
       "quantization_config"},
      {R"({"model_type":"llama","partial_rotary_factor":0.5})", "partial_rotary_factor"},
      {R"({"model_type":"llama","num_hidden_layers":18446744073709551615})", "num_hidden_layers"},
      {R"({"model_type":"deepseek_v3","rms_norm_eps":1e-5})", "rms_norm_eps"},
      {R"({"model_type":"deepseek_v3","scoring_func":"softmax"})", "scoring_func"},
      {R"({"model_type":"deepseek_v3","moe_layer_freq":2})", "moe_layer_freq"},
      {R"({"model_type":"deepseek_v3","norm_topk_prob":false})", "norm_topk_prob"},
      {R"({"model_type":"llama","model_type":"llama"})", "repeated"},
      {R"({"heddle":{"moe":{"layers":[4294967299]}}})", "layers"},
      {R"({"heddle":{"d_model":18446744073709551615}})", "d_model"}};
  for (const auto& [text, key] : cases) {
    const Status status = ReadConfigJson(text).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << text;
    EXPECT_NE(Message(status).find(key), std::string::npos) << status;
  }
  EXPECT_FALSE(ReadConfigJson("{\"a\":" + std::string(5'000'000, '[')).ok());
}

}  // namespace
}  // namespace heddle::hf
