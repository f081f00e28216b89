// One pre-norm block of dense or sliding-window attention and SwiGLU, as functions over explicit
// tensors, forward and backward (attention-and-moe.md sections 1.1 and 2):
//
//   h1 = norm(x)   qkv = h1 Wqkv, q and k rotated   o = attention(q, k, v)   x2 = x + o Wo
//   h2 = norm(x2)  [g|u] = h2 Wgu                    y = x2 + (silu(g) u) Wd
//
// N packed tokens, D width, C = (H + 2 J) head_dim columns of the joined projection, F
// feed-forward.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "model/attention/attention.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/rope.h"
#include "model/model_plan.h"

namespace heddle::model {

// Views into a flat buffer: weights in the compute type, or gradients in the statistics type.
struct BlockTensors {
  at::Tensor input_norm_D;
  at::Tensor qkv_CD;
  at::Tensor o_DHd;  // [D, H head_dim]
  at::Tensor post_norm_D;
  at::Tensor gate_up_2FD;
  at::Tensor down_DF;
};
BlockTensors ViewBlock(const ModelPlan& plan, int layer, void* flat, at::ScalarType type);

// A view of one tensor of the plan. REQUIRES: the name exists.
at::Tensor ViewTensor(const ModelPlan& plan, const std::string& name, void* flat,
                      at::ScalarType type);

// INVALID_ARGUMENT names what the functions below do not compute.
Status CheckBlocks(const heddle::v1::ModelConfig& config);

struct BlockContext {
  Heads heads;
  double norm_eps = 0;
  const layers::RopeTables* rope = nullptr;
  const std::vector<int32_t>* positions = nullptr;  // [N]
  attention::AttentionCore* core = nullptr;
};

// What the backward needs. All but `x` come from the pool given to BlockForward.
struct BlockSaved {
  at::Tensor x;
  at::Tensor h1;
  at::Tensor rstd1;
  at::Tensor qkv;  // rotated
  at::Tensor o;
  at::Tensor x2;
  at::Tensor h2;
  at::Tensor rstd2;
  at::Tensor gate_up;
  attention::Saved attention;
};

// Heads [N, H, D], [N, J, D], [N, J, D] of a joined projection.
struct HeadViews {
  at::Tensor q;
  at::Tensor k;
  at::Tensor v;
};
HeadViews SplitHeads(const Heads& heads, const at::Tensor& qkv_NC);

// Writes y, or, if y is undefined, stops at what the backward needs (recomputation). `keep`: a
// backward will follow, so the attention saves what it needs.
void BlockForward(const BlockTensors& weights, const BlockContext& context, const at::Tensor& x_ND,
                  const at::Tensor& y_ND, bool keep, layers::BufferPool* pool, BlockSaved* saved);

// gradient_ND: dL/dy on entry, dL/dx on return. Adds to `gradients`, overwrites `saved`.
void BlockBackward(const BlockTensors& weights, const BlockTensors& gradients,
                   const BlockContext& context, BlockSaved* saved, layers::BufferPool* scratch,
                   const at::Tensor& gradient_ND);

}  // namespace heddle::model
