// A model folder: config.json, model*.safetensors (with an index if split), tokenizer.json. One
// layout for Hugging Face and heddle (formats.md F13, F17, F18). Torch-free.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
}
namespace heddle::model {
class ParameterStore;
}

namespace heddle::hf {

// Reads DIR/config.json. NOT_FOUND; INVALID_ARGUMENT names file and key.
StatusOr<heddle::v1::ModelConfig> ReadModelConfig(const std::string& dir);

// Fills the master weights (and the compute copy) of a store made for this folder's config.
// INVALID_ARGUMENT lists all missing, unexpected and mis-shaped tensors, and names a tensor with a
// value that is not finite.
Status ReadWeights(const std::string& dir, model::ParameterStore* store);

// One weight to be written, fp32, borrowed for the call.
struct NamedWeight {
  std::string name;
  std::vector<int64_t> shape;
  std::span<const float> values;
};

struct ExportOptions {
  std::string tokenizer_path;  // copied to DIR/tokenizer.json; empty: none
  int64_t shard_bytes_max = 5'000'000'000;
};

// Creates DIR and writes the folder; config.json last, so that a folder without it is incomplete.
// Existing files of the same names are replaced. A tied head is not written.
// INVALID_ARGUMENT if the weights are not those of `config`.
Status WriteModelDir(const std::string& dir, const heddle::v1::ModelConfig& config,
                     const std::vector<NamedWeight>& weights, const ExportOptions& options);

}  // namespace heddle::hf
