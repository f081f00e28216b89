// The feed-forward functions of experts on the rows that a Dispatch gives them, forward and
// backward: one matrix product per expert and piece of its rows. Pieces are cut by shape alone and
// each is computed by one thread, so that results do not depend on the number of threads; threads
// take the next piece when they are done with one, so that uneven experts do not make them wait.
//
// N tokens, R rows of the dispatch (padding included), D width, F hidden width, C columns of the
// first product (feed_forward.h). T compute type, S statistics type.
#pragma once

#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/expert_access.h"
#include "model/layers/feed_forward.h"
#include "model/moe/dispatch.h"

namespace heddle::moe {

class Experts {
 public:
  // All of one shape; at least one. `memory` may be null: the experts' memory is always there;
  // else it is asked for by the number `layer`, and its failures end a call. Borrowed.
  Experts(layers::Activation activation, std::vector<layers::FeedForwardTensors> experts,
          layers::ExpertMemory* memory = nullptr, int layer = 0);

  int64_t columns() const { return experts_.front().columns(); }

  // pre [R, C] = the first product of each row, y [R, D] = f(x) of its expert, not weighted. y may
  // be undefined: then only `pre` is computed, which is what a backward needs.
  Status Forward(const Dispatch& dispatch, const at::Tensor& x_ND, const at::Tensor& pre_RC,
                 const at::Tensor& y_RD, layers::BufferPool* scratch) const;

  // Of out[token] += weight f(x[token]) for every row. Adds to the gradients of the weights,
  // overwrites `pre`, writes dweight [R] S and dx [R, D], dL/dx of each row, which may be no other
  // argument. weight and dweight [R] S may be undefined: all 1.
  Status Backward(const Dispatch& dispatch, const at::Tensor& x_ND, const at::Tensor& dout_ND,
                  const at::Tensor& weight_R, const at::Tensor& pre_RC, const at::Tensor& dweight_R,
                  const at::Tensor& dx_RD, layers::BufferPool* scratch) const;

 private:
  // Experts [first, last) of `order`, their memory being there.
  using Some = std::span<const int>;
  void ForwardOf(Some experts, const Dispatch& dispatch, const at::Tensor& x_ND,
                 const at::Tensor& pre_RC, const at::Tensor& y_RD, const at::Tensor& inputs,
                 const at::Tensor& hidden_values) const;
  struct Gradients {
    at::Tensor x_ND, dout_ND;        // of tokens
    at::Tensor weight_R, dweight_R;  // may be undefined
    at::Tensor pre_RC, hidden_RF;
    at::Tensor x_RD, dout_RD, dx_RD;  // of rows
  };
  void BackwardOf(Some experts, const Dispatch& dispatch, const Gradients& g) const;
  void WeightGradients(Some experts, const Dispatch& dispatch, const Gradients& g) const;
  // Calls body for all experts that have rows, as many at a time as have their memory.
  template <typename Body>
  Status ForExperts(const Dispatch& dispatch, layers::ExpertMemory::Use use,
                    const Body& body) const;

  const layers::Activation activation_;
  const std::vector<layers::FeedForwardTensors> experts_;
  layers::ExpertMemory* const memory_;
  const int layer_;
};

}  // namespace heddle::moe
