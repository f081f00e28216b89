#include "model/attention/gates.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/status/status.h"
#include "model/layers/layers.h"
#include "model/layers/products.h"

namespace heddle::attention {
namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kColumnsPerTask = 64;
constexpr int64_t kElementsPerTask = 4096;

template <typename T>
struct StatisticsOf {
  using type = float;
};
template <>
struct StatisticsOf<double> {
  using type = double;
};

// Calls body with a null pointer of the tensor's element type.
template <typename Body>
void WithElement(const at::Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      body(static_cast<c10::BFloat16*>(nullptr));
      break;
    case at::kDouble:
      body(static_cast<double*>(nullptr));
      break;
    default:
      HEDDLE_CHECK(t.scalar_type() == at::kFloat, "compute type must be bf16, fp32 or fp64");
      body(static_cast<float*>(nullptr));
  }
}

template <typename S>
struct Factor {
  S value;
  S slope;
};

template <typename S>
Factor<S> FactorOf(GateActivation activation, S z) {
  switch (activation) {
    case GateActivation::kTanh: {
      const S t = std::tanh(z);
      return {(t + 1) / 2, (1 - t * t) / 2};
    }
    case GateActivation::kSilu: {
      const S s = 1 / (1 + std::exp(-z));
      return {z * s, s * (1 + z * (1 - s))};
    }
    default: {
      const S s = 1 / (1 + std::exp(-z));
      return {s, s * (1 - s)};
    }
  }
}

struct Shape {
  int64_t heads;
  int64_t width;
  bool elementwise;
};

Shape CheckShapes(const at::Tensor& z, const at::Tensor& x) {
  HEDDLE_CHECK(z.dim() == 2 && z.is_contiguous() && x.dim() == 3);
  HEDDLE_CHECK(x.stride(2) == 1 && x.stride(1) == x.size(2), "heads of a row are contiguous");
  HEDDLE_CHECK(z.size(0) == x.size(0) && z.scalar_type() == x.scalar_type());
  const Shape shape{x.size(1), x.size(2), z.size(1) != x.size(1) || x.size(2) == 1};
  HEDDLE_CHECK(z.size(1) == (shape.elementwise ? shape.heads * shape.width : shape.heads),
               "gate of ", z.size(1), " columns");
  return shape;
}

// One row: y = x act(z).
template <typename T>
void GateRow(const Shape& shape, GateActivation activation, const T* z, const T* x, T* y) {
  using S = typename StatisticsOf<T>::type;
  for (int64_t h = 0; h < shape.heads; ++h) {
    S factor = shape.elementwise ? S{0} : FactorOf<S>(activation, static_cast<S>(z[h])).value;
    for (int64_t i = h * shape.width; i < (h + 1) * shape.width; ++i) {
      if (shape.elementwise) factor = FactorOf<S>(activation, static_cast<S>(z[i])).value;
      y[i] = static_cast<T>(static_cast<S>(x[i]) * factor);
    }
  }
}

// One row: dx = dy act(z), z = dL/dz.
template <typename T>
void GateRowBackward(const Shape& shape, GateActivation activation, T* z, const T* x, const T* dy,
                     T* dx) {
  using S = typename StatisticsOf<T>::type;
  for (int64_t h = 0; h < shape.heads; ++h) {
    Factor<S> factor{};
    if (!shape.elementwise) factor = FactorOf<S>(activation, static_cast<S>(z[h]));
    S sum = 0;
    for (int64_t i = h * shape.width; i < (h + 1) * shape.width; ++i) {
      if (shape.elementwise) factor = FactorOf<S>(activation, static_cast<S>(z[i]));
      const S d = static_cast<S>(dy[i]);
      const S dz = d * static_cast<S>(x[i]) * factor.slope;
      dx[i] = static_cast<T>(d * factor.value);
      if (shape.elementwise) {
        z[i] = static_cast<T>(dz);
      } else {
        sum += dz;
      }
    }
    if (!shape.elementwise) z[h] = static_cast<T>(sum);
  }
}

}  // namespace

Gate::Gate(const layers::LayerStorage& storage, const std::string& name, GateActivation activation)
    : activation_(activation),
      weight_(storage.Weight(name + ".weight")),
      weight_gradient_(storage.Gradient(name + ".weight")),
      bias_(storage.Weight(name + ".bias")),
      bias_gradient_(storage.Gradient(name + ".bias")) {}

void Gate::Logits(const at::Tensor& h, const at::Tensor& z) const {
  layers::ProductAdd(bias_, h, weight_.t(), z);
}

void Gate::Apply(const at::Tensor& z, const at::Tensor& x, const at::Tensor& y) const {
  const Shape shape = CheckShapes(z, x);
  CheckShapes(z, y);
  WithElement(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    at::parallel_for(0, x.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        GateRow<T>(shape, activation_, z.const_data_ptr<T>() + n * z.size(1),
                   x.const_data_ptr<T>() + n * x.stride(0), y.data_ptr<T>() + n * y.stride(0));
      }
    });
  });
}

void Gate::ApplyBackward(const at::Tensor& z, const at::Tensor& x, const at::Tensor& dy,
                         const at::Tensor& dx) const {
  const Shape shape = CheckShapes(z, x);
  CheckShapes(z, dy);
  CheckShapes(z, dx);
  WithElement(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    at::parallel_for(0, x.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        GateRowBackward<T>(shape, activation_, z.data_ptr<T>() + n * z.size(1),
                           x.const_data_ptr<T>() + n * x.stride(0),
                           dy.const_data_ptr<T>() + n * dy.stride(0),
                           dx.data_ptr<T>() + n * dx.stride(0));
      }
    });
  });
}

void Gate::LogitsBackward(const at::Tensor& h, const at::Tensor& dz, const at::Tensor& dh) const {
  layers::LinearWeightGradient(dz, h, weight_gradient_);
  AddColumnSums(dz, bias_gradient_);
  layers::ProductAdd(dh, dz, weight_, dh);
}

void Sigmoid(const at::Tensor& t) {
  HEDDLE_CHECK(t.is_contiguous());
  WithElement(t, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = typename StatisticsOf<T>::type;
    T* values = t.data_ptr<T>();
    at::parallel_for(0, t.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        values[i] = static_cast<T>(1 / (1 + std::exp(-static_cast<S>(values[i]))));
      }
    });
  });
}

void SigmoidBackward(const at::Tensor& y, const at::Tensor& dy) {
  HEDDLE_CHECK(y.is_contiguous() && dy.is_contiguous() && y.numel() == dy.numel());
  HEDDLE_CHECK(y.scalar_type() == dy.scalar_type());
  WithElement(y, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* value = y.const_data_ptr<T>();
    T* gradient = dy.data_ptr<T>();
    at::parallel_for(0, y.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gradient[i] *= value[i] * (1 - value[i]);
    });
  });
}

void AddColumnSums(const at::Tensor& rows, const at::Tensor& sums) {
  HEDDLE_CHECK(rows.dim() == 2 && rows.is_contiguous() && sums.is_contiguous());
  HEDDLE_CHECK(sums.numel() == rows.size(1));
  HEDDLE_CHECK(sums.scalar_type() == layers::StatisticsType(rows.scalar_type()));
  const int64_t columns = rows.size(1);
  WithElement(rows, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = typename StatisticsOf<T>::type;
    const T* from = rows.const_data_ptr<T>();
    S* to = sums.data_ptr<S>();
    at::parallel_for(0, columns, kColumnsPerTask, [&](int64_t begin, int64_t end) {
      std::vector<S> sum(static_cast<size_t>(end - begin), S{0});
      for (int64_t n = 0; n < rows.size(0); ++n) {
        for (int64_t c = begin; c < end; ++c) {
          sum[static_cast<size_t>(c - begin)] += static_cast<S>(from[n * columns + c]);
        }
      }
      for (int64_t c = begin; c < end; ++c) to[c] += sum[static_cast<size_t>(c - begin)];
    });
  });
}

}  // namespace heddle::attention
