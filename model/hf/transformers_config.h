// The keys of Transformers' own models: what a config.json of Llama, Mistral, Qwen2, Mixtral or
// DeepSeek-V3 means here (formats.md F14). Internal to model/hf.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "base/status/status.h"
#include "model/hf/config_json.h"

namespace heddle::hf {

// By `model_type`; kHeddle for a word that is none of Transformers' we read.
Architecture ArchitectureNamed(const std::string& model_type);

// INVALID_ARGUMENT names a key that heddle does not compute. REQUIRES: not kHeddle.
StatusOr<heddle::v1::ModelConfig> ReadTransformers(const nlohmann::json& object,
                                                   Architecture architecture);

// The keys of `config` for that architecture. REQUIRES: ArchitectureOf allows it.
nlohmann::json TransformersJson(const heddle::v1::ModelConfig& config, Architecture architecture);

}  // namespace heddle::hf
