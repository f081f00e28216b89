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
constexpr int64_t kGradientRowsPerTask = 512;

struct Piece {
  int64_t expert = 0;
  int64_t begin = 0;
  int64_t rows = 0;

  at::Tensor Of(const at::Tensor& t) const { return t.narrow(0, begin, rows); }
};

std::vector<Piece> PiecesOf(std::span<const int> experts, const Dispatch& dispatch) {
  std::vector<Piece> pieces;
  for (const int expert : experts) {
    const auto e = static_cast<size_t>(expert);
    for (int64_t row = dispatch.begin[e]; row < dispatch.begin[e + 1]; row += kRowsPerTask) {
      pieces.push_back(
          {static_cast<int64_t>(e), row, std::min(kRowsPerTask, dispatch.begin[e + 1] - row)});
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
Status Experts::ForExperts(const Dispatch& dispatch, layers::ExpertMemory::Use use,
                           const Body& body) const {
  std::vector<int> order;
  for (size_t e = 0; e < experts_.size(); ++e) {
    if (dispatch.begin[e] < dispatch.begin[e + 1]) order.push_back(static_cast<int>(e));
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

void Experts::ForwardOf(Some some, const Dispatch& dispatch, const at::Tensor& x,
                        const at::Tensor& pre, const at::Tensor& y, const at::Tensor& inputs,
                        const at::Tensor& hidden_values) const {
  const std::vector<Piece> pieces = PiecesOf(some, dispatch);
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t thread) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const layers::FeedForwardTensors& expert = experts_[static_cast<size_t>(piece.expert)];
    if (dispatch.identity()) {
      ExpertLinear(piece.Of(x), expert.in_CD, piece.Of(pre));
    } else {
      const at::Tensor in = inputs.select(0, thread).narrow(0, 0, piece.rows);
      Gather(dispatch, piece, x, in);
      ExpertLinear(in, expert.in_CD, piece.Of(pre));
    }
    if (!y.defined()) return;
    const at::Tensor hidden = hidden_values.select(0, thread).narrow(0, 0, piece.rows);
    layers::Activate(activation_, piece.Of(pre), hidden);
    ExpertLinear(hidden, expert.down_DF, piece.Of(y));
  });
}

Status Experts::Forward(const Dispatch& dispatch, const at::Tensor& x, const at::Tensor& pre,
                        const at::Tensor& y, layers::BufferPool* scratch) const {
  int64_t longest = 0;
  for (size_t e = 0; e < experts_.size(); ++e) {
    longest = std::max(longest, dispatch.begin[e + 1] - dispatch.begin[e]);
  }
  longest = std::min(longest, kRowsPerTask);
  const int64_t threads = at::get_num_threads();
  const size_t mark = scratch->Mark();
  // One piece per thread.
  const at::Tensor inputs = scratch->Take({threads, longest, x.size(1)}, x.scalar_type());
  const at::Tensor hidden =
      scratch->Take({threads, longest, experts_.front().hidden()}, x.scalar_type());
  const Status computed = ForExperts(dispatch, layers::ExpertMemory::Use::kForward, [&](Some some) {
    ForwardOf(some, dispatch, x, pre, y, inputs, hidden);
  });
  scratch->Release(mark);
  return computed;
}

void Experts::BackwardOf(Some some, const Dispatch& dispatch, const Gradients& g) const {
  const std::vector<Piece> pieces = PiecesOf(some, dispatch);
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const layers::FeedForwardTensors& expert = experts_[static_cast<size_t>(piece.expert)];
    if (!dispatch.identity()) {
      Gather(dispatch, piece, g.x_ND, piece.Of(g.x_RD));
      Gather(dispatch, piece, g.dout_ND, piece.Of(g.dout_RD));
    }
    ExpertInputGradient(piece.Of(g.dout_RD), expert.down_DF, piece.Of(g.hidden_RF));
    if (g.weight_R.defined()) {
      layers::ActivateWeightedBackward(activation_, piece.Of(g.weight_R), piece.Of(g.pre_RC),
                                       piece.Of(g.hidden_RF), piece.Of(g.dweight_R));
    } else {
      layers::ActivateBackward(activation_, piece.Of(g.pre_RC), piece.Of(g.hidden_RF));
    }
  });
  WeightGradients(some, dispatch, g);
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const layers::FeedForwardTensors& expert = experts_[static_cast<size_t>(piece.expert)];
    ExpertInputGradient(piece.Of(g.pre_RC), expert.in_CD, piece.Of(g.dx_RD));
  });
}

Status Experts::Backward(const Dispatch& dispatch, const at::Tensor& x, const at::Tensor& dout,
                         const at::Tensor& weight, const at::Tensor& pre, const at::Tensor& dweight,
                         const at::Tensor& dx, layers::BufferPool* scratch) const {
  Gradients g{.x_ND = x, .dout_ND = dout, .weight_R = weight, .dweight_R = dweight, .pre_RC = pre};
  g.dx_RD = dx;
  const size_t mark = scratch->Mark();
  g.hidden_RF = scratch->Take({dispatch.rows(), experts_.front().hidden()}, x.scalar_type());
  g.x_RD = x;
  g.dout_RD = dout;
  if (!dispatch.identity()) {
    g.x_RD = g.dx_RD;  // read by the weight gradients, written after them
    g.dout_RD = scratch->Take({dispatch.rows(), x.size(1)}, x.scalar_type());
  }
  const Status computed = ForExperts(dispatch, layers::ExpertMemory::Use::kBackward,
                                     [&](Some some) { BackwardOf(some, dispatch, g); });
  scratch->Release(mark);
  return computed;
}

void Experts::WeightGradients(Some some, const Dispatch& dispatch, const Gradients& g) const {
  struct Task {
    at::Tensor gradient;  // some rows of a matrix
    at::Tensor dy;
    at::Tensor x;
  };
  std::vector<Task> tasks;
  const auto add = [&](const at::Tensor& gradient, const at::Tensor& dy, const at::Tensor& x) {
    for (int64_t row = 0; row < gradient.size(0); row += kGradientRowsPerTask) {
      const int64_t rows = std::min(kGradientRowsPerTask, gradient.size(0) - row);
      tasks.push_back({gradient.narrow(0, row, rows), dy.narrow(1, row, rows), x});
    }
  };
  for (const int expert : some) {
    const auto e = static_cast<size_t>(expert);
    const Piece all{expert, dispatch.begin[e], dispatch.begin[e + 1] - dispatch.begin[e]};
    add(experts_[e].down_gradient_DF, all.Of(g.dout_RD), all.Of(g.hidden_RF));
    add(experts_[e].in_gradient_CD, all.Of(g.pre_RC), all.Of(g.x_RD));
  }
  layers::RunTasks(static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const Task& task = tasks[static_cast<size_t>(i)];
    ExpertWeightGradient(task.dy, task.x, task.gradient);
  });
}

}  // namespace heddle::moe
