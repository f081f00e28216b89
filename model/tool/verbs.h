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
  std::string input;  // safetensors: input_ids [B,T], also with attention_mask [B,T], or [N] with
                      // cu_seqlens [D+1]
  std::string out;    // safetensors: logits f32
};
Status RunLogits(const LogitsOptions& options);

struct GenerateVerbOptions {
  SourceOptions source;
  std::vector<std::string> prompts;  // several: one batch
  std::vector<std::string> ids;      // the same as "1,2,3"
  int64_t max_new_tokens = 64;
  double temperature = 0.0;
  int64_t top_k = 0;
  double top_p = 1.0;
  uint64_t seed = 0;
  // memory.kv_cache.quantization=fp8 ..., over what a checkpoint's run says.
  std::vector<std::string> overrides;
  bool json = false;
};
// Sampled draws of prompt i depend on (seed, i, position) only.
Status RunGenerate(const GenerateVerbOptions& options);

struct RecallOptions {
  SourceOptions source;
  std::string data;  // packed data set
  int64_t tokens = 4096;
  int64_t sequence_length = 1024;  // longer documents are cut
  uint64_t seed = 0;               // of the random selections
  bool json = false;
};
// Attention mass on the keys that the model's indexers select, beside random selections.
Status RunRecall(const RecallOptions& options);

struct BenchHostOptions {
  std::string dir = ".";  // on the disk to measure
  std::string out;        // file that keeps the figures for `heddle plan`; empty: none
  bool json = false;
};
// Rates of this host (model/tool/host_bench.h).
Status RunBenchHost(const BenchHostOptions& options);

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
