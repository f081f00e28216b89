// The decoder-only language model in segmented form (training-runtime.md 5.1): embedding, blocks
// and head are called in an explicit loop, forward and backward, so that the caller can gather,
// reduce and release a unit's parameters around each call. No autograd graph, no module hooks.
//
//   auto store = ParameterStore::Create(PlanModel(config.model()), Precision::kBf16);
//   InitParameters(seed, store.get());
//   auto model = LanguageModel::Create(config.model(), store.get());
//   store->ZeroGradients();
//   for (micro_batch) model->ForwardBackward(micro_batch, {.loss_scale = 1.0 / valid_tokens, ...});
//   (reduce gradients and model->statistics(), clip, OptimizerStep, UpdateBuffers())
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/status/status.h"
#include "model/layers/step_info.h"
#include "model/parameter_store.h"

namespace at {
class Tensor;
}
namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::model {

struct ModelMemory;

// A label that is not predicted: padding, and the last token of a document.
inline constexpr int64_t kIgnoredLabel = -100;

// One micro-batch of packed documents (attention-and-moe.md section 1): document b owns rows
// cu_seqlens[b] .. cu_seqlens[b+1]-1, its positions restart at 0. Borrowed for the call.
struct PackedBatch {
  std::span<const int64_t> input_ids;   // [N]
  std::span<const int64_t> labels;      // [N], labels[i] follows input_ids[i]; kIgnoredLabel = none
  std::span<const int32_t> cu_seqlens;  // [B+1], cu[0] = 0, cu[B] = N, non-decreasing
};

struct LossSum {
  double loss = 0;     // sum of -ln p over the valid labels, not divided
  int64_t tokens = 0;  // valid labels
  layers::LayerLosses layers;
  layers::LayerCounts counts;  // of ForwardBackward only
};

// Called in this order by ForwardBackward, on the calling thread: forward 0, 1, ..., then backward
// from the last unit to 0. With tied embeddings unit 0 is needed by the head too: it is visited
// forward first and backward last, and must stay readable in between.
struct UnitHooks {
  std::function<Status(int unit)> before_forward;
  std::function<Status(int unit)> after_forward;
  std::function<Status(int unit)> before_backward;
  // The gradients of this unit are complete for this micro-batch.
  std::function<Status(int unit)> after_backward;
};

// What a backward does again instead of keeping it (training-runtime.md section 9). No bit of the
// result depends on it.
enum class Recompute {
  kNone,
  kSelective,  // norms and feed-forward halves; attention is dearer to redo than to keep
  kFull        // all but the inputs of the blocks
};

struct LanguageModelOptions {
  Recompute recompute = Recompute::kNone;
  // Rows of logits held at a time times the vocabulary, in bytes of the compute type.
  int64_t logits_chunk_bytes = kDefaultLogitsChunkBytes;
  // Dense and window layers run the kernel of the sparse kinds, which then give the same bits where
  // their selection leaves nothing out (X2). Slower.
  bool reference_attention = false;
};

class LanguageModel {
 public:
  // INVALID_ARGUMENT as PlanModel. `store` is borrowed, outlives the model, and must have been made
  // from PlanModel(config).
  static StatusOr<std::unique_ptr<LanguageModel>> Create(const heddle::v1::ModelConfig& config,
                                                         ParameterStore* store,
                                                         LanguageModelOptions options = {});
  // Memory kept in another way (store_views.h), made for PlanModel(config).
  static StatusOr<std::unique_ptr<LanguageModel>> Create(const heddle::v1::ModelConfig& config,
                                                         const ModelMemory& memory,
                                                         LanguageModelOptions options = {});
  virtual ~LanguageModel() = default;

  // Adds d(loss_sum * loss_scale + losses of the layers)/d(parameter) to the gradients and returns
  // the losses, for all batches together: layer-major, every batch passes a unit before the next
  // unit is visited (training-runtime.md 7.3). step.first_token is that of the first batch. A batch
  // without tokens adds nothing, one without valid labels only what the layers' losses give.
  // INVALID_ARGUMENT names the first bad field of the batch (id or label outside the vocabulary,
  // cu_seqlens); a Status of a hook ends the call. LibTorch's exceptions pass through (S25).
  // Blocking; not thread-safe. Bitwise repeatable at a fixed number of LibTorch threads.
  virtual StatusOr<LossSum> ForwardBackward(std::span<const PackedBatch> batches,
                                            const layers::StepInfo& step,
                                            const UnitHooks& hooks = {}) = 0;
  StatusOr<LossSum> ForwardBackward(const PackedBatch& batch, const layers::StepInfo& step,
                                    const UnitHooks& hooks = {});

  // Loss only: no gradients, no saved activations, no change of state. `step` says which stage of
  // sparse training is evaluated; its scales are not looked at.
  // Hooks: the forward ones.
  virtual StatusOr<LossSum> Evaluate(const PackedBatch& batch, const layers::StepInfo& step = {},
                                     const UnitHooks& hooks = {}) = 0;

  // Logits of every row, [N, V] fp32 (fp64 for kFp64). Labels are not looked at.
  virtual StatusOr<at::Tensor> Logits(const PackedBatch& batch) = 0;

  // What layers count over the micro-batches of a step for their buffers (expert loads, variances
  // of scores), one after the other; empty if no layer has buffers. The caller zeroes it at the
  // start of a step and sums it over ranks after the last micro-batch.
  virtual std::span<double> statistics() = 0;
  // After the optimizer's step of a step that counted: changes the buffers of the store from
  // statistics(), on all ranks alike. `frozen`: the step trained indexers alone, so only what
  // belongs to them moves; balancing biases stay.
  virtual void UpdateBuffers(bool frozen) = 0;
};

}  // namespace heddle::model
