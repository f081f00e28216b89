// One pre-norm block over explicit tensors, forward and backward (attention-and-moe.md section
// 1.1):
//
//   x2 = x + attention(norm1(x))       y = x2 + feed_forward(norm2(x2))
//
// N packed tokens, D width.
#pragma once

#include <memory>
#include <span>

#include "model/layers/feed_forward.h"
#include "model/layers/norm.h"
#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::model {

class Block {
 public:
  Block(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage);

  // A micro-batch's way through a block, which is its own. `attention` is this layer's of the
  // attention stack, or a decoder's.
  struct ForwardCall {
    Block* block = nullptr;
    const layers::PassContext* context = nullptr;
    layers::Sublayer* attention = nullptr;
    at::Tensor x_ND;  // stays valid until the backward
    at::Tensor y_ND;  // written; undefined (kRecompute): only what the backward needs is computed
  };
  struct BackwardCall {
    Block* block = nullptr;
    const layers::PassContext* context = nullptr;
    layers::Sublayer* attention = nullptr;
    at::Tensor gradient_ND;  // dL/dy on entry, dL/dx on return
  };

  // Blocks of one layer. Both halves run the pass of the context; the feed-forward halves run
  // together (Sublayer::ForwardTogether).
  static void Forward(std::span<const ForwardCall> calls);
  void Forward(const layers::PassContext& context, layers::Sublayer* attention,
               const at::Tensor& x_ND, const at::Tensor& y_ND);

  // Adds to the gradients of the weights. Follows one Forward that keeps, with the same attention.
  static void Backward(std::span<const BackwardCall> calls);

  // The same two for selective recomputation (training-runtime.md 9.2): the attention half keeps
  // all that its backward needs, x2 included; of the feed-forward half only the routing is kept,
  // and it is redone, with both norms, in the backward. The pass of the context is not looked at.
  // Same bits as Forward and Backward of kTrain. What is redone lies in `redone`.
  static void SelectiveForward(std::span<const ForwardCall> calls);
  static void SelectiveBackward(std::span<const BackwardCall> calls, layers::BufferPool* redone);

  layers::Sublayer* feed_forward() { return feed_forward_.get(); }

 private:
  layers::Norm input_norm_;
  layers::Norm post_norm_;
  std::unique_ptr<layers::Sublayer> feed_forward_;
  // Of the last forward that keeps; from the pool given to it. A selective one keeps x and x2.
  at::Tensor x_;
  at::Tensor h1_;
  at::Tensor x2_;
  at::Tensor h2_;
  at::Tensor norm1_saved_;
  at::Tensor norm2_saved_;
};

}  // namespace heddle::model
