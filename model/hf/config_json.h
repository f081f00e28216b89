// config.json of a model folder (formats.md F14): the `model` group to and from Hugging Face's
// keys. What Transformers knows is written under its own model_type; everything else, and always
// our own keys too, stands in the object `heddle`, from which we read back exactly what was
// written.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::hf {

// kDeepseekV32 is read only: it is no model type of the contract (product.md section 5).
enum class Architecture { kLlama, kMistral, kQwen2, kMixtral, kDeepseekV3, kDeepseekV32, kHeddle };

// Which of Transformers' models computes exactly this one, whatever the weights; of MoE models only
// while the selection bias is one that it knows (kMixtral has none). REQUIRES: PlanModel(config)
// is OK.
Architecture ArchitectureOf(const heddle::v1::ModelConfig& config);

// The text of config.json; weights are fp32. `eos`: tokens that end a text, if known.
std::string WriteConfigJson(const heddle::v1::ModelConfig& config, Architecture architecture,
                            const std::vector<int64_t>& eos = {});
inline std::string WriteConfigJson(const heddle::v1::ModelConfig& config) {
  return WriteConfigJson(config, ArchitectureOf(config));
}

// INVALID_ARGUMENT names the key: not JSON, unknown model_type, or an option of a known one that
// heddle does not compute (other biases, activations, rope types, quantized weights). The model
// itself is checked by PlanModel.
StatusOr<heddle::v1::ModelConfig> ReadConfigJson(std::string_view text);

// Architecture under whose tensor names the folder's weights stand: that of `model_type`.
StatusOr<Architecture> ReadArchitecture(std::string_view text);

}  // namespace heddle::hf
