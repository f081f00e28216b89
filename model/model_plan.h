// What a model consists of, computed from its configuration alone: parameter names, shapes, the
// layout of the flat buffers, exact counts, FLOPs and memory. Torch-free, because `heddle plan`,
// the scheduler and the trainer must agree on these numbers (architecture.md L5). Names are those
// of product.md section 5; units and layout those of training-runtime.md 5.2 and 5.3.
//
// Invariants:
//  1. Tensors of a unit are end to end in one range of the flat buffer, units follow each other.
//  2. A layout group (q,k,v; gate,up) has no gaps, so that it can be used as one matrix.
//     Every other tensor starts at a multiple of kFlatAlignment elements.
//  3. Offsets are elements and the same for master, gradient, moments and compute weights.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
class TrainingConfig;
enum AttentionKind : int;
}  // namespace heddle::v1

namespace heddle::model {

// 32 elements are 64 bytes of bf16 and 128 bytes of fp32.
inline constexpr int64_t kFlatAlignment = 32;

enum class InitKind {
  kOnes,        // gains of norms
  kNormal,      // N(0, 0.02)
  kResidualOut  // N(0, 0.02 / sqrt(2 n_layers)): matrices that write into the residual stream
};

struct TensorSpec {
  std::string name;            // product.md section 5
  std::vector<int64_t> shape;  // linear weights are [out, in]
  int64_t elements = 0;
  int64_t offset = 0;  // first element in the flat buffer
  int unit = 0;        // index into ModelPlan::units
  InitKind init = InitKind::kNormal;
  double init_stddev = 0.0;
  bool decays = true;  // weight decay applies (names without "bias" and "norm")
};

// What is gathered, reduced and released together: embedding; one per block; final norm and head.
// With tied embeddings the head has no matrix of its own: unit 0 is used at both ends.
struct UnitSpec {
  std::string name;  // "embedding", "block.3", "head"
  int first_tensor = 0;
  int tensor_count = 0;
  int64_t offset = 0;    // flat elements, a multiple of kFlatAlignment
  int64_t elements = 0;  // flat elements with padding
};

struct ModelPlan {
  std::vector<TensorSpec> tensors;  // in order of offset
  std::vector<UnitSpec> units;      // in order of offset
  int64_t parameters = 0;           // exact count, without padding
  int64_t flat_elements = 0;        // with padding
  // State that no gradient changes (router bias, GSA's vref): fp32, equal on all ranks, saved in
  // checkpoints. Offsets count in a flat buffer of their own; not parameters.
  std::vector<TensorSpec> buffers;
  int64_t buffer_elements = 0;

  // The tensor of that name, or nullptr.
  const TensorSpec* Find(const std::string& name) const;
  const TensorSpec* FindBuffer(const std::string& name) const;
};

// INVALID_ARGUMENT lists every problem of the configuration ("model.n_heads: ..."); a kind of layer
// that this build cannot train is a problem too.
StatusOr<ModelPlan> PlanModel(const heddle::v1::ModelConfig& config);

// Floating point operations per token; a multiply-add counts 2.
struct TokenFlops {
  double forward_weights = 0;  // 2 x weights touched (embedding look-up is free, the head is not)
  double forward_core = 0;     // attention scores and values, mean over the positions of a sequence
  double training = 0;         // 3 x weights + core with a backward of 2.5 x forward
};
// `sequence_length` >= 1 is the length of one document. REQUIRES: PlanModel(config).ok().
TokenFlops FlopsPerToken(const heddle::v1::ModelConfig& config, int64_t sequence_length);

// Head counts and width with "auto" (0) resolved.
struct Heads {
  int64_t query = 0;
  int64_t kv = 0;
  int64_t dim = 0;
};
Heads HeadsOf(const heddle::v1::ModelConfig& config);

// Kind of one layer: pattern[layer mod length], or the one kind.
heddle::v1::AttentionKind LayerKind(const heddle::v1::ModelConfig& config, int layer);

// Sliding window: keys a query sees, itself included, and pinned first tokens.
struct Window {
  int64_t keys = 0;
  int64_t sinks = 0;
};
Window WindowOf(const heddle::v1::ModelConfig& config);

// Longest document of which a query of this layer still sees everything before it; INT64_MAX if
// there is no window.
int64_t FullyVisible(const heddle::v1::ModelConfig& config, int layer);

// Visible keys of the query at position t of one layer (attention-and-moe.md sections 2 and 4).
int64_t VisibleKeys(const heddle::v1::ModelConfig& config, int layer, int64_t position);

// Bytes of one training process without sharding, by category (training-runtime.md section 18).
struct MemoryEstimate {
  int64_t compute_weights = 0;  // bf16 copy; 0 in fp32, where master and compute weights are one
  int64_t master = 0;
  int64_t moments = 0;
  int64_t gradients = 0;
  int64_t activations = 0;  // saved by the forward of one micro-batch
  int64_t workspace = 0;    // logits chunk, gradient products, largest temporary of a block
  int64_t Total() const {
    return compute_weights + master + moments + gradients + activations + workspace;
  }
};
// Measured peaks lie 20 to 75 MiB above the sum, plus 115 MiB of LibTorch itself. All zero for a
// model that PlanModel refuses.
MemoryEstimate EstimateMemory(const heddle::v1::ModelConfig& model,
                              const heddle::v1::TrainingConfig& training);

// Rows of logits that the loss holds at a time.
inline constexpr int64_t kDefaultLogitsChunkBytes = int64_t{32} << 20;
int64_t LogitsChunkRows(int64_t rows, int64_t vocabulary, int64_t element_bytes,
                        int64_t chunk_bytes);

// Bytes of the KV cache of one sequence at `length` tokens, elements of `element_bytes`.
int64_t KvCacheBytes(const heddle::v1::ModelConfig& config, int64_t length, int element_bytes);

}  // namespace heddle::model
