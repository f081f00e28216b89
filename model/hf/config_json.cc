#include "model/hf/config_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "heddle/v1/config.pb.h"
#include "model/hf/json_values.h"
#include "model/hf/message_json.h"
#include "model/hf/rope_json.h"
#include "model/hf/transformers_config.h"
#include "model/model_plan.h"

namespace heddle::hf {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::MoeConfig;
using heddle::v1::RopeConfig;
using nlohmann::json;

constexpr int kDepthMax = 32;
constexpr double kDeepseekLatentEps = 1e-6;

bool IsKind(const ModelConfig& config, int layer, heddle::v1::AttentionKind kind) {
  return model::LayerKind(config, layer) == kind;
}

bool AllLayers(const ModelConfig& config, heddle::v1::AttentionKind kind) {
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    if (!IsKind(config, layer, kind)) return false;
  }
  return true;
}

// Layers of the whole context first, then layers with a window and no sinks; either may lack.
bool FullThenWindows(const ModelConfig& config) {
  bool windows = false;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    const bool window = IsKind(config, layer, heddle::v1::ATTENTION_KIND_SWA);
    if (!window && (windows || !IsKind(config, layer, heddle::v1::ATTENTION_KIND_DENSE))) {
      return false;
    }
    windows = windows || window;
  }
  return !windows || model::WindowOf(config).sinks == 0;
}

// Every layer alike: the whole context, or a window without sinks.
bool OneReach(const ModelConfig& config) {
  return AllLayers(config, heddle::v1::ATTENTION_KIND_DENSE) ||
         (AllLayers(config, heddle::v1::ATTENTION_KIND_SWA) && model::WindowOf(config).sinks == 0);
}

bool IsMixtral(const ModelConfig& config) {
  const MoeConfig& moe = config.moe();
  return moe.router() == MoeConfig::ROUTER_SOFTMAX && moe.norm_topk() && moe.route_scale() == 1.0 &&
         moe.n_shared() == 0 && moe.every() == 1 && moe.layers_size() == 0 &&
         moe.first_dense() == 0 && moe.n_groups() == 1 && moe.capacity_factor() == 0.0 &&
         OneReach(config);
}

bool IsDeepseek(const ModelConfig& config) {
  const MoeConfig& moe = config.moe();
  return moe.n_experts() > 0 && moe.router() == MoeConfig::ROUTER_SIGMOID && moe.n_shared() > 0 &&
         moe.every() == 1 && moe.layers_size() == 0 && moe.first_dense() < config.n_layers() &&
         moe.n_experts() / std::max(moe.n_groups(), 1) >= 2 && moe.capacity_factor() == 0.0 &&
         config.norm_eps() == kDeepseekLatentEps &&
         config.attention().mla().latent_norm() == heddle::v1::MlaConfig::LATENT_NORM_RMSNORM;
}

bool AnyLayer(const ModelConfig& config, heddle::v1::AttentionKind kind) {
  const auto& pattern = config.attention().pattern();
  return pattern.empty() ? config.attention().kind() == kind
                         : std::find(pattern.begin(), pattern.end(), kind) != pattern.end();
}

// The resolved group: "auto" values replaced by what they mean. Models of latents alone have no
// head width (product.md section 5).
ModelConfig Resolved(const ModelConfig& config) {
  ModelConfig resolved = config;
  bool latent = true;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    latent = latent && model::LayerUsesLatent(config, layer);
  }
  const model::Heads heads = model::HeadsOf(config);
  resolved.set_n_kv_heads(static_cast<int32_t>(latent ? heads.query : heads.kv));
  resolved.set_head_dim(static_cast<int32_t>(heads.dim));
  if (latent) resolved.clear_head_dim();
  if (AnyLayer(config, heddle::v1::ATTENTION_KIND_DSA)) {
    heddle::v1::DsaConfig* dsa = resolved.mutable_attention()->mutable_dsa();
    dsa->set_core(dsa->core());
  }
  return resolved;
}

}  // namespace

Architecture ArchitectureOf(const ModelConfig& config) {
  const bool plain = config.norm() == ModelConfig::NORM_RMSNORM &&
                     config.ffn() == ModelConfig::FFN_SWIGLU && KnowsRope(config) &&
                     // transformers 5 refuses a width that the heads do not divide.
                     config.d_model() % config.n_heads() == 0;
  if (!plain) return Architecture::kHeddle;
  if (AllLayers(config, heddle::v1::ATTENTION_KIND_MLA)) {
    return IsDeepseek(config) ? Architecture::kDeepseekV3 : Architecture::kHeddle;
  }
  if (config.rope().layout() != RopeConfig::LAYOUT_HALF) return Architecture::kHeddle;
  const bool experts = config.moe().n_experts() > 0;
  if (config.attention().qkv_bias()) {
    return !experts && FullThenWindows(config) ? Architecture::kQwen2 : Architecture::kHeddle;
  }
  if (experts) return IsMixtral(config) ? Architecture::kMixtral : Architecture::kHeddle;
  if (!OneReach(config)) return Architecture::kHeddle;
  return IsKind(config, 0, heddle::v1::ATTENTION_KIND_DENSE) ? Architecture::kLlama
                                                             : Architecture::kMistral;
}

std::string WriteConfigJson(const ModelConfig& config, Architecture architecture,
                            const std::vector<int64_t>& eos) {
  const ModelConfig resolved = Resolved(config);
  json object = architecture == Architecture::kHeddle
                    ? json{{"architectures", {"HeddleForCausalLM"}}, {"model_type", "heddle"}}
                    : TransformersJson(resolved, architecture);
  object["heddle"] = ToJson(resolved);
  object["vocab_size"] = config.vocab_size();
  // One id is written as a number: older readers know no list.
  if (!eos.empty()) object["eos_token_id"] = eos.size() == 1 ? json(eos[0]) : json(eos);
  object["torch_dtype"] = "float32";
  object["dtype"] = "float32";
  return object.dump(2) + "\n";
}

StatusOr<ModelConfig> ReadConfigJson(std::string_view text) {
  ASSIGN_OR_RETURN(const json object, ParseJsonObject(text, kDepthMax));
  if (object.contains("heddle")) {
    ModelConfig config;
    RETURN_IF_ERROR(FromJson(object["heddle"], "heddle", &config));
    // The sizes of an MLA group make it the core of dsa layers (product.md section 5).
    heddle::v1::AttentionConfig* attention = config.mutable_attention();
    if (AnyLayer(config, heddle::v1::ATTENTION_KIND_DSA) && attention->has_mla() &&
        !attention->dsa().has_core()) {
      attention->mutable_dsa()->set_core(heddle::v1::DsaConfig::CORE_MLA);
    }
    return config;
  }
  ASSIGN_OR_RETURN(const std::string type, Get<std::string>(object, "model_type", ""));
  const Architecture architecture = ArchitectureNamed(type);
  if (architecture == Architecture::kHeddle) {
    return InvalidArgument(
        Str("model_type: '", type,
            "' is none of llama, mistral, qwen2, mixtral, deepseek_v3, deepseek_v32, "
            "heddle"));
  }
  return ReadTransformers(object, architecture);
}

StatusOr<Architecture> ReadArchitecture(std::string_view text) {
  ASSIGN_OR_RETURN(const json object, ParseJsonObject(text, kDepthMax));
  ASSIGN_OR_RETURN(const std::string type, Get<std::string>(object, "model_type", ""));
  return ArchitectureNamed(type);
}

}  // namespace heddle::hf
