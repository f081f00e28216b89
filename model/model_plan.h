// What a model consists of, computed from its configuration alone: parameter names, shapes, the
// layout of the flat buffers, initial values, exact counts. Torch-free, because `heddle plan`, the
// scheduler and the trainer must agree on these numbers (architecture.md L5). Names are those of
// product.md section 5, sizes those of attention-and-moe.md; units and layout those of
// training-runtime.md 5.2 and 5.3. What a model costs stands in model_costs.h as well.
//
// Invariants:
//  1. Tensors of a unit are end to end in one range of the flat buffer, units follow each other.
//  2. A layout group has no gaps, so that it can be used as one matrix. The groups are
//       q_proj, k_proj, v_proj (then NSA separate: k_proj_slc, v_proj_slc, k_proj_win, v_proj_win)
//       q_proj.bias, k_proj.bias, v_proj.bias
//       MLA: q_proj or q_a_proj, kv_a_proj_with_mqa
//       indexer: q_proj, k_proj, weights_proj (q_proj stands alone where it reads the q latent)
//       GSA: value_gate, output_gate: first the weights, then the biases
//       gate_proj, up_proj of a feed-forward layer, of each expert and of the shared experts.
//     Every other tensor starts at a multiple of kFlatAlignment elements.
//  3. Offsets are elements and the same for master, gradient, moments and compute weights.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
class ParallelConfig;
class TrainingConfig;
enum TrainingConfig_Accumulation : int;
enum AttentionKind : int;
}  // namespace heddle::v1

namespace heddle::model {

// 32 elements are 64 bytes of bf16 and 128 bytes of fp32.
inline constexpr int64_t kFlatAlignment = 32;

enum class InitKind {
  kOnes,         // gains of norms
  kNormal,       // N(0, init_stddev), 0.02 unless said
  kResidualOut,  // N(0, 0.02 / sqrt(2 n_layers)): matrices that write into the residual stream
  kConstant,     // init_value: biases, gates, DyT's alpha, pooling weights
  kUniform,      // U(-init_value, init_value): Xavier and LibTorch's default of linear layers
  kDiagonal      // [.., R, C]: init_value where row mod C = column, else 0 (NSA `linear`)
};

struct TensorSpec {
  std::string name;            // product.md section 5
  std::vector<int64_t> shape;  // linear weights are [out, in]
  int64_t elements = 0;
  int64_t offset = 0;  // first element in the flat buffer
  int unit = 0;        // index into ModelPlan::units
  InitKind init = InitKind::kNormal;
  double init_stddev = 0.0;
  double init_value = 0.0;
  // Weight decay applies: not to names with "bias" or "norm", nor to what no loss trains, which
  // decay alone would shrink to nothing.
  bool decays = true;
  bool indexer =
      false;  // trained by the indexer's loss alone: its learning-rate multiplier applies,
              // and a frozen stage 1 updates nothing else (attention-and-moe.md 6.3)
};

// What is gathered, reduced and released together: embedding; one per block without its experts;
// final norm and head; then, layer by layer, every expert. With tied embeddings the head has no
// matrix of its own: unit 0 is used at both ends.
struct UnitSpec {
  std::string name;  // "embedding", "block.3", "head", "block.3.expert.17"
  int first_tensor = 0;
  int tensor_count = 0;
  int64_t offset = 0;    // flat elements, a multiple of kFlatAlignment
  int64_t elements = 0;  // flat elements with padding
};

// Elements of a unit that each of `ranks` keeps of it where parameters are sharded: equal for all
// ranks, a multiple of kFlatAlignment; the last slices may reach beyond the unit.
inline int64_t SliceElements(const UnitSpec& unit, int64_t ranks) {
  const int64_t even = (unit.elements + ranks - 1) / ranks;
  return (even + kFlatAlignment - 1) / kFlatAlignment * kFlatAlignment;
}

// Experts [first, first + count) of every layer that has experts.
struct ExpertRange {
  int64_t first = 0;
  int64_t count = 0;
};

struct ModelPlan {
  std::vector<TensorSpec> tensors;  // in order of offset
  std::vector<UnitSpec> units;      // in order of offset
  int dense_units = 0;              // embedding, blocks and head; those after them are experts
  ExpertRange experts;              // that the plan has; none of a model without
  std::vector<int> expert_layers;   // layers with experts, ascending
  int64_t parameters = 0;           // exact count, without padding
  int64_t flat_elements = 0;        // with padding
  // State that no gradient changes: fp32, equal on all ranks, saved in checkpoints, all 0 at the
  // start. Offsets count in a flat buffer of their own; not parameters.
  //  - `mlp.gate.e_score_correction_bias` [E] of every MoE layer, whatever the router: 0 where
  //    nothing balances it, so that a folder with or without it reads alike.
  //  - `self_attn.indexer.vref` [1] of every GSA layer with use_adaptive_k; 0 = not measured yet.
  std::vector<TensorSpec> buffers;
  int64_t buffer_elements = 0;
  // Name -> index into tensors. PlanModel fills it; a plan made by hand may leave it empty.
  std::unordered_map<std::string, int> index;

  // The tensor of that name, or nullptr.
  const TensorSpec* Find(const std::string& name) const;
  const TensorSpec* FindBuffer(const std::string& name) const;
};

// INVALID_ARGUMENT lists every problem of the configuration ("model.n_heads: ..."), one a line:
// ranges of config.proto, the rules of attention-and-moe.md section 1.1, and options that no layer
// of this version computes.
StatusOr<ModelPlan> PlanModel(const heddle::v1::ModelConfig& config);
// Of the experts those of a rank alone, for expert parallelism; names are those of the whole model.
// INVALID_ARGUMENT: the range is not within n_experts.
StatusOr<ModelPlan> PlanModel(const heddle::v1::ModelConfig& config, ExpertRange experts);

// The experts that rank `rank` of a run over `degree` groups of experts has: an equal range of
// them, the same for ranks that are equal modulo `degree` (training-runtime.md 10.1).
// REQUIRES: degree divides n_experts.
ExpertRange ExpertsOfRank(const heddle::v1::ModelConfig& config, int rank, int degree);

// The two halves of a plan as plans of their own, each with offsets from 0: everything but the
// experts, with all buffers; and the experts, one unit per layer ("block.3.experts").
ModelPlan DensePart(const ModelPlan& plan);
ModelPlan ExpertPart(const ModelPlan& plan);

// Head counts and width with "auto" (0) resolved. MLA layers have `query` heads of their own
// widths. REQUIRES: n_heads >= 1.
struct Heads {
  int64_t query = 0;
  int64_t kv = 0;
  int64_t dim = 0;
};
Heads HeadsOf(const heddle::v1::ModelConfig& config);

// Kind of one layer: pattern[layer mod length], or the one kind.
heddle::v1::AttentionKind LayerKind(const heddle::v1::ModelConfig& config, int layer);

// Whether the layer projects to a latent: kind mla, or dsa with core mla.
bool LayerUsesLatent(const heddle::v1::ModelConfig& config, int layer);
// Whether the layer selects keys itself: every gsa layer; of the dsa layers the first and every
// index_share_every-th after it, whose selection the dsa layers in between share.
bool LayerHasIndexer(const heddle::v1::ModelConfig& config, int layer);

// Whether the feed-forward part of the layer is a mixture of experts: moe.layers, or moe.every
// after moe.first_dense.
bool LayerHasExperts(const heddle::v1::ModelConfig& config, int layer);

// Sliding window: keys a query sees, itself included, and pinned first tokens.
struct Window {
  int64_t keys = 0;
  int64_t sinks = 0;
};
Window WindowOf(const heddle::v1::ModelConfig& config);

// Longest document of which a query of this layer attends to everything before it, whatever the
// scores; INT64_MAX if nothing is ever left out. For NSA that holds of the selected and the window
// branch. Such documents need no selection (attention-and-moe.md 16.2).
int64_t FullyVisible(const heddle::v1::ModelConfig& config, int layer);

// (query, key) pairs that one query head at position t reads in one layer: |S_t| of sections 4, 6
// and 7 (GSA: at k = k_base), compressed + selected + window keys of section 5.6.
int64_t VisibleKeys(const heddle::v1::ModelConfig& config, int layer, int64_t position);

// Floating point operations per token; a multiply-add counts 2.
struct TokenFlops {
  // 2 x weights touched: K of E experts; the embedding look-up is free, the head is not; NSA's
  // compression counts here.
  double forward_weights = 0;
  // Attention, indexer scores and block scores, mean over the positions of a sequence.
  double forward_core = 0;
  // 3 x weights + the core's forward and backward: flash attention 3.5 x, indexer scores and block
  // scores once, KL of stage 2 (attention-and-moe.md sections 6.4 and 12).
  double training = 0;
};
// `sequence_length` >= 1 is the length of one document. REQUIRES: PlanModel(config).ok().
TokenFlops FlopsPerToken(const heddle::v1::ModelConfig& config, int64_t sequence_length);

// Bytes of one rank, by category (training-runtime.md sections 5.7 and 18).
struct MemoryEstimate {
  // bf16 copies that stay; 0 in fp32, where master and compute weights are one. With
  // parallel.shard=optimizer the gathered weights of the whole model too.
  int64_t compute_weights = 0;
  int64_t master = 0;
  int64_t moments = 0;
  int64_t gradients = 0;
  int64_t gathered = 0;     // units whose weights or gradients are whole for a while
  int64_t checkpoint = 0;   // copy of what this rank saves, while it is written
  int64_t buffers = 0;      // router biases, vref
  int64_t activations = 0;  // saved by the forward of one micro-batch
  int64_t workspace = 0;    // logits chunk, gradient products, largest temporary of a block
  int64_t Total() const {
    return compute_weights + master + moments + gradients + gathered + checkpoint + buffers +
           activations + workspace;
  }
};
// With the runtime's own (training_plan.h) within 5 % of measured peaks. All zero for a model that
// PlanModel refuses.
MemoryEstimate EstimateMemory(const heddle::v1::ModelConfig& model,
                              const heddle::v1::TrainingConfig& training,
                              const heddle::v1::ParallelConfig& parallel);

// training.accumulation with "auto" resolved; never "auto". It looks at the configuration only,
// since the bits of a run depend on it. One micro-batch a rank is reduced at once: the sums are
// those of sync_last, and no rank holds whole gradients.
heddle::v1::TrainingConfig_Accumulation AccumulationOf(const heddle::v1::TrainingConfig& training,
                                                       const heddle::v1::ParallelConfig& parallel);
// Micro-batches of a step on the rank that has most.
int64_t MicroBatchesPerRank(const heddle::v1::TrainingConfig& training,
                            const heddle::v1::ParallelConfig& parallel);

// Rows of logits that the loss holds at a time.
inline constexpr int64_t kDefaultLogitsChunkBytes = int64_t{32} << 20;
int64_t LogitsChunkRows(int64_t rows, int64_t vocabulary, int64_t element_bytes,
                        int64_t chunk_bytes);

// Bytes of the KV cache of one sequence at `length` tokens, elements of `element_bytes`, not
// quantized (model_costs.h has the quantized forms).
int64_t KvCacheBytes(const heddle::v1::ModelConfig& config, int64_t length, int element_bytes);

}  // namespace heddle::model
