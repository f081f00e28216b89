// The experts of a layer for the rows that the router gave them, wherever they are: on this rank,
// or divided over ranks that exchange rows (training-runtime.md section 10).
//
// N tokens, R rows of the router's dispatch over all experts, M rows that this rank's experts get.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/expert_access.h"
#include "model/layers/feed_forward.h"
#include "model/moe/dispatch.h"
#include "model/moe/experts.h"

namespace heddle::moe {

class RoutedExperts {
 public:
  // `experts` are this rank's. `access` is borrowed; `layer` names it to the memory.
  RoutedExperts(layers::Activation activation, std::vector<layers::FeedForwardTensors> experts,
                layers::ExpertAccess access, int layer);

  // y [R, D] = f(x) of each row's expert, not weighted; rows of padding are left as they are. y may
  // be undefined: then only what a backward needs is computed. That is kept, in `kept`, if it is
  // not null.
  Status Forward(const Dispatch& dispatch, const at::Tensor& x_ND, const at::Tensor& y_RD,
                 layers::BufferPool* kept, layers::BufferPool* scratch);

  // Of out[token] += weight f(x[token]) for every row: adds to the gradients of the weights, writes
  // dweight [R] S and dx [R, D]; rows of padding have no meaning. Follows a Forward that keeps,
  // with the same dispatch and x. dx is of `scratch`.
  StatusOr<at::Tensor> Backward(const Dispatch& dispatch, const at::Tensor& x_ND,
                                const at::Tensor& dout_ND, const at::Tensor& weight_R,
                                const at::Tensor& dweight_R, layers::BufferPool* scratch);

 private:
  // What the ranks send each other of one dispatch.
  struct Plan {
    std::vector<int64_t> rows;      // of the dispatch, without padding, in the order of sending
    std::vector<int64_t> sent;      // rows to each rank
    std::vector<int64_t> received;  // rows from each rank
    Dispatch dispatch;              // of the received rows over this rank's experts
    int64_t received_rows() const { return static_cast<int64_t>(dispatch.slots.size()); }
  };
  Status MakePlan(const Dispatch& dispatch, Plan* plan) const;
  // from [*, D] -> what the other ranks sent, [M, D].
  Status Exchange(const at::Tensor& from, const std::vector<int64_t>& sent, const at::Tensor& to,
                  const std::vector<int64_t>& received) const;
  // Rows computed for others go back: `computed` [rows of plan.dispatch, ...] to `out` [R, ...].
  Status Return(const Plan& plan, const at::Tensor& computed, const at::Tensor& out,
                layers::BufferPool* scratch) const;

  const Experts experts_;
  const int64_t local_;  // experts of this rank
  layers::RowExchange* const exchange_;
  const int layer_;

  // Of the last forward that keeps.
  at::Tensor pre_RC_;
  at::Tensor received_MD_;
  Plan plan_;
  Plan inference_plan_;  // apart, so that an evaluation disturbs no training pass
};

}  // namespace heddle::moe
