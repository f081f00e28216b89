// One pre-norm block over explicit tensors, forward and backward (attention-and-moe.md section
// 1.1):
//
//   x2 = x + attention(norm1(x))       y = x2 + feed_forward(norm2(x2))
//
// N packed tokens, D width.
#pragma once

#include <memory>

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

  // Writes y, or, if y is undefined (kRecompute), stops at what the backward needs. x stays valid
  // until the backward. `attention` is this layer's of the attention stack, or a decoder's.
  // Both halves run the pass of the context.
  void Forward(const layers::PassContext& context, layers::Sublayer* attention,
               const at::Tensor& x_ND, const at::Tensor& y_ND);

  // gradient_ND: dL/dy on entry, dL/dx on return. Adds to the gradients of the weights. Follows one
  // Forward that keeps, with the same attention.
  void Backward(const layers::PassContext& context, layers::Sublayer* attention,
                const at::Tensor& gradient_ND);

  // The same two for selective recomputation (training-runtime.md 9.2): the attention half keeps
  // all that its backward needs, x2 included; of the feed-forward half only the routing is kept,
  // and it is redone, with both norms, in the backward. The pass of the context is not looked at.
  // Same bits as Forward and Backward of kTrain.
  void SelectiveForward(const layers::PassContext& context, layers::Sublayer* attention,
                        const at::Tensor& x_ND, const at::Tensor& y_ND);
  void SelectiveBackward(const layers::PassContext& context, layers::Sublayer* attention,
                         const at::Tensor& gradient_ND);

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
