#include "model/hf/config_json.h"

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>

#include "heddle/v1/config.pb.h"
#include "model/hf/message_json.h"
#include "model/model_plan.h"

namespace heddle::hf {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::RopeScalingConfig;
using nlohmann::json;

bool AllLayers(const ModelConfig& config, heddle::v1::AttentionKind kind) {
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    if (model::LayerKind(config, layer) != kind) return false;
  }
  return true;
}

json RopeScalingJson(const ModelConfig& config) {
  const RopeScalingConfig& s = config.rope().scaling();
  switch (s.type()) {
    case RopeScalingConfig::TYPE_LINEAR:
      return {{"rope_type", "linear"}, {"factor", s.factor()}};
    case RopeScalingConfig::TYPE_LLAMA3:
      return {{"rope_type", "llama3"},
              {"factor", s.factor()},
              {"low_freq_factor", s.low_freq_factor()},
              {"high_freq_factor", s.high_freq_factor()},
              {"original_max_position_embeddings", s.original_max_position_embeddings()}};
    case RopeScalingConfig::TYPE_YARN:
      return {{"rope_type", "yarn"},
              {"factor", s.factor()},
              {"beta_fast", s.beta_fast()},
              {"beta_slow", s.beta_slow()},
              {"original_max_position_embeddings", s.original_max_position_embeddings()}};
    default:
      return nullptr;
  }
}

// The resolved group: "auto" values replaced by what they mean.
ModelConfig Resolved(const ModelConfig& config) {
  ModelConfig resolved = config;
  const model::Heads heads = model::HeadsOf(config);
  resolved.set_n_kv_heads(static_cast<int32_t>(heads.kv));
  resolved.set_head_dim(static_cast<int32_t>(heads.dim));
  return resolved;
}

// A value of one type, or the default where the key is absent or null.
template <typename T>
StatusOr<T> Get(const json& object, const char* key, T otherwise) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return otherwise;
  const bool fits = std::is_same_v<T, bool>     ? found->is_boolean()
                    : std::is_integral_v<T>     ? found->is_number_integer()
                    : std::is_same_v<T, double> ? found->is_number()
                                                : found->is_string();
  if (!fits) return InvalidArgument(Str(key, ": unexpected type"));
  return found->get<T>();
}

Status ReadRope(const json& object, ModelConfig* config) {
  // transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling.
  json rope = json::object();
  if (object.contains("rope_scaling") && object["rope_scaling"].is_object()) {
    rope = object["rope_scaling"];
  }
  if (object.contains("rope_parameters") && object["rope_parameters"].is_object()) {
    rope = object["rope_parameters"];
  }
  ASSIGN_OR_RETURN(const double old_theta, Get<double>(object, "rope_theta", 10000.0));
  ASSIGN_OR_RETURN(const double theta, Get<double>(rope, "rope_theta", old_theta));
  config->mutable_rope()->set_theta(theta);
  ASSIGN_OR_RETURN(const std::string old_type, Get<std::string>(rope, "type", "default"));
  ASSIGN_OR_RETURN(const std::string type, Get<std::string>(rope, "rope_type", old_type));
  if (type == "default") return OkStatus();
  RopeScalingConfig* s = config->mutable_rope()->mutable_scaling();
  if (type == "linear") {
    s->set_type(RopeScalingConfig::TYPE_LINEAR);
  } else if (type == "llama3") {
    s->set_type(RopeScalingConfig::TYPE_LLAMA3);
  } else if (type == "yarn") {
    s->set_type(RopeScalingConfig::TYPE_YARN);
  } else {
    return InvalidArgument(Str("rope_scaling.rope_type: '", type, "' is not known"));
  }
  for (const char* key : {"attention_factor", "mscale", "mscale_all_dim", "truncate"}) {
    if (rope.contains(key) && !rope[key].is_null()) {
      return InvalidArgument(Str("rope_scaling.", key, ": not supported"));
    }
  }
  ASSIGN_OR_RETURN(const double factor, Get<double>(rope, "factor", 1.0));
  ASSIGN_OR_RETURN(const double low, Get<double>(rope, "low_freq_factor", 1.0));
  ASSIGN_OR_RETURN(const double high, Get<double>(rope, "high_freq_factor", 4.0));
  ASSIGN_OR_RETURN(const double fast, Get<double>(rope, "beta_fast", 32.0));
  ASSIGN_OR_RETURN(const double slow, Get<double>(rope, "beta_slow", 1.0));
  ASSIGN_OR_RETURN(const int32_t original, Get<int32_t>(rope, "original_max_position_embeddings",
                                                        config->max_position_embeddings()));
  s->set_factor(factor);
  s->set_low_freq_factor(low);
  s->set_high_freq_factor(high);
  s->set_beta_fast(fast);
  s->set_beta_slow(slow);
  s->set_original_max_position_embeddings(original);
  return OkStatus();
}

// A known decoder of Transformers without biases.
Status ReadTransformers(const json& object, bool mistral, ModelConfig* config) {
  ASSIGN_OR_RETURN(const int32_t hidden, Get<int32_t>(object, "hidden_size", 4096));
  ASSIGN_OR_RETURN(const int32_t heads, Get<int32_t>(object, "num_attention_heads", 32));
  ASSIGN_OR_RETURN(const int32_t kv_heads, Get<int32_t>(object, "num_key_value_heads", heads));
  if (heads < 1) return InvalidArgument("num_attention_heads: must be >= 1");
  ASSIGN_OR_RETURN(const int32_t head_dim, Get<int32_t>(object, "head_dim", hidden / heads));
  ASSIGN_OR_RETURN(const int32_t layers, Get<int32_t>(object, "num_hidden_layers", 32));
  ASSIGN_OR_RETURN(const int32_t ffn, Get<int32_t>(object, "intermediate_size", 11008));
  ASSIGN_OR_RETURN(const int32_t vocabulary, Get<int32_t>(object, "vocab_size", 32000));
  ASSIGN_OR_RETURN(const int32_t positions, Get<int32_t>(object, "max_position_embeddings", 2048));
  ASSIGN_OR_RETURN(const double eps, Get<double>(object, "rms_norm_eps", 1e-6));
  ASSIGN_OR_RETURN(const bool tied, Get<bool>(object, "tie_word_embeddings", false));
  ASSIGN_OR_RETURN(const std::string act, Get<std::string>(object, "hidden_act", "silu"));
  ASSIGN_OR_RETURN(const bool attention_bias, Get<bool>(object, "attention_bias", false));
  ASSIGN_OR_RETURN(const bool mlp_bias, Get<bool>(object, "mlp_bias", false));
  if (act != "silu") return InvalidArgument(Str("hidden_act: '", act, "' is not known"));
  if (attention_bias) return InvalidArgument("attention_bias: not supported");
  if (mlp_bias) return InvalidArgument("mlp_bias: not supported");
  config->set_vocab_size(vocabulary);
  config->set_d_model(hidden);
  config->set_n_layers(layers);
  config->set_n_heads(heads);
  config->set_n_kv_heads(kv_heads);
  config->set_head_dim(head_dim);
  config->set_d_ffn(ffn);
  config->set_norm_eps(eps);
  config->set_tie_embeddings(tied);
  config->set_max_position_embeddings(positions);
  if (mistral) {
    ASSIGN_OR_RETURN(const int32_t window, Get<int32_t>(object, "sliding_window", 0));
    if (window > 0) {
      config->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_SWA);
      config->mutable_attention()->mutable_swa()->set_window(window);
      config->mutable_attention()->mutable_swa()->set_sink_size(0);
    }
  }
  return ReadRope(object, config);
}

}  // namespace

Architecture ArchitectureOf(const ModelConfig& config) {
  const bool plain = config.rope().layout() == heddle::v1::RopeConfig::LAYOUT_HALF &&
                     config.rope().scaling().type() != RopeScalingConfig::TYPE_NTK &&
                     !(config.rope().scaling().type() == RopeScalingConfig::TYPE_YARN &&
                       (config.rope().scaling().mscale() != 1.0 ||
                        config.max_position_embeddings() <=
                            config.rope().scaling().original_max_position_embeddings())) &&
                     // transformers 5 refuses a width that the heads do not divide.
                     config.d_model() % config.n_heads() == 0;
  if (!plain) return Architecture::kHeddle;
  if (AllLayers(config, heddle::v1::ATTENTION_KIND_DENSE)) return Architecture::kLlama;
  const bool window = AllLayers(config, heddle::v1::ATTENTION_KIND_SWA);
  return window && model::WindowOf(config).sinks == 0 ? Architecture::kMistral
                                                      : Architecture::kHeddle;
}

std::string WriteConfigJson(const ModelConfig& config) {
  const Architecture architecture = ArchitectureOf(config);
  const ModelConfig resolved = Resolved(config);
  json object;
  object["heddle"] = ToJson(resolved);
  object["vocab_size"] = config.vocab_size();
  object["torch_dtype"] = "float32";
  if (architecture == Architecture::kHeddle) {
    object["architectures"] = {"HeddleForCausalLM"};
    object["model_type"] = "heddle";
    return object.dump(2) + "\n";
  }
  const bool mistral = architecture == Architecture::kMistral;
  object["architectures"] = {mistral ? "MistralForCausalLM" : "LlamaForCausalLM"};
  object["model_type"] = mistral ? "mistral" : "llama";
  object["hidden_size"] = resolved.d_model();
  object["intermediate_size"] = resolved.d_ffn();
  object["num_hidden_layers"] = resolved.n_layers();
  object["num_attention_heads"] = resolved.n_heads();
  object["num_key_value_heads"] = resolved.n_kv_heads();
  object["head_dim"] = resolved.head_dim();
  object["rms_norm_eps"] = resolved.norm_eps();
  object["hidden_act"] = "silu";
  object["tie_word_embeddings"] = resolved.tie_embeddings();
  object["max_position_embeddings"] = resolved.max_position_embeddings();
  object["rope_theta"] = resolved.rope().theta();
  object["rope_scaling"] = RopeScalingJson(resolved);
  if (mistral) {
    object["sliding_window"] = model::WindowOf(config).keys;
  } else {
    object["attention_bias"] = false;
    object["mlp_bias"] = false;
  }
  return object.dump(2) + "\n";
}

StatusOr<ModelConfig> ReadConfigJson(std::string_view text) {
  const json object = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return InvalidArgument("config.json: not a JSON object");
  ModelConfig config;
  if (object.contains("heddle")) {
    RETURN_IF_ERROR(FromJson(object["heddle"], "heddle", &config));
    return config;
  }
  ASSIGN_OR_RETURN(const std::string type, Get<std::string>(object, "model_type", ""));
  if (type != "llama" && type != "mistral") {
    return InvalidArgument(Str("model_type: '", type, "' is none of llama, mistral, heddle"));
  }
  RETURN_IF_ERROR(ReadTransformers(object, type == "mistral", &config));
  return config;
}

}  // namespace heddle::hf
