#include "model/moe/experts.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/status/status.h"
#include "model/layers/layers.h"
#include "model/layers/tasks.h"

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

std::vector<Piece> PiecesOf(const Dispatch& dispatch) {
  std::vector<Piece> pieces;
  for (size_t e = 0; e + 1 < dispatch.begin.size(); ++e) {
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

Experts::Experts(layers::Activation activation, std::vector<layers::FeedForwardTensors> experts)
    : activation_(activation), experts_(std::move(experts)) {
  HEDDLE_CHECK(!experts_.empty());
}

void Experts::Forward(const Dispatch& dispatch, const at::Tensor& x, const at::Tensor& pre,
                      const at::Tensor& y, layers::BufferPool* scratch) const {
  const std::vector<Piece> pieces = PiecesOf(dispatch);
  const int64_t threads = at::get_num_threads();
  int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.rows);
  const size_t mark = scratch->Mark();
  // One piece per thread.
  const at::Tensor inputs = scratch->Take({threads, longest, x.size(1)}, x.scalar_type());
  const at::Tensor hidden_values =
      scratch->Take({threads, longest, experts_.front().hidden()}, x.scalar_type());
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t thread) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const layers::FeedForwardTensors& expert = experts_[static_cast<size_t>(piece.expert)];
    if (dispatch.identity()) {
      layers::Linear(piece.Of(x), expert.in_CD, piece.Of(pre));
    } else {
      const at::Tensor in = inputs.select(0, thread).narrow(0, 0, piece.rows);
      Gather(dispatch, piece, x, in);
      layers::Linear(in, expert.in_CD, piece.Of(pre));
    }
    if (!y.defined()) return;
    const at::Tensor hidden = hidden_values.select(0, thread).narrow(0, 0, piece.rows);
    layers::Activate(activation_, piece.Of(pre), hidden);
    layers::Linear(hidden, expert.down_DF, piece.Of(y));
  });
  scratch->Release(mark);
}

at::Tensor Experts::Backward(const Dispatch& dispatch, const at::Tensor& x, const at::Tensor& dout,
                             const at::Tensor& weight, const at::Tensor& pre,
                             const at::Tensor& dweight, layers::BufferPool* scratch) const {
  const int64_t d = x.size(1);
  const std::vector<Piece> pieces = PiecesOf(dispatch);
  const at::Tensor dx = scratch->Take({dispatch.rows(), d}, x.scalar_type());
  const size_t mark = scratch->Mark();
  const at::Tensor hidden =
      scratch->Take({dispatch.rows(), experts_.front().hidden()}, x.scalar_type());
  at::Tensor x_rows = x;
  at::Tensor dout_rows = dout;
  if (!dispatch.identity()) {
    x_rows = dx;  // read by the weight gradients, written after them
    dout_rows = scratch->Take({dispatch.rows(), d}, x.scalar_type());
  }
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const layers::FeedForwardTensors& expert = experts_[static_cast<size_t>(piece.expert)];
    if (!dispatch.identity()) {
      Gather(dispatch, piece, x, piece.Of(x_rows));
      Gather(dispatch, piece, dout, piece.Of(dout_rows));
    }
    layers::LinearInputGradient(piece.Of(dout_rows), expert.down_DF, piece.Of(hidden));
    if (weight.defined()) {
      layers::ActivateWeightedBackward(activation_, piece.Of(weight), piece.Of(pre),
                                       piece.Of(hidden), piece.Of(dweight));
    } else {
      layers::ActivateBackward(activation_, piece.Of(pre), piece.Of(hidden));
    }
  });
  WeightGradients(dispatch, x_rows, dout_rows, pre, hidden);
  layers::RunTasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    const layers::FeedForwardTensors& expert = experts_[static_cast<size_t>(piece.expert)];
    layers::LinearInputGradient(piece.Of(pre), expert.in_CD, piece.Of(dx));
  });
  scratch->Release(mark);
  return dx;
}

void Experts::WeightGradients(const Dispatch& dispatch, const at::Tensor& x_rows,
                              const at::Tensor& dout_rows, const at::Tensor& dpre,
                              const at::Tensor& hidden) const {
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
  for (size_t e = 0; e < experts_.size(); ++e) {
    const Piece all{static_cast<int64_t>(e), dispatch.begin[e],
                    dispatch.begin[e + 1] - dispatch.begin[e]};
    if (all.rows == 0) continue;
    add(experts_[e].down_gradient_DF, all.Of(dout_rows), all.Of(hidden));
    add(experts_[e].in_gradient_CD, all.Of(dpre), all.Of(x_rows));
  }
  layers::RunTasks(static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const Task& task = tasks[static_cast<size_t>(i)];
    layers::LinearWeightGradient(task.dy, task.x, task.gradient);
  });
}

}  // namespace heddle::moe
