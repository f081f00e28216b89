// config.json of a model folder (formats.md F14): the `model` group to and from Hugging Face's
// keys. What Transformers knows is written under its own model_type; everything else, and always
// our own keys too, stands in the object `heddle`, from which we read back exactly what was
// written.
#pragma once

#include <string>
#include <string_view>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::hf {

enum class Architecture { kLlama, kMistral, kHeddle };

// Which of Transformers' models computes exactly this one.
Architecture ArchitectureOf(const heddle::v1::ModelConfig& config);

// The text of config.json; weights are fp32.
std::string WriteConfigJson(const heddle::v1::ModelConfig& config);

// INVALID_ARGUMENT names the key: not JSON, unknown model_type, or an option of a known one that
// heddle does not compute (biases, other activations, unknown rope types).
StatusOr<heddle::v1::ModelConfig> ReadConfigJson(std::string_view text);

}  // namespace heddle::hf
