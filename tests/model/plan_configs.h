// Configurations for the tests of the plan: small shapes of every kind, and presets by name.
#pragma once

#include <google/protobuf/text_format.h>

#include <cctype>
#include <cstdlib>
#include <string>

#include "base/settings/settings.h"
#include "heddle/v1/config.pb.h"

namespace heddle::plan_test {

using heddle::v1::AttentionKind;
using heddle::v1::ModelConfig;

inline ModelConfig TinyDense() {
  ModelConfig config;
  config.set_vocab_size(8192);
  config.set_d_model(256);
  config.set_n_layers(4);
  config.set_n_heads(4);
  config.set_n_kv_heads(2);
  config.set_head_dim(64);
  config.set_d_ffn(688);
  config.set_tie_embeddings(true);
  return config;
}

inline ModelConfig OfKind(AttentionKind kind) {
  ModelConfig config = TinyDense();
  config.mutable_attention()->set_kind(kind);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->mutable_swa()->set_window(64);
  heddle::v1::NsaConfig* nsa = attention->mutable_nsa();
  nsa->set_kernel_size(16);
  nsa->set_kernel_stride(8);
  nsa->set_block_size(32);
  nsa->set_topk(4);
  nsa->set_window_size(64);
  heddle::v1::DsaConfig* dsa = attention->mutable_dsa();
  dsa->set_n_indexer_heads(2);
  dsa->set_d_indexer(32);
  dsa->set_topk(64);
  heddle::v1::GsaConfig* gsa = attention->mutable_gsa();
  gsa->set_n_indexer_heads(2);
  gsa->set_d_indexer(32);
  gsa->set_k_base(64);
  gsa->set_k_min(32);
  gsa->set_k_max(128);
  if (kind == heddle::v1::ATTENTION_KIND_MLA) {
    heddle::v1::MlaConfig* mla = attention->mutable_mla();
    mla->set_kv_lora_rank(128);
    mla->set_qk_nope_head_dim(32);
    mla->set_qk_rope_head_dim(32);
    mla->set_v_head_dim(64);
  }
  return config;
}

// DSA over the latent of MLA.
inline ModelConfig DsaOnMla(int q_lora_rank) {
  ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_MLA);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  config.mutable_attention()->mutable_dsa()->set_core(heddle::v1::DsaConfig::CORE_MLA);
  config.mutable_attention()->mutable_mla()->set_q_lora_rank(q_lora_rank);
  return config;
}

inline std::vector<std::string> PresetPath() {
  const char* source = std::getenv("HEDDLE_SOURCE_DIR");
  return {std::string(source == nullptr ? "." : source) + "/configs"};
}

inline StatusOr<ModelConfig> Preset(const std::string& name) {
  settings::LoadOptions options;
  options.search_path = PresetPath();
  ASSIGN_OR_RETURN(const settings::ResolvedConfig resolved,
                   settings::Load("tiny", {"data.path=/d", "model=" + name}, options));
  return resolved.config.model();
}

// Sets keys of group `model` without any check: "model.a.b=v", and groups of attention by their
// short names ("nsa.topk=2").
inline void Set(const std::vector<std::string>& overrides, ModelConfig* config) {
  for (std::string key : overrides) {
    key = key.rfind("model.", 0) == 0 ? key.substr(6) : "attention." + key;
    std::string value = key.substr(key.find('=') + 1);
    key.erase(key.find('='));
    const auto upper = [](std::string text) {
      for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
      return text;
    };
    if (value == "auto") value = "0";
    if (key == "attention.kind") value = "ATTENTION_KIND_" + upper(value);
    if (key == "attention.dsa.core") value = "CORE_" + upper(value);
    if (value.front() == '[') value = value.substr(1, value.size() - 2);
    size_t dot = key.rfind('.');
    std::string text = Str(key.substr(dot == std::string::npos ? 0 : dot + 1), ": ", value);
    while (dot != std::string::npos) {
      key.erase(dot);
      dot = key.rfind('.');
      text = Str(key.substr(dot == std::string::npos ? 0 : dot + 1), " { ", text, " }");
    }
    HEDDLE_CHECK(google::protobuf::TextFormat::MergeFromString(text, config), text);
  }
}

}  // namespace heddle::plan_test
