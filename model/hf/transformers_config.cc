#include "model/hf/transformers_config.h"

#include <nlohmann/json.hpp>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "model/hf/json_values.h"
#include "model/hf/rope_json.h"
#include "model/model_plan.h"

namespace heddle::hf {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::MoeConfig;
using heddle::v1::RopeConfig;
using nlohmann::json;

// What Transformers' class takes where config.json has no such key.
struct Defaults {
  int32_t vocabulary = 32000;
  int32_t hidden = 4096;
  int32_t ffn = 11008;
  int32_t layers = 32;
  int32_t heads = 32;
  int32_t positions = 2048;
  double eps = 1e-6;
  double theta = 10000.0;
};

Defaults DefaultsOf(Architecture architecture) {
  switch (architecture) {
    case Architecture::kMistral:
      return {.ffn = 14336, .positions = 131072};
    case Architecture::kQwen2:
      return {.vocabulary = 151936, .ffn = 22016, .positions = 32768};
    case Architecture::kMixtral:
      return {.ffn = 14336, .positions = 131072, .eps = 1e-5, .theta = 1e6};
    case Architecture::kDeepseekV3:
    case Architecture::kDeepseekV32:
      return {.vocabulary = 129280,
              .hidden = 7168,
              .ffn = 18432,
              .layers = 61,
              .heads = 128,
              .positions = 4096};
    default:
      return {};
  }
}

bool IsDeepseek(Architecture architecture) {
  return architecture == Architecture::kDeepseekV3 || architecture == Architecture::kDeepseekV32;
}

// Options that change what is computed and that no layer here has.
Status RefuseUnknown(const json& object) {
  ASSIGN_OR_RETURN(const std::string act, Get<std::string>(object, "hidden_act", "silu"));
  if (act != "silu") return InvalidArgument(Str("hidden_act: '", act, "' is not known"));
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    ASSIGN_OR_RETURN(const bool set, Get<bool>(object, key, false));
    if (set) return InvalidArgument(Str(key, ": not supported"));
  }
  ASSIGN_OR_RETURN(const double dropout, Get<double>(object, "attention_dropout", 0.0));
  if (dropout != 0.0) return InvalidArgument("attention_dropout: there is no attention dropout");
  if (object.contains("quantization_config") && !object["quantization_config"].is_null()) {
    return InvalidArgument("quantization_config: quantized weights are not read");
  }
  return OkStatus();
}

Status ReadSizes(const json& object, Architecture architecture, ModelConfig* config) {
  const Defaults otherwise = DefaultsOf(architecture);
  ASSIGN_OR_RETURN(const int32_t hidden, Get<int32_t>(object, "hidden_size", otherwise.hidden));
  ASSIGN_OR_RETURN(const int32_t heads,
                   Get<int32_t>(object, "num_attention_heads", otherwise.heads));
  ASSIGN_OR_RETURN(const int32_t kv_heads, Get<int32_t>(object, "num_key_value_heads", heads));
  if (heads < 1) return InvalidArgument("num_attention_heads: must be >= 1");
  ASSIGN_OR_RETURN(const int32_t layers,
                   Get<int32_t>(object, "num_hidden_layers", otherwise.layers));
  ASSIGN_OR_RETURN(const int32_t ffn, Get<int32_t>(object, "intermediate_size", otherwise.ffn));
  ASSIGN_OR_RETURN(const int32_t vocabulary,
                   Get<int32_t>(object, "vocab_size", otherwise.vocabulary));
  ASSIGN_OR_RETURN(const int32_t positions,
                   Get<int32_t>(object, "max_position_embeddings", otherwise.positions));
  ASSIGN_OR_RETURN(const double eps, Get<double>(object, "rms_norm_eps", otherwise.eps));
  ASSIGN_OR_RETURN(const bool tied, Get<bool>(object, "tie_word_embeddings", false));
  config->set_vocab_size(vocabulary);
  config->set_d_model(hidden);
  config->set_n_layers(layers);
  config->set_n_heads(heads);
  config->set_n_kv_heads(kv_heads);
  config->set_d_ffn(ffn);
  config->set_norm_eps(eps);
  config->set_tie_embeddings(tied);
  config->set_max_position_embeddings(positions);
  config->mutable_rope()->set_theta(otherwise.theta);
  if (IsDeepseek(architecture)) return OkStatus();  // no heads of one width
  ASSIGN_OR_RETURN(const int32_t head_dim, Get<int32_t>(object, "head_dim", hidden / heads));
  config->set_head_dim(head_dim);
  return OkStatus();
}

void SetWindow(int32_t window, ModelConfig* config) {
  config->mutable_attention()->mutable_swa()->set_window(window);
  config->mutable_attention()->mutable_swa()->set_sink_size(0);
}

// Every layer has the window.
Status ReadWindow(const json& object, int32_t otherwise, ModelConfig* config) {
  const bool absent = !object.contains("sliding_window");
  ASSIGN_OR_RETURN(const int32_t window, Get<int32_t>(object, "sliding_window", 0));
  const int32_t keys = absent ? otherwise : window;
  if (keys == 0) return OkStatus();
  config->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_SWA);
  SetWindow(keys, config);
  return OkStatus();
}

// Layers from max_window_layers on have the window, or those of layer_types.
Status ReadQwen2(const json& object, ModelConfig* config) {
  config->mutable_attention()->set_qkv_bias(true);
  ASSIGN_OR_RETURN(const bool windows, Get<bool>(object, "use_sliding_window", false));
  ASSIGN_OR_RETURN(const int32_t window,
                   Get<int32_t>(object, "sliding_window", windows ? 4096 : 0));
  ASSIGN_OR_RETURN(const int32_t first, Get<int32_t>(object, "max_window_layers", 28));
  std::vector<bool> sliding;
  const auto types = object.find("layer_types");
  for (int32_t layer = 0; layer < config->n_layers(); ++layer) {
    bool slides = windows && window > 0 && layer >= first;
    if (types != object.end() && types->is_array()) {
      const size_t at = static_cast<size_t>(layer);
      const bool word = at < types->size() && (*types)[at].is_string();
      const std::string type = word ? (*types)[at].get<std::string>() : "";
      if (type != "sliding_attention" && type != "full_attention") {
        return InvalidArgument(Str("layer_types[", layer, "]: '", type, "' is not known"));
      }
      slides = type == "sliding_attention" && windows && window > 0;
    }
    sliding.push_back(slides);
    if (layer >= 4096) break;  // refused as a range
  }
  const bool any = std::find(sliding.begin(), sliding.end(), true) != sliding.end();
  const bool all = std::find(sliding.begin(), sliding.end(), false) == sliding.end();
  if (!any) return OkStatus();
  SetWindow(window, config);
  if (all) config->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_SWA);
  for (size_t layer = 0; !all && layer < sliding.size(); ++layer) {
    config->mutable_attention()->add_pattern(sliding[layer] ? heddle::v1::ATTENTION_KIND_SWA
                                                            : heddle::v1::ATTENTION_KIND_DENSE);
  }
  return OkStatus();
}

Status ReadMixtral(const json& object, ModelConfig* config) {
  RETURN_IF_ERROR(ReadWindow(object, 0, config));
  MoeConfig* moe = config->mutable_moe();
  ASSIGN_OR_RETURN(const int32_t experts, Get<int32_t>(object, "num_local_experts", 8));
  ASSIGN_OR_RETURN(const int32_t chosen, Get<int32_t>(object, "num_experts_per_tok", 2));
  ASSIGN_OR_RETURN(const double aux, Get<double>(object, "router_aux_loss_coef", 0.001));
  moe->set_n_experts(experts);
  moe->set_top_k(chosen);
  moe->set_d_expert(config->d_ffn());
  moe->set_aux_loss(aux);
  moe->set_router(MoeConfig::ROUTER_SOFTMAX);
  moe->set_norm_topk(true);
  return OkStatus();
}

Status ReadLatent(const json& object, ModelConfig* config) {
  heddle::v1::AttentionConfig* attention = config->mutable_attention();
  attention->set_kind(heddle::v1::ATTENTION_KIND_MLA);
  heddle::v1::MlaConfig* mla = attention->mutable_mla();
  // Null: queries without a latent. Absent: the default of the class.
  const int32_t absent = object.contains("q_lora_rank") ? 0 : 1536;
  ASSIGN_OR_RETURN(const int32_t q_rank, Get<int32_t>(object, "q_lora_rank", absent));
  ASSIGN_OR_RETURN(const int32_t kv_rank, Get<int32_t>(object, "kv_lora_rank", 512));
  ASSIGN_OR_RETURN(const int32_t nope, Get<int32_t>(object, "qk_nope_head_dim", 128));
  ASSIGN_OR_RETURN(const int32_t rope, Get<int32_t>(object, "qk_rope_head_dim", 64));
  ASSIGN_OR_RETURN(const int32_t value, Get<int32_t>(object, "v_head_dim", 128));
  ASSIGN_OR_RETURN(const bool interleaved, Get<bool>(object, "rope_interleave", true));
  mla->set_q_lora_rank(q_rank);
  mla->set_kv_lora_rank(kv_rank);
  mla->set_qk_nope_head_dim(nope);
  mla->set_qk_rope_head_dim(rope);
  mla->set_v_head_dim(value);
  config->mutable_rope()->set_layout(interleaved ? RopeConfig::LAYOUT_INTERLEAVED
                                                 : RopeConfig::LAYOUT_HALF);
  config->set_n_kv_heads(config->n_heads());
  if (config->norm_eps() != 1e-6) {
    return InvalidArgument(
        "rms_norm_eps: Transformers norms the latents with 1e-6 whatever this says; heddle has one "
        "epsilon");
  }
  return OkStatus();
}

Status ReadDeepseek(const json& object, ModelConfig* config) {
  RETURN_IF_ERROR(ReadLatent(object, config));
  MoeConfig* moe = config->mutable_moe();
  ASSIGN_OR_RETURN(const int32_t experts, Get<int32_t>(object, "n_routed_experts", 256));
  ASSIGN_OR_RETURN(const int32_t chosen, Get<int32_t>(object, "num_experts_per_tok", 8));
  ASSIGN_OR_RETURN(const int32_t shared, Get<int32_t>(object, "n_shared_experts", 1));
  ASSIGN_OR_RETURN(const int32_t width, Get<int32_t>(object, "moe_intermediate_size", 2048));
  ASSIGN_OR_RETURN(const double scale, Get<double>(object, "routed_scaling_factor", 2.5));
  ASSIGN_OR_RETURN(const bool norm, Get<bool>(object, "norm_topk_prob", true));
  ASSIGN_OR_RETURN(const int32_t groups, Get<int32_t>(object, "n_group", 8));
  ASSIGN_OR_RETURN(const int32_t chosen_groups, Get<int32_t>(object, "topk_group", 4));
  ASSIGN_OR_RETURN(const int32_t first, Get<int32_t>(object, "first_k_dense_replace", 3));
  ASSIGN_OR_RETURN(const int32_t every, Get<int32_t>(object, "moe_layer_freq", 1));
  ASSIGN_OR_RETURN(const std::string scores, Get<std::string>(object, "scoring_func", "sigmoid"));
  if (scores != "sigmoid") return InvalidArgument(Str("scoring_func: '", scores, "' is not known"));
  if (every != 1) return InvalidArgument("moe_layer_freq: only 1 is known");
  if (!norm) {
    return InvalidArgument(
        "norm_topk_prob: false, but heddle normalises weights of sigmoid scores");
  }
  // Layers here without an expert need no mixture at all.
  if (first >= config->n_layers()) {
    config->clear_moe();
    return OkStatus();
  }
  moe->set_n_experts(experts);
  moe->set_top_k(chosen);
  moe->set_n_shared(shared);
  moe->set_d_expert(width);
  moe->set_route_scale(scale);
  moe->set_router(MoeConfig::ROUTER_SIGMOID);
  moe->set_norm_topk(true);
  moe->set_n_groups(groups);
  moe->set_topk_groups(chosen_groups);
  moe->set_first_dense(first);
  moe->set_aux_form(MoeConfig::AUX_FORM_SEQUENCE);
  moe->set_aux_loss(1e-4);
  return OkStatus();
}

// The lightning indexer of DeepSeek-V3.2 over the latent.
Status ReadIndexer(const json& object, ModelConfig* config) {
  ASSIGN_OR_RETURN(const int32_t keys, Get<int32_t>(object, "index_topk", 2048));
  ASSIGN_OR_RETURN(const int32_t heads, Get<int32_t>(object, "index_n_heads", 64));
  ASSIGN_OR_RETURN(const int32_t width, Get<int32_t>(object, "index_head_dim", 128));
  heddle::v1::DsaConfig* dsa = config->mutable_attention()->mutable_dsa();
  config->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  dsa->set_core(heddle::v1::DsaConfig::CORE_MLA);
  dsa->set_profile(heddle::v1::DsaConfig::PROFILE_V32);
  dsa->set_topk(keys);
  dsa->set_n_indexer_heads(heads);
  dsa->set_d_indexer(width);
  return OkStatus();
}

struct Names {
  Architecture architecture;
  const char* model_type;
  const char* model_class;
};
constexpr Names kNames[] = {{Architecture::kLlama, "llama", "LlamaForCausalLM"},
                            {Architecture::kMistral, "mistral", "MistralForCausalLM"},
                            {Architecture::kQwen2, "qwen2", "Qwen2ForCausalLM"},
                            {Architecture::kMixtral, "mixtral", "MixtralForCausalLM"},
                            {Architecture::kDeepseekV3, "deepseek_v3", "DeepseekV3ForCausalLM"},
                            {Architecture::kDeepseekV32, "deepseek_v32", "DeepseekV32ForCausalLM"}};

void AddQwen2(const ModelConfig& config, json* object) {
  const int32_t layers = config.n_layers();
  int32_t first = layers;
  json types = json::array();
  for (int32_t layer = 0; layer < layers; ++layer) {
    const bool slides = model::LayerKind(config, layer) == heddle::v1::ATTENTION_KIND_SWA;
    if (slides && first == layers) first = layer;
    types.push_back(slides ? "sliding_attention" : "full_attention");
  }
  (*object)["use_sliding_window"] = first < layers;
  (*object)["sliding_window"] = first < layers ? json(model::WindowOf(config).keys) : json(nullptr);
  (*object)["max_window_layers"] = first;
  (*object)["layer_types"] = types;
}

void AddWindow(const ModelConfig& config, json* object) {
  const bool slides = model::LayerKind(config, 0) == heddle::v1::ATTENTION_KIND_SWA;
  (*object)["sliding_window"] = slides ? json(model::WindowOf(config).keys) : json(nullptr);
}

void AddMixtral(const ModelConfig& config, json* object) {
  AddWindow(config, object);
  (*object)["intermediate_size"] = config.moe().d_expert();
  (*object)["num_local_experts"] = config.moe().n_experts();
  (*object)["num_experts_per_tok"] = config.moe().top_k();
  (*object)["router_aux_loss_coef"] = config.moe().aux_loss();
}

void AddDeepseek(const ModelConfig& config, json* object) {
  const heddle::v1::MlaConfig& mla = config.attention().mla();
  const MoeConfig& moe = config.moe();
  json& o = *object;
  o["q_lora_rank"] = mla.q_lora_rank() > 0 ? json(mla.q_lora_rank()) : json(nullptr);
  o["kv_lora_rank"] = mla.kv_lora_rank();
  o["qk_nope_head_dim"] = mla.qk_nope_head_dim();
  o["qk_rope_head_dim"] = mla.qk_rope_head_dim();
  o["v_head_dim"] = mla.v_head_dim();
  o["rope_interleave"] = config.rope().layout() == RopeConfig::LAYOUT_INTERLEAVED;
  o["num_key_value_heads"] = config.n_heads();
  o["attention_bias"] = false;
  o["n_routed_experts"] = moe.n_experts();
  o["num_experts_per_tok"] = moe.top_k();
  o["n_shared_experts"] = moe.n_shared();
  o["moe_intermediate_size"] = moe.d_expert();
  o["routed_scaling_factor"] = moe.route_scale();
  o["norm_topk_prob"] = true;  // sigmoid scores always are (attention-and-moe.md section 9)
  o["n_group"] = moe.n_groups();
  o["topk_group"] = moe.topk_groups();
  o["first_k_dense_replace"] = moe.first_dense();
  o["moe_layer_freq"] = 1;
  o["scoring_func"] = "sigmoid";
  o["topk_method"] = "noaux_tc";
  o.erase("head_dim");
}

}  // namespace

Architecture ArchitectureNamed(const std::string& model_type) {
  for (const Names& names : kNames) {
    if (model_type == names.model_type) return names.architecture;
  }
  return Architecture::kHeddle;
}

StatusOr<ModelConfig> ReadTransformers(const json& object, Architecture architecture) {
  ModelConfig config;
  RETURN_IF_ERROR(RefuseUnknown(object));
  RETURN_IF_ERROR(ReadSizes(object, architecture, &config));
  switch (architecture) {
    case Architecture::kMistral:
      RETURN_IF_ERROR(ReadWindow(object, 4096, &config));
      break;
    case Architecture::kQwen2:
      RETURN_IF_ERROR(ReadQwen2(object, &config));
      break;
    case Architecture::kMixtral:
      RETURN_IF_ERROR(ReadMixtral(object, &config));
      break;
    case Architecture::kDeepseekV3:
      RETURN_IF_ERROR(ReadDeepseek(object, &config));
      break;
    case Architecture::kDeepseekV32:
      RETURN_IF_ERROR(ReadDeepseek(object, &config));
      RETURN_IF_ERROR(ReadIndexer(object, &config));
      break;
    default:
      break;
  }
  RETURN_IF_ERROR(ReadRope(object, IsDeepseek(architecture), &config));
  return config;
}

json TransformersJson(const ModelConfig& config, Architecture architecture) {
  const model::Heads heads = model::HeadsOf(config);
  json object;
  for (const Names& names : kNames) {
    if (names.architecture != architecture) continue;
    object["architectures"] = {names.model_class};
    object["model_type"] = names.model_type;
  }
  object["hidden_size"] = config.d_model();
  object["intermediate_size"] = config.d_ffn();
  object["num_hidden_layers"] = config.n_layers();
  object["num_attention_heads"] = config.n_heads();
  object["num_key_value_heads"] = heads.kv;
  object["head_dim"] = heads.dim;
  object["rms_norm_eps"] = config.norm_eps();
  object["hidden_act"] = "silu";
  object["tie_word_embeddings"] = config.tie_embeddings();
  object["max_position_embeddings"] = config.max_position_embeddings();
  object["rope_theta"] = config.rope().theta();
  object["rope_scaling"] = RopeScalingJson(config, architecture == Architecture::kDeepseekV3);
  switch (architecture) {
    case Architecture::kLlama:
      object["attention_bias"] = false;
      object["mlp_bias"] = false;
      break;
    case Architecture::kMistral:
      AddWindow(config, &object);
      break;
    case Architecture::kQwen2:
      AddQwen2(config, &object);
      break;
    case Architecture::kMixtral:
      AddMixtral(config, &object);
      break;
    default:
      AddDeepseek(config, &object);
  }
  return object;
}

}  // namespace heddle::hf
