#include "model/attention/nsa_gates.h"

#include <ATen/Parallel.h>

#include <cmath>

#include "base/status/status.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {
namespace {

constexpr int64_t kPairsPerTask = 512;

template <typename S>
S Sigmoid(S x) {
  return S{1} / (S{1} + std::exp(-x));
}

// Eight partial sums, added in a fixed order.
template <typename T, typename S>
S Dot(const T* a, const T* b, int64_t width) {
  constexpr int64_t kParts = 8;
  S part[kParts] = {};
  int64_t d = 0;
  for (; d + kParts <= width; d += kParts) {
    for (int64_t i = 0; i < kParts; ++i) {
      part[i] += static_cast<S>(a[d + i]) * static_cast<S>(b[d + i]);
    }
  }
  for (int64_t i = 0; d + i < width; ++i) {
    part[i] += static_cast<S>(a[d + i]) * static_cast<S>(b[d + i]);
  }
  S sum{0};
  for (const S value : part) sum += value;
  return sum;
}

// One (row, head) pair after the other; pair p has logits 3 p .. 3 p + 2 and columns p D ..
struct Shape {
  int64_t pairs = 0;
  int64_t dim = 0;
};

Shape CheckShape(const at::Tensor& logits, const at::Tensor& out) {
  HEDDLE_CHECK(logits.device().is_cpu() && logits.dim() == 2 && out.dim() == 2);
  HEDDLE_CHECK(logits.size(0) == out.size(0) && logits.size(1) % kNsaBranches == 0);
  HEDDLE_CHECK(logits.scalar_type() == out.scalar_type());
  HEDDLE_CHECK(logits.is_contiguous() && out.is_contiguous());
  const int64_t heads = logits.size(1) / kNsaBranches;
  HEDDLE_CHECK(out.size(1) % heads == 0);
  return {logits.size(0) * heads, out.size(1) / heads};
}

template <typename T>
std::array<const T*, kNsaBranches> Pointers(const BranchOutputs& branches, const Shape& shape) {
  std::array<const T*, kNsaBranches> out{};
  for (size_t b = 0; b < branches.size(); ++b) {
    HEDDLE_CHECK(branches[b].is_contiguous() && branches[b].numel() == shape.pairs * shape.dim);
    out[b] = branches[b].const_data_ptr<T>();
  }
  return out;
}

template <typename T, typename S>
void Combine(const at::Tensor& logits, const BranchOutputs& branches, const at::Tensor& out) {
  const Shape shape = CheckShape(logits, out);
  const auto branch = Pointers<T>(branches, shape);
  const T* gate_logits = logits.const_data_ptr<T>();
  T* to = out.data_ptr<T>();
  at::parallel_for(0, shape.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const T* logit = gate_logits + pair * kNsaBranches;
      const S g0 = Sigmoid(static_cast<S>(logit[0]));
      const S g1 = Sigmoid(static_cast<S>(logit[1]));
      const S g2 = Sigmoid(static_cast<S>(logit[2]));
      for (int64_t i = pair * shape.dim; i < (pair + 1) * shape.dim; ++i) {
        to[i] =
            static_cast<T>(g0 * static_cast<S>(branch[0][i]) + g1 * static_cast<S>(branch[1][i]) +
                           g2 * static_cast<S>(branch[2][i]));
      }
    }
  });
}

template <typename T, typename S>
void LogitGradients(const at::Tensor& logits, const BranchOutputs& branches, const at::Tensor& dout,
                    const at::Tensor& dlogits) {
  const Shape shape = CheckShape(logits, dout);
  const auto branch = Pointers<T>(branches, shape);
  const T* gate_logits = logits.const_data_ptr<T>();
  const T* gradient = dout.const_data_ptr<T>();
  T* to = dlogits.data_ptr<T>();
  at::parallel_for(0, shape.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kNsaBranches; i < end * kNsaBranches; ++i) {
      const int64_t first = i / kNsaBranches * shape.dim;
      const T* o = branch[static_cast<size_t>(i % kNsaBranches)] + first;
      const S dot = Dot<T, S>(gradient + first, o, shape.dim);
      const S gate = Sigmoid(static_cast<S>(gate_logits[i]));
      to[i] = static_cast<T>(dot * gate * (S{1} - gate));
    }
  });
}

template <typename T, typename S>
void ScaleByGate(const at::Tensor& logits, int64_t branch, const at::Tensor& dout,
                 const at::Tensor& dbranch) {
  const Shape shape = CheckShape(logits, dout);
  const T* gate_logits = logits.const_data_ptr<T>();
  const T* gradient = dout.const_data_ptr<T>();
  T* to = dbranch.data_ptr<T>();
  at::parallel_for(0, shape.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const S gate = Sigmoid(static_cast<S>(gate_logits[pair * kNsaBranches + branch]));
      for (int64_t i = pair * shape.dim; i < (pair + 1) * shape.dim; ++i) {
        to[i] = static_cast<T>(gate * static_cast<S>(gradient[i]));
      }
    }
  });
}

}  // namespace

void CombineBranches(const at::Tensor& logits, const BranchOutputs& branches,
                     const at::Tensor& out) {
  switch (logits.scalar_type()) {
    case at::kDouble:
      return Combine<double, double>(logits, branches, out);
    case at::kFloat:
      return Combine<float, float>(logits, branches, out);
    default:
      return Combine<at::BFloat16, float>(logits, branches, out);
  }
}

void GateGradients(const at::Tensor& logits, const BranchOutputs& branches, const at::Tensor& dout,
                   const at::Tensor& dlogits) {
  HEDDLE_CHECK(dlogits.is_contiguous() && dlogits.sizes() == logits.sizes());
  switch (logits.scalar_type()) {
    case at::kDouble:
      return LogitGradients<double, double>(logits, branches, dout, dlogits);
    case at::kFloat:
      return LogitGradients<float, float>(logits, branches, dout, dlogits);
    default:
      return LogitGradients<at::BFloat16, float>(logits, branches, dout, dlogits);
  }
}

void BranchGradient(const at::Tensor& logits, int64_t branch, const at::Tensor& dout,
                    const at::Tensor& dbranch) {
  HEDDLE_CHECK(dbranch.is_contiguous() && dbranch.numel() == dout.numel());
  HEDDLE_CHECK(dbranch.scalar_type() == dout.scalar_type());
  switch (logits.scalar_type()) {
    case at::kDouble:
      return ScaleByGate<double, double>(logits, branch, dout, dbranch);
    case at::kFloat:
      return ScaleByGate<float, float>(logits, branch, dout, dbranch);
    default:
      return ScaleByGate<at::BFloat16, float>(logits, branch, dout, dbranch);
  }
}

}  // namespace heddle::attention
