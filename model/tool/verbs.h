// The verbs of heddle-model as plain functions over plain options; only main.cc knows the library
// that reads argv. Each prints its result to stdout and returns an error otherwise.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::tool {

// Where a model comes from: a model folder, or a checkpoint's record and the root of its files.
struct SourceOptions {
  std::string dir;
  std::string record;  // file with a serialized heddle.v1.CheckpointRecord
  std::string root;
  std::string tokenizer;  // file; else the folder's, else that of the checkpoint's data set
  std::string precision = "fp32";
  bool allow_nonfinite = false;  // NaN and Inf in a folder's weights are taken as they are
};

struct ShowOptions {
  SourceOptions source;  // `dir` may also name a preset of configs/model
  bool json = false;
  bool wide = false;  // every tensor
  // Sequence lengths; empty: 2048 and 16384, at most max_position_embeddings.
  std::vector<int64_t> lengths;
};
// Parameters, FLOPs, cache bytes, cost against the dense twin, tensors.
Status RunShow(const ShowOptions& options);

struct LogitsOptions {
  SourceOptions source;
  std::string input;  // safetensors: input_ids [B,T], or [N] with cu_seqlens [D+1]
  std::string out;    // safetensors: logits f32
};
Status RunLogits(const LogitsOptions& options);

struct GenerateVerbOptions {
  SourceOptions source;
  std::string prompt;
  std::vector<int64_t> ids;
  int64_t max_new_tokens = 64;
  double temperature = 0.0;
  int64_t top_k = 0;
  double top_p = 1.0;
  uint64_t seed = 0;
  std::vector<std::string> overrides;  // memory.kv_cache.quantization=none
  bool json = false;
};
Status RunGenerate(const GenerateVerbOptions& options);

struct ExportVerbOptions {
  SourceOptions source;
  std::string out;
  std::vector<std::string> overrides;  // model.attention.kind=gsa ...: keys of group `model`
  bool dense = false;                  // every layer dense: what sparse layers add is dropped
  uint64_t seed = 0;                   // of what a new attention kind adds
  bool json = false;
};
// Writes a model folder: `export` from a folder or checkpoint, `import` from a foreign folder,
// under another attention kind where asked (model/hf/convert.h). Lists what was added and dropped.
Status RunExport(const ExportVerbOptions& options);

}  // namespace heddle::tool
