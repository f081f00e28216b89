// Training attention over packed documents, one interface for every mechanism that works on
// queries, keys and values: out = softmax over the visible keys, forward and backward.
//
// Shapes: N packed tokens, H query heads, J key/value heads (J divides H; query head h uses key
// head floor(h J / H)), D head dim. The first dimension may be strided (slices of one projection
// buffer), the last two are contiguous. T is bf16, fp32 or fp64. Law: the result equals that of
// each document alone (attention-and-moe.md section 1).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "model/model_plan.h"

namespace at {
class Tensor;
}

namespace heddle::attention {

// What a forward keeps for its backward. Opaque; lives until the backward or the next forward of
// the same layer.
struct Saved {
  std::vector<at::Tensor> tensors;
};

class AttentionCore {
 public:
  virtual ~AttentionCore() = default;

  // Takes the documents of the micro-batch; all calls up to the next Begin work on them. Done once
  // per micro-batch, for all layers of this kind. REQUIRES: a valid cu_seqlens.
  virtual void Begin(const std::vector<int32_t>& cu_seqlens) = 0;

  // Writes out [N, H, D]. `saved` may be null when no backward follows.
  virtual void Forward(const at::Tensor& q_NHD, const at::Tensor& k_NJD, const at::Tensor& v_NJD,
                       const at::Tensor& out_NHD, Saved* saved) = 0;

  // Overwrites dq, dk, dv. q, k, v and out are those of the forward.
  virtual void Backward(const at::Tensor& q_NHD, const at::Tensor& k_NJD, const at::Tensor& v_NJD,
                        const at::Tensor& out_NHD, const Saved& saved, const at::Tensor& dout_NHD,
                        const at::Tensor& dq_NHD, const at::Tensor& dk_NJD,
                        const at::Tensor& dv_NJD) = 0;
};

// Causal attention over the whole document (section 2). Never holds T x T values: long documents
// run alone, short ones together, padded at the end, where a causal mask already hides the padding.
std::unique_ptr<AttentionCore> MakeDense(double scale);

// Sliding window with sinks (section 4): key s is visible to query t iff s <= t and (t - s < W or
// s < A); W counts the query itself. Work and memory are O(T (W + A + tile)).
std::unique_ptr<AttentionCore> MakeSlidingWindow(double scale, model::Window window);

// `core`, but in fp32 where bf16 products are slow: what the two above return.
std::unique_ptr<AttentionCore> MakeWideningCore(std::unique_ptr<AttentionCore> core);

// The reference of both, in any precision: the kernel of the sparse kinds over the same keys, so
// that a sparse layer whose selection leaves nothing out gives the same bits. Without `window`:
// dense.
std::unique_ptr<AttentionCore> MakeReferenceCore(double scale, std::optional<model::Window> window);

}  // namespace heddle::attention
