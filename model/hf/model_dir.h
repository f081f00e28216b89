// A model folder: config.json, model*.safetensors (with an index if split), tokenizer.json. One
// layout for Hugging Face and heddle (formats.md F13, F17, F18). Torch-free.
#pragma once

#include <cstdint>
#include <functional>
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
struct ModelPlan;
}  // namespace heddle::model

namespace heddle::hf {

// Reads DIR/config.json. NOT_FOUND; INVALID_ARGUMENT names file and key.
StatusOr<heddle::v1::ModelConfig> ReadModelConfig(const std::string& dir);

// Tokens that end a text: `eos_token_id`, an integer or a list, of DIR/generation_config.json, else
// of DIR/config.json; empty if neither says. INVALID_ARGUMENT names file and key: another JSON
// type, or an id outside the vocabulary.
StatusOr<std::vector<int64_t>> ReadEosIds(const std::string& dir, int64_t vocabulary);

struct ReadOptions {
  bool allow_nonfinite = false;  // NaN and Inf are read as they stand
};
// Fills the master weights (and the compute copy) and the buffers of a store made for this folder's
// config. A buffer that the folder lacks is 0.
// INVALID_ARGUMENT lists all missing, unexpected and mis-shaped tensors by the names of the files,
// and those whose place differs from the index; names a tensor with a value that is not finite.
Status ReadWeights(const std::string& dir, model::ParameterStore* store,
                   const ReadOptions& options = {});

// Elements [first, first + count) of a weight or buffer of the plan, and who wants them.
struct WeightRange {
  std::string name;  // ours
  int64_t first = 0;
  int64_t count = 0;
  float* data = nullptr;  // [count], or null: `take` gets them
  // Called with the values from element `first` of the tensor on, piece by piece in ascending
  // order; the span is valid within the call. A failure ends the reading.
  std::function<Status(int64_t first, std::span<const float> values)> take;
};
// As ReadWeights for those who hold no whole model: nothing but the ranges is read, in their order,
// with a few MiB of memory whatever the size of a tensor. The names, shapes and types of all
// tensors are compared with `plan`, which is this folder's config's; only values that are read can
// be found not finite. REQUIRES: every range is within a tensor of the plan.
Status ReadWeightRanges(const std::string& dir, const model::ModelPlan& plan,
                        const std::vector<WeightRange>& ranges, const ReadOptions& options = {});

// One weight or buffer to be written, fp32, borrowed for the call.
struct NamedWeight {
  std::string name;  // ours
  std::vector<int64_t> shape;
  std::span<const float> values;
};
// Every weight and buffer of a store, in the plan's order.
std::vector<NamedWeight> WeightsOf(model::ParameterStore* store);

struct ExportOptions {
  std::string tokenizer_path;  // copied to DIR/tokenizer.json; empty: none
  std::vector<int64_t> eos;    // `eos_token_id` of config.json; empty: none
  int64_t shard_bytes_max = 5'000'000'000;
  bool allow_nonfinite = false;
};

// Creates DIR and writes the folder; config.json last, so that a folder without it is incomplete.
// Existing files of the same names are replaced. A tied head is not written. Transformers' own
// model type is written only where its model gives the same logits with these weights. A buffer
// that is not among the weights counts as 0. INVALID_ARGUMENT if the weights are not those of
// `config`, or a value is not finite.
Status WriteModelDir(const std::string& dir, const heddle::v1::ModelConfig& config,
                     const std::vector<NamedWeight>& weights, const ExportOptions& options);

}  // namespace heddle::hf
