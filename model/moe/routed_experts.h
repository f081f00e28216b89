// The experts of a layer for the rows that the router gave them, wherever they are: on this rank,
// or divided over ranks that exchange rows (training-runtime.md section 10).
//
// Divided experts take three rounds of messages forward (how many rows; the rows; their results,
// where they are asked for) and two backward (gradients of the results, each with the weight of its
// row behind it; gradients of the rows, each with that of its weight). Recomputation sends the rows
// alone. The same on all ranks, whether they have rows or not.
//
// N tokens, R rows of the router's dispatch over all experts, M rows that this rank's experts get.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/expert_access.h"
#include "model/layers/feed_forward.h"
#include "model/layers/sublayer.h"
#include "model/moe/dispatch.h"
#include "model/moe/experts.h"

namespace heddle::moe {

class RoutedExperts {
 public:
  // `experts` are this rank's. `access` is borrowed; `layer` names it to the memory.
  RoutedExperts(layers::Activation activation, std::vector<layers::FeedForwardTensors> experts,
                layers::ExpertAccess access, int layer);

  // Work that needs no routed row, called once by a call that does not fail before: while rows are
  // on their way, where they travel. Leaves `scratch` at the position at which it found it.
  using Meanwhile = std::function<void()>;

  // The routed rows of a micro-batch, by the object that keeps what its backward needs. `dispatch`
  // is borrowed for the call.
  struct ForwardRows {
    RoutedExperts* experts = nullptr;
    const Dispatch* dispatch = nullptr;
    at::Tensor x_ND;
    // Written: f(x) of each row's expert, not weighted; rows of padding are left as they are. May
    // be undefined: then only what a backward needs is computed.
    at::Tensor y_RD;
    Meanwhile meanwhile;
    layers::BufferPool* kept = nullptr;  // for what a backward needs; null: it is not kept
    // kRecompute takes the exchange as the kSelect or kTrain before it agreed on it.
    layers::Pass pass = layers::Pass::kInference;
  };
  // Of objects with the same experts, which are visited once for all batches; the same bits as a
  // call for each of them in their order. One that fails leaves `scratch` where it is.
  static Status Forward(std::span<const ForwardRows> batches, layers::BufferPool* scratch);

  // Of out[token] += weight f(x[token]) for every row. Follows a Forward that keeps, with the same
  // dispatch and x.
  struct BackwardRows {
    RoutedExperts* experts = nullptr;
    const Dispatch* dispatch = nullptr;
    at::Tensor x_ND, dout_ND;
    at::Tensor weight_R;          // [R] S
    at::Tensor dweight_R, dx_RD;  // written; rows of padding have no meaning
    Meanwhile meanwhile;
  };
  // Adds to the gradients of the weights, batch by batch. `scratch` as above.
  static Status Backward(std::span<const BackwardRows> batches, layers::BufferPool* scratch);

  // Experts come and go: visits had better be few.
  bool has_memory() const { return experts_.has_memory(); }

 private:
  // What the ranks send each other of one dispatch.
  struct Plan {
    std::vector<int64_t> rows;      // of the dispatch, without padding, in the order of sending
    std::vector<int64_t> tokens;    // of these rows
    std::vector<int64_t> sent;      // rows to each rank
    std::vector<int64_t> received;  // rows from each rank
    Dispatch dispatch;              // of the received rows over this rank's experts
    std::vector<int64_t> slots;     // rows of it, of the received ones
    int64_t sent_rows() const { return static_cast<int64_t>(rows.size()); }
    int64_t received_rows() const { return static_cast<int64_t>(slots.size()); }
  };
  Plan& PlanOf(const ForwardRows& rows) {
    return rows.pass == layers::Pass::kInference ? inference_plan_ : plan_;
  }
  Status MakePlan(const Dispatch& dispatch, Plan* plan) const;
  // What the ranks tell each other first: rows for every expert, [rank][its expert]; returns those
  // that every rank has for the experts of this one.
  StatusOr<std::vector<int64_t>> ExchangeCounts(const std::vector<int64_t>& mine) const;
  // from [sum of sent, bytes] -> what the other ranks sent, [sum of received, bytes].
  StatusOr<std::unique_ptr<layers::PendingRows>> Start(const at::Tensor& from,
                                                       const std::vector<int64_t>& sent,
                                                       const at::Tensor& to,
                                                       const std::vector<int64_t>& received) const;
  // Rows of `from` and, where it is defined, of `weights`: those of tokens or of the dispatch.
  struct Rows {
    at::Tensor from;     // [*, D]
    at::Tensor weights;  // [*] S, or undefined
  };
  // Row from[tokens[i]] and weight weights[rows[i]] of what this rank sends, to the rank of its
  // expert; what comes, to to.from [M, D] as it came and to.weights [rows of plan.dispatch].
  Status SendOut(const Plan& plan, const Rows& from, const Rows& to, const Meanwhile& meanwhile,
                 layers::BufferPool* scratch) const;
  // Up to where the experts compute, and what they work on.
  StatusOr<Experts::ForwardRows> Start(const ForwardRows& rows, layers::BufferPool* scratch);
  StatusOr<Experts::BackwardRows> Start(const BackwardRows& rows, layers::BufferPool* scratch);
  // Rows computed for others go back: of `computed` [rows of plan.dispatch, ...] to `out` [R, ...].
  Status SendBack(const Plan& plan, const Rows& computed, const Rows& out,
                  layers::BufferPool* scratch) const;

  const Experts experts_;
  const int64_t local_;  // experts of this rank
  layers::RowExchange* const exchange_;
  const int layer_;

  // Of the last forward that keeps.
  at::Tensor pre_RC_;
  at::Tensor received_MD_;
  Plan plan_;            // of the last forward of training
  Plan inference_plan_;  // apart, so that an evaluation disturbs no training pass
};

}  // namespace heddle::moe
