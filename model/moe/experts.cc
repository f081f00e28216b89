#include "model/moe/experts.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/status/status.h"
#include "model/layers/layers.h"
#include "model/layers/tasks.h"
#include "model/moe/expert_products.h"

namespace heddle::moe {
namespace {

// Rows of one matrix product, and rows of a weight gradient that one task computes. Part of the
// numbers (S49).
constexpr int64_t kRowsPerTask = 256;
constexpr int64_t kRowsAligned = 32;  // of bf16 or wider, of any width: whole cache lines
constexpr int64_t kGradientRowsPerTask = 512;

struct Piece {
  size_t batch = 0;
  size_t expert = 0;
  int64_t begin = 0;
  int64_t rows = 0;

  at::Tensor Of(const at::Tensor& t) const { return t.narrow(0, begin, rows); }
};

template <typename Rows>
std::vector<const Dispatch*> DispatchesOf(std::span<const Rows> batches) {
  std::vector<const Dispatch*> all;
  for (const Rows& batch : batches) all.push_back(batch.dispatch);
  return all;
}

std::vector<Piece> PiecesOf(std::span<const int> experts,
                            const std::vector<const Dispatch*>& batches) {
  std::vector<Piece> pieces;
  for (const int expert : experts) {
    const auto e = static_cast<size_t>(expert);
    for (size_t b = 0; b < batches.size(); ++b) {
      const std::vector<int64_t>& begin = batches[b]->begin;
      for (int64_t row = begin[e]; row < begin[e + 1]; row += kRowsPerTask) {
        pieces.push_back({b, e, row, std::min(kRowsPerTask, begin[e + 1] - row)});
      }
    }
  }
  return pieces;
}

// to[i] = x[token of row piece.begin + i], 0 for padding.
void Gather(const Dispatch& dispatch, const Piece& piece, const at::Tensor& x_ND,
            const at::Tensor& to) {
  const size_t bytes = static_cast<size_t>(x_ND.size(1) * x_ND.element_size());
  const char* from = static_cast<const char*>(x_ND.data_ptr());
  char* out = static_cast<char*>(to.data_ptr());
  for (int64_t row = piece.begin; row < piece.begin + piece.rows; ++row, out += bytes) {
    if (dispatch.row_assignment[static_cast<size_t>(row)] < 0) {
      std::memset(out, 0, bytes);
    } else {
      std::memcpy(out, from + static_cast<size_t>(dispatch.token(row)) * bytes, bytes);
    }
  }
}

}  // namespace

Experts::Experts(layers::Activation activation, std::vector<layers::FeedForwardTensors> experts,
                 layers::ExpertMemory* memory, int layer)
    : activation_(activation), experts_(std::move(experts)), memory_(memory), layer_(layer) {
  HEDDLE_CHECK(!experts_.empty());
}

template <typename Body>
Status Experts::ForExperts(const Dispatches& batches, layers::ExpertMemory::Use use,
                           const Body& body) const {
  std::vector<int> order;
  for (size_t e = 0; e < experts_.size(); ++e) {
    const bool used = std::any_of(batches.begin(), batches.end(), [&](const Dispatch* batch) {
      return batch->begin[e] < batch->begin[e + 1];
    });
    if (used) order.push_back(static_cast<int>(e));
  }
  if (memory_ == nullptr) {
    body(std::span<const int>(order));
    return OkStatus();
  }
  ASSIGN_OR_RETURN(order, memory_->Begin(layer_, order, use));
  for (size_t done = 0; done < order.size();) {
    ASSIGN_OR_RETURN(const size_t there, memory_->Next());
    body(std::span<const int>(order).subspan(done, there));
    RETURN_IF_ERROR(memory_->End());
    done += there;
  }
  return OkStatus();
}

void Experts::ForwardOf(Some some, std::span<const ForwardRows> batches, const Room& room) const {
  const std::vector<Piece> pieces = PiecesOf(some, DispatchesOf(batches));
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t thread) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const ForwardRows& batch = batches[piece.batch];
    const layers::FeedForwardTensors& expert = experts_[piece.expert];
    if (batch.dispatch->identity()) {
      ExpertLinear(piece.Of(batch.x_ND), expert.in_CD, piece.Of(batch.pre_RC));
    } else {
      const at::Tensor in = room.inputs.select(0, thread).narrow(0, 0, piece.rows);
      Gather(*batch.dispatch, piece, batch.x_ND, in);
      ExpertLinear(in, expert.in_CD, piece.Of(batch.pre_RC));
    }
    if (!batch.y_RD.defined()) return;
    const at::Tensor hidden = room.hidden_values.select(0, thread).narrow(0, 0, piece.rows);
    layers::Activate(activation_, piece.Of(batch.pre_RC), hidden);
    ExpertLinear(hidden, expert.down_DF, piece.Of(batch.y_RD));
  });
}

Status Experts::Forward(std::span<const ForwardRows> batches, layers::BufferPool* scratch) const {
  int64_t longest = 0;
  for (const ForwardRows& batch : batches) {
    for (size_t e = 0; e < experts_.size(); ++e) {
      longest = std::max(longest, batch.dispatch->begin[e + 1] - batch.dispatch->begin[e]);
    }
  }
  longest = std::min(longest, kRowsPerTask);
  // Every thread's room begins at whole cache lines, whatever the width: sums of a library's
  // products may depend on the alignment, and which thread takes a piece is chance.
  longest = (longest + kRowsAligned - 1) / kRowsAligned * kRowsAligned;
  const int64_t threads = at::get_num_threads();
  const at::Tensor& x = batches.front().x_ND;
  const size_t mark = scratch->Mark();
  // One piece per thread.
  const Room room = {scratch->Take({threads, longest, x.size(1)}, x.scalar_type()),
                     scratch->Take({threads, longest, experts_.front().hidden()}, x.scalar_type())};
  const Status computed = ForExperts(DispatchesOf(batches), layers::ExpertMemory::Use::kForward,
                                     [&](Some some) { ForwardOf(some, batches, room); });
  scratch->Release(mark);
  return computed;
}

void Experts::BackwardOf(Some some, std::span<const Gradients> batches) const {
  Dispatches dispatches;
  for (const Gradients& batch : batches) dispatches.push_back(batch.of.dispatch);
  const std::vector<Piece> pieces = PiecesOf(some, dispatches);
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const Gradients& g = batches[piece.batch];
    const layers::FeedForwardTensors& expert = experts_[piece.expert];
    if (!g.of.dispatch->identity()) {
      Gather(*g.of.dispatch, piece, g.of.x_ND, piece.Of(g.x_RD));
      Gather(*g.of.dispatch, piece, g.of.dout_ND, piece.Of(g.dout_RD));
    }
    ExpertInputGradient(piece.Of(g.dout_RD), expert.down_DF, piece.Of(g.hidden_RF));
    if (g.of.weight_R.defined()) {
      layers::ActivateWeightedBackward(activation_, piece.Of(g.of.weight_R), piece.Of(g.of.pre_RC),
                                       piece.Of(g.hidden_RF), piece.Of(g.of.dweight_R));
    } else {
      layers::ActivateBackward(activation_, piece.Of(g.of.pre_RC), piece.Of(g.hidden_RF));
    }
  });
  WeightGradients(some, batches);
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const BackwardRows& of = batches[piece.batch].of;
    ExpertInputGradient(piece.Of(of.pre_RC), experts_[piece.expert].in_CD, piece.Of(of.dx_RD));
  });
}

Status Experts::Backward(std::span<const BackwardRows> batches, layers::BufferPool* scratch) const {
  const size_t mark = scratch->Mark();
  std::vector<Gradients> all;
  for (const BackwardRows& batch : batches) {
    const at::Tensor& x = batch.x_ND;
    const int64_t rows = batch.dispatch->rows();
    Gradients& g = all.emplace_back();
    g.of = batch;
    g.hidden_RF = scratch->Take({rows, experts_.front().hidden()}, x.scalar_type());
    g.x_RD = x;
    g.dout_RD = batch.dout_ND;
    if (batch.dispatch->identity()) continue;
    g.x_RD = batch.dx_RD;  // read by the weight gradients, written after them
    g.dout_RD = scratch->Take({rows, x.size(1)}, x.scalar_type());
  }
  const Status computed = ForExperts(DispatchesOf(batches), layers::ExpertMemory::Use::kBackward,
                                     [&](Some some) { BackwardOf(some, all); });
  scratch->Release(mark);
  return computed;
}

void Experts::WeightGradients(Some some, std::span<const Gradients> batches) const {
  // Some rows of a gradient; they come from as many columns of dy, from `column` on.
  struct Task {
    size_t expert = 0;
    at::Tensor gradient;
    int64_t column = 0;
    bool down = false;
  };
  std::vector<Task> tasks;
  const auto add = [&](size_t expert, const at::Tensor& gradient, bool down) {
    for (int64_t row = 0; row < gradient.size(0); row += kGradientRowsPerTask) {
      const int64_t rows = std::min(kGradientRowsPerTask, gradient.size(0) - row);
      tasks.push_back({expert, gradient.narrow(0, row, rows), row, down});
    }
  };
  for (const int expert : some) {
    const auto e = static_cast<size_t>(expert);
    add(e, experts_[e].down_gradient_DF, true);
    add(e, experts_[e].in_gradient_CD, false);
  }
  layers::RunTasks(static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const Task& task = tasks[static_cast<size_t>(i)];
    for (const Gradients& g : batches) {
      const std::vector<int64_t>& begin = g.of.dispatch->begin;
      const int64_t first = begin[task.expert];
      const Piece all = {0, task.expert, first, begin[task.expert + 1] - first};
      if (all.rows == 0) continue;
      const at::Tensor dy = all.Of(task.down ? g.dout_RD : g.of.pre_RC);
      const at::Tensor x = all.Of(task.down ? g.hidden_RF : g.x_RD);
      ExpertWeightGradient(dy.narrow(1, task.column, task.gradient.size(0)), x, task.gradient);
    }
  });
}

}  // namespace heddle::moe
