#include "model/attention/indexer.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "base/status/status.h"
#include "kernels/indexer/params.h"

namespace heddle::attention {
namespace {

namespace ki = kernels::indexer;

// Units of work. They change speed only: no result depends on where rows or keys are cut.
constexpr int64_t kRowTask = 64;
constexpr int64_t kDenseKlRowTask = 16;
constexpr int64_t kKeyTask = 512;
constexpr int64_t kDenseKlKeyTask = 128;

template <typename T>
const ki::Table<T>& Kernels();
template <>
const ki::Table<float>& Kernels() {
  return ki::FloatKernels();
}
template <>
const ki::Table<double>& Kernels() {
  return ki::DoubleKernels();
}

// body(T{}) with T = float or double, as the tensor's type says.
template <typename Body>
auto WithType(const at::Tensor& t, const Body& body) {
  if (t.scalar_type() == at::kDouble) return body(double{});
  HEDDLE_CHECK(t.scalar_type() == at::kFloat, "indexer scores are fp32 or fp64");
  return body(float{});
}

// Threads take the next task that is left, since costs grow with the row.
template <typename Body>
void ForTasks(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(std::max(at::get_num_threads(), 1), count);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  });
}
// body(begin, end) for pieces of [0, rows), the last, dearest first.
template <typename Body>
void ForRowTasks(int64_t rows, int64_t step, const Body& body) {
  const int64_t count = (rows + step - 1) / step;
  ForTasks(count, [&](int64_t i) {
    const int64_t begin = (count - 1 - i) * step;
    body(ki::Rows{begin, std::min(begin + step, rows)});
  });
}

void CheckTensor(const at::Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
  HEDDLE_CHECK(t.device().is_cpu());
  HEDDLE_CHECK(t.scalar_type() == type, "type ", static_cast<int>(t.scalar_type()));
  HEDDLE_CHECK(t.sizes() == shape, "unexpected shape of rank ", t.dim());
  HEDDLE_CHECK(t.is_contiguous());
}

void CheckInputs(const IndexerInputs& in, int64_t rows) {
  HEDDLE_CHECK(in.q_NHI.dim() == 3 && in.q_NHI.size(0) == rows);
  const at::ScalarType type = in.q_NHI.scalar_type();
  const int64_t heads = in.q_NHI.size(1);
  const int64_t width = in.q_NHI.size(2);
  HEDDLE_CHECK(heads > 0 && width > 0);
  CheckTensor(in.q_NHI, {rows, heads, width}, type);
  CheckTensor(in.k_NI, {rows, width}, type);
  CheckTensor(in.w_NH, {rows, heads}, type);
  if (in.head_bias_H.defined()) CheckTensor(in.head_bias_H, {heads}, type);
}

// First row of the document of every row.
std::vector<int32_t> FirstRows(const layers::Documents& documents) {
  std::vector<int32_t> first;
  first.reserve(static_cast<size_t>(documents.rows()));
  for (size_t b = 0; b + 1 < documents.cu_seqlens.size(); ++b) {
    first.insert(first.end(),
                 static_cast<size_t>(documents.cu_seqlens[b + 1] - documents.cu_seqlens[b]),
                 documents.cu_seqlens[b]);
  }
  HEDDLE_CHECK(static_cast<int64_t>(first.size()) == documents.rows());
  return first;
}

template <typename T>
ki::Scores<T> ScoresOf(const IndexerInputs& in, const std::vector<int32_t>& first) {
  return {in.q_NHI.size(1),       in.q_NHI.size(2),
          in.activation,          in.score_scale,
          in.q_NHI.data_ptr<T>(), in.k_NI.data_ptr<T>(),
          in.w_NH.data_ptr<T>(),  in.head_bias_H.defined() ? in.head_bias_H.data_ptr<T>() : nullptr,
          first.data(),           nullptr};
}

template <typename T>
bool AnyNan(const at::Tensor& t, int64_t row) {
  const int64_t width = t.numel() / t.size(0);
  const T* values = t.const_data_ptr<T>() + row * width;
  return std::any_of(values, values + width, [](T value) { return std::isnan(value); });
}

}  // namespace

int64_t CountNanRows(const IndexerInputs& inputs, const layers::Documents& documents,
                     const std::vector<int32_t>& counts) {
  return WithType(inputs.q_NHI, [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor& bias = inputs.head_bias_H;
    const bool all = bias.defined() && AnyNan<T>(bias.unsqueeze(0), 0);
    int64_t found = 0;
    bool key = false;  // a NaN among the keys of the document so far
    for (int64_t t = 0; t < documents.rows(); ++t) {
      const int32_t position = documents.positions[static_cast<size_t>(t)];
      key = (position > 0 && key) || AnyNan<T>(inputs.k_NI, t);
      if (counts[static_cast<size_t>(t)] > position) continue;  // takes every key
      found += all || key || AnyNan<T>(inputs.q_NHI, t) || AnyNan<T>(inputs.w_NH, t) ? 1 : 0;
    }
    return found;
  });
}

KeySets SelectKeys(const IndexerInputs& inputs, const layers::Documents& documents,
                   const std::vector<int32_t>& counts, ki::TieBreak tie_break) {
  const int64_t rows = documents.rows();
  CheckInputs(inputs, rows);
  HEDDLE_CHECK(static_cast<int64_t>(counts.size()) == rows);
  const std::vector<int32_t> first = FirstRows(documents);
  KeySets sets;
  sets.offsets.resize(static_cast<size_t>(rows) + 1);
  sets.end.resize(static_cast<size_t>(rows));
  for (size_t t = 0; t < static_cast<size_t>(rows); ++t) {
    HEDDLE_CHECK(counts[t] >= 0);
    sets.end[t] = static_cast<int32_t>(t) + 1;
    sets.offsets[t + 1] = sets.offsets[t] + std::min(counts[t], sets.end[t] - first[t]);
  }
  sets.first.resize(static_cast<size_t>(sets.offsets.back()));
  WithType(inputs.q_NHI, [&](auto type) {
    using T = decltype(type);
    const ki::Select<T> p{ScoresOf<T>(inputs, first), tie_break, sets.offsets.data(),
                          sets.first.data()};
    ForRowTasks(rows, kRowTask, [&](ki::Rows task) { Kernels<T>().select(p, task); });
  });
  return sets;
}

ScoreStatistics MeasureScores(const IndexerInputs& inputs, const layers::Documents& documents) {
  const int64_t rows = documents.rows();
  CheckInputs(inputs, rows);
  const std::vector<int32_t> first = FirstRows(documents);
  ScoreStatistics out;
  for (at::Tensor* t : {&out.mean_N, &out.variance_N, &out.maximum_N, &out.entropy_N}) {
    *t = at::empty({rows}, inputs.q_NHI.options());
  }
  WithType(inputs.q_NHI, [&](auto type) {
    using T = decltype(type);
    const ki::Statistics<T> p{ScoresOf<T>(inputs, first), out.mean_N.data_ptr<T>(),
                              out.variance_N.data_ptr<T>(), out.maximum_N.data_ptr<T>(),
                              out.entropy_N.data_ptr<T>()};
    ForRowTasks(rows, kRowTask, [&](ki::Rows task) { Kernels<T>().statistics(p, task); });
  });
  return out;
}

at::Tensor ScoreMatrix(const IndexerInputs& inputs, const layers::Documents& documents, int64_t b) {
  CheckInputs(inputs, documents.rows());
  HEDDLE_CHECK(b >= 0 && b + 1 < static_cast<int64_t>(documents.cu_seqlens.size()));
  const std::vector<int32_t> first = FirstRows(documents);
  const int64_t start = documents.cu_seqlens[static_cast<size_t>(b)];
  const int64_t length = documents.cu_seqlens[static_cast<size_t>(b) + 1] - start;
  const at::Tensor matrix_TT =
      at::full({length, length}, -std::numeric_limits<double>::infinity(), inputs.q_NHI.options());
  WithType(inputs.q_NHI, [&](auto type) {
    using T = decltype(type);
    const ki::Scores<T> p = ScoresOf<T>(inputs, first);
    T* to = matrix_TT.data_ptr<T>();
    for (int64_t t = 0; t < length; ++t) Kernels<T>().row_scores(p, start + t, to + t * length);
  });
  return matrix_TT;
}

namespace {

// Rows of heads as the kernel takes them: S, the last two dimensions contiguous.
at::Tensor Target(const at::Tensor& t, int64_t rows, at::ScalarType type) {
  HEDDLE_CHECK(t.device().is_cpu());
  HEDDLE_CHECK(t.dim() == 3 && t.size(0) == rows, "attention tensor of rank ", t.dim());
  if (t.scalar_type() != type) return t.to(type).contiguous();
  const bool rows_only = t.stride(2) == 1 && t.stride(1) == t.size(2);
  return rows_only ? t : t.contiguous();
}

void Provide(at::Tensor* t, at::IntArrayRef shape, const at::TensorOptions& options) {
  if (!t->defined()) *t = at::empty(shape, options);
  CheckTensor(*t, shape, options.dtype().toScalarType());
}

// Tensors that live while the kernels run.
struct KlTensors {
  at::Tensor q_NHD, k_NJD, loss_N, lse_scores_N, dscores, dhead_bias_NH;
};

template <typename T>
ki::Kl<T> KlOf(const ki::Scores<T>& scores, const KlTarget& target, const KlTensors& tensors,
               IndexerGradients* gradients) {
  ki::Kl<T> p;
  p.scores = scores;
  if (target.sets != nullptr) {
    p.offsets = target.sets->offsets.data();
    p.selected = target.sets->first.data();
  }
  p.attention_heads = tensors.q_NHD.size(1);
  p.kv_heads = tensors.k_NJD.size(1);
  p.key_dim = tensors.q_NHD.size(2);
  p.attention_scale = target.scale;
  p.attention_q = tensors.q_NHD.data_ptr<T>();
  p.attention_k = tensors.k_NJD.data_ptr<T>();
  p.q_stride = tensors.q_NHD.stride(0);
  p.k_stride = tensors.k_NJD.stride(0);
  p.lse = target.lse_NH.data_ptr<T>();
  p.loss = tensors.loss_N.data_ptr<T>();
  if (gradients == nullptr) return p;
  p.lse_scores = tensors.lse_scores_N.data_ptr<T>();
  if (tensors.dscores.defined()) p.dscores = tensors.dscores.data_ptr<T>();
  p.dq = gradients->dq_NHI.data_ptr<T>();
  p.dw = gradients->dw_NH.data_ptr<T>();
  p.dk = gradients->dk_NI.data_ptr<T>();
  if (tensors.dhead_bias_NH.defined()) p.dhead_bias = tensors.dhead_bias_NH.data_ptr<T>();
  return p;
}

// Tiles of every document's keys with the rows from there to the document's end.
std::vector<ki::KeyTask> KeyTasks(const layers::Documents& documents, int64_t step) {
  std::vector<ki::KeyTask> tasks;
  for (size_t b = 0; b + 1 < documents.cu_seqlens.size(); ++b) {
    const int64_t end = documents.cu_seqlens[b + 1];
    for (int64_t key = documents.cu_seqlens[b]; key < end; key += step) {
      tasks.push_back({{key, std::min(key + step, end)}, {key, end}});
    }
  }
  return tasks;
}

template <typename T>
void RunKl(const ki::Kl<T>& p, const layers::Documents& documents) {
  const bool selected = p.offsets != nullptr;
  ForRowTasks(documents.rows(), selected ? kRowTask : kDenseKlRowTask,
              [&](ki::Rows task) { Kernels<T>().kl_rows(p, task); });
  if (p.dq == nullptr) return;
  const std::vector<ki::KeyTask> tasks = KeyTasks(documents, selected ? kKeyTask : kDenseKlKeyTask);
  ForTasks(static_cast<int64_t>(tasks.size()),
           [&](int64_t i) { Kernels<T>().kl_keys(p, tasks[static_cast<size_t>(i)]); });
}

// Sums of the columns in the order of rows.
template <typename T>
void SumRows(const at::Tensor& from_NH, const at::Tensor& to_H) {
  const int64_t columns = from_NH.size(1);
  const T* from = from_NH.data_ptr<T>();
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int64_t t = 0; t < from_NH.size(0); ++t) sum += static_cast<double>(from[t * columns + j]);
    to_H.data_ptr<T>()[j] = static_cast<T>(sum);
  }
}

void CheckTarget(const IndexerInputs& inputs, const KlTarget& target, int64_t rows) {
  HEDDLE_CHECK(target.q_NHD.dim() == 3 && target.k_NJD.dim() == 3);
  HEDDLE_CHECK(target.q_NHD.size(2) == target.k_NJD.size(2));
  HEDDLE_CHECK(target.k_NJD.size(1) > 0 && target.q_NHD.size(1) % target.k_NJD.size(1) == 0);
  CheckTensor(target.lse_NH, {rows, target.q_NHD.size(1)}, inputs.q_NHI.scalar_type());
  if (target.sets == nullptr) return;
  HEDDLE_CHECK(target.sets->set_heads == 1 && target.sets->width == 1,
               "the indexer learns on token sets shared by all heads");
  HEDDLE_CHECK(static_cast<int64_t>(target.sets->offsets.size()) == rows + 1);
}

}  // namespace

double IndexerKl(const IndexerInputs& inputs, const layers::Documents& documents,
                 const KlTarget& target, double temperature, double row_weight,
                 IndexerGradients* gradients) {
  const int64_t rows = documents.rows();
  CheckInputs(inputs, rows);
  CheckTarget(inputs, target, rows);
  const int64_t heads = inputs.q_NHI.size(1);
  const int64_t width = inputs.q_NHI.size(2);
  const at::TensorOptions options = inputs.q_NHI.options();
  const bool biased = inputs.head_bias_H.defined();
  const std::vector<int32_t> first = FirstRows(documents);
  KlTensors tensors{Target(target.q_NHD, rows, inputs.q_NHI.scalar_type()),
                    Target(target.k_NJD, rows, inputs.q_NHI.scalar_type()),
                    at::empty({rows}, options)};
  if (gradients != nullptr) {
    Provide(&gradients->dq_NHI, {rows, heads, width}, options);
    Provide(&gradients->dk_NI, {rows, width}, options);
    Provide(&gradients->dw_NH, {rows, heads}, options);
    tensors.lse_scores_N = at::empty({rows}, options);
    if (target.sets != nullptr) {
      tensors.dscores = at::empty({target.sets->offsets.back()}, options);
    }
    if (biased) {
      Provide(&gradients->dhead_bias_H, {heads}, options);
      tensors.dhead_bias_NH = at::empty({rows, heads}, options);
    }
  }
  return WithType(inputs.q_NHI, [&](auto type) {
    using T = decltype(type);
    ki::Kl<T> p = KlOf<T>(ScoresOf<T>(inputs, first), target, tensors, gradients);
    p.temperature = temperature;
    p.row_weight = row_weight;
    RunKl(p, documents);
    if (tensors.dhead_bias_NH.defined()) SumRows<T>(tensors.dhead_bias_NH, gradients->dhead_bias_H);
    const T* loss = tensors.loss_N.data_ptr<T>();
    double sum = 0;
    for (int64_t t = 0; t < rows; ++t) sum += static_cast<double>(loss[t]);
    return sum;
  });
}

}  // namespace heddle::attention
