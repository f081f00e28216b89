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
  bool has_memory() const { return memory_ != nullptr; }

  // The rows of a micro-batch. `dispatch` is borrowed for the call.
  struct ForwardRows {
    const Dispatch* dispatch = nullptr;
    at::Tensor x_ND;
    // Written: [R, C], the first product of each row; [R, D], f(x) of its expert, not weighted. y
    // may be undefined: then only `pre` is computed, which is what a backward needs.
    at::Tensor pre_RC, y_RD;
  };
  // Every expert is visited once for all batches: what its memory costs is paid once. The same bits
  // as a call for each of them in their order.
  Status Forward(std::span<const ForwardRows> batches, layers::BufferPool* scratch) const;

  // Of out[token] += weight f(x[token]) for every row.
  struct BackwardRows {
    const Dispatch* dispatch = nullptr;
    at::Tensor x_ND, dout_ND;
    at::Tensor weight_R;   // [R] S; undefined: all 1
    at::Tensor pre_RC;     // of the forward; overwritten
    at::Tensor dweight_R;  // [R] S, written; undefined with weight
    at::Tensor dx_RD;      // dL/dx of each row, written; no other argument
  };
  // Adds to the gradients of the weights, batch by batch.
  Status Backward(std::span<const BackwardRows> batches, layers::BufferPool* scratch) const;

 private:
  // Experts whose memory is there.
  using Some = std::span<const int>;
  // Room of each thread for a piece.
  struct Room {
    at::Tensor inputs;
    at::Tensor hidden_values;
  };
  void ForwardOf(Some experts, std::span<const ForwardRows> batches, const Room& room) const;
  // Of a batch, and what its backward needs beside it.
  struct Gradients {
    BackwardRows of;
    at::Tensor hidden_RF;
    at::Tensor x_RD, dout_RD;  // of rows
  };
  void BackwardOf(Some experts, std::span<const Gradients> batches) const;
  void WeightGradients(Some experts, std::span<const Gradients> batches) const;
  // Calls body for all experts that have rows in any batch, as many at a time as have their memory.
  using Dispatches = std::vector<const Dispatch*>;
  template <typename Body>
  Status ForExperts(const Dispatches& batches, layers::ExpertMemory::Use use,
                    const Body& body) const;

  const layers::Activation activation_;
  const std::vector<layers::FeedForwardTensors> experts_;
  layers::ExpertMemory* const memory_;
  const int layer_;
};

}  // namespace heddle::moe
