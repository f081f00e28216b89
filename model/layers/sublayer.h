// One half of a transformer block behind one interface, attention or feed-forward of any kind:
//
//   x2 = x + attention(norm(x))      y = x2 + feed_forward(norm(x2))
//
// The caller runs Forward and Backward in an explicit loop; there is no autograd graph
// (training-runtime.md section 5). A sublayer owns views of its weights and gradients, and what a
// forward keeps for the backward that follows it. Equations: attention-and-moe.md.
// Shapes: N packed tokens, D width. T is the compute type (bf16, fp32, fp64).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/expert_access.h"
#include "model/layers/step_info.h"
#include "model/model_plan.h"

namespace heddle::layers {

// The packed documents of a micro-batch. Document b owns rows cu_seqlens[b] .. cu_seqlens[b+1]-1;
// zero-length documents are legal. Borrowed for the pass.
struct Documents {
  std::span<const int32_t> cu_seqlens;  // [B+1]
  std::span<const int32_t> positions;   // [N], restart at 0 in each document
  int64_t rows() const { return static_cast<int64_t>(positions.size()); }
  int64_t longest = 0;  // tokens of the longest document
};

// What a forward is for.
enum class Pass {
  kInference,  // nothing is kept, nothing is counted
  kTrain,      // keeps what the backward needs, counts
  kSelect,     // first forward under recomputation: keeps only selections and routing, counts
  kRecompute   // repeats a kSelect forward with its selections; keeps, does not count again
};
inline bool Keeps(Pass pass) { return pass == Pass::kTrain || pass == Pass::kRecompute; }
inline bool Counts(Pass pass) { return pass == Pass::kTrain || pass == Pass::kSelect; }

// What a decoder's cache stores of the rows of a forward (sections 4, 5.5, 6.4, 7.4, 8). A field
// that the kind has no use for stays undefined. All tensors have N rows and are valid until the
// pool is released.
struct CacheRows {
  at::Tensor k;         // [N, J, Dk] rotated
  at::Tensor v;         // [N, J, Dv] as attention reads it (GSA: gated)
  at::Tensor raw_k;     // [N, J, D] before the rotation: NSA's compression
  at::Tensor raw_v;     // [N, J, D] NSA with separate projections: of the compressed branch
  at::Tensor window_k;  // [N, J, D] rotated, NSA kv: separate
  at::Tensor window_v;  // [N, J, D] NSA kv: separate
  at::Tensor index_k;   // [N, dI] DSA and GSA
  at::Tensor latent;    // [N, dc] MLA, after its norm
  at::Tensor rotary_k;  // [N, dr] MLA, rotated
};

struct PassContext {
  Pass pass = Pass::kInference;
  const Documents* documents = nullptr;
  const StepInfo* step = nullptr;   // null: no losses, no noise, sparse stage
  LayerLosses* losses = nullptr;    // may be null unless the pass counts
  LayerCounts* counts = nullptr;    // may be null
  BufferPool* kept = nullptr;       // tensors that live until the backward
  BufferPool* scratch = nullptr;    // tensors that live until the call returns
  CacheRows* cache_rows = nullptr;  // not null: fill it (kInference only)
  // What reaching other ranks or a disk failed with, the first time; the results of the pass mean
  // nothing from then on. May be null where all experts lie in this rank's memory.
  Status* failure = nullptr;
  bool failed() const { return failure != nullptr && !failure->ok(); }
};

class Sublayer {
 public:
  virtual ~Sublayer() = default;

  // out = residual + f(h). `out` may be `residual`; it may be undefined in kRecompute, then only
  // what the backward needs is computed. h has the same values when the backward is given it; the
  // tensor itself may be another.
  virtual void Forward(const PassContext& context, const at::Tensor& h_ND,
                       const at::Tensor& residual_ND, const at::Tensor& out_ND) = 0;

  // Overwrites dh with dL/dh and adds to the gradients of the weights. `gradient` = dL/dout; the
  // residual's share of it is the caller's. Scales of the layer's own losses come from
  // context.step. Follows one Forward whose pass Keeps(), with the same documents.
  virtual void Backward(const PassContext& context, const at::Tensor& h_ND,
                        const at::Tensor& gradient_ND, const at::Tensor& dh_ND) = 0;

  // Several micro-batches at once, each by a layer of its own that has the same weights: the same
  // bits as one after the other in this order. Called of the first of these layers. Layers whose
  // weights come and go bring them once for all.
  struct ForwardCall {
    Sublayer* layer = nullptr;
    const PassContext* context = nullptr;
    at::Tensor h_ND, residual_ND, out_ND;
  };
  virtual void ForwardTogether(std::span<const ForwardCall> calls) {
    for (const ForwardCall& call : calls) {
      call.layer->Forward(*call.context, call.h_ND, call.residual_ND, call.out_ND);
    }
  }
  struct BackwardCall {
    Sublayer* layer = nullptr;
    const PassContext* context = nullptr;
    at::Tensor h_ND, gradient_ND, dh_ND;
  };
  virtual void BackwardTogether(std::span<const BackwardCall> calls) {
    for (const BackwardCall& call : calls) {
      call.layer->Backward(*call.context, call.h_ND, call.gradient_ND, call.dh_ND);
    }
  }

  // Once per micro-batch before its first Forward, for work on the documents alone.
  virtual void Begin(const Documents& /*documents*/) {}

  // Sums over micro-batches and ranks that UpdateBuffers needs (expert loads, score variances):
  // zeroed by the caller at the start of a step, added to by passes that count, reduced by the
  // caller over ranks in place. Empty for layers without buffers.
  virtual std::span<double> statistics() { return {}; }
  // After the optimizer's step: changes the layer's buffers from the global statistics().
  virtual void UpdateBuffers() {}
};

inline at::ScalarType StatisticsType(at::ScalarType compute_type) {
  return compute_type == at::kDouble ? at::kDouble : at::kFloat;
}

// Where a sublayer finds its tensors: views into flat buffers by the plan's names. A view shares
// the storage of its flat tensor: who moves the storage's memory (worker/shard) moves the views
// with it, so no sublayer may keep a pointer into them from one call to the next.
struct LayerStorage {
  static constexpr int kNoLayer = -1;  // names are whole names

  const model::ModelPlan* plan = nullptr;
  int layer = 0;
  // One flat tensor per unit of the plan, or one for all of it. Gradients are of the statistics
  // type (fp32; fp64 where the compute type is fp64).
  std::vector<at::Tensor> weights;    // of the compute type
  std::vector<at::Tensor> gradients;  // of the statistics type
  float* buffers = nullptr;           // ModelPlan::buffers, always fp32
  ExpertAccess experts;
  at::ScalarType type{};  // compute type

  at::ScalarType statistics_type() const { return type == at::kDouble ? at::kDouble : at::kFloat; }
  // "model.layers.{layer}." + name. REQUIRES: the plan has it.
  at::Tensor Weight(const std::string& name) const;
  at::Tensor Gradient(const std::string& name) const;
  // `rows` rows of tensors that lie end to end, the first being `name` (ModelPlan invariant 2).
  at::Tensor JoinedWeight(const std::string& name, int64_t rows) const;
  at::Tensor JoinedGradient(const std::string& name, int64_t rows) const;
  // fp32 buffer by name, or null if the plan has none of that name.
  float* Buffer(const std::string& name) const;
  bool Has(const std::string& name) const;
};

}  // namespace heddle::layers
