// The pointwise operations in double, one plain loop each: the oracle of the other tables and the
// arithmetic of the fp64 model that the gradient checks run.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "kernels/pointwise/tables.h"

namespace heddle::kernels::pointwise {
namespace {

const double* In(const void* pointer, int64_t offset = 0) {
  return static_cast<const double*>(pointer) + offset;
}
double* Out(void* pointer, int64_t offset = 0) { return static_cast<double*>(pointer) + offset; }

void RmsNormForwardRef(const RmsNormForward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const double* x = In(p.x, row * p.width);
    double squares = 0;
    for (int64_t i = 0; i < p.width; ++i) squares += x[i] * x[i];
    const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(p.width) + p.eps);
    *Out(p.rstd, row) = rstd;
    for (int64_t i = 0; i < p.width; ++i) {
      *Out(p.y, row * p.width + i) = x[i] * rstd * *In(p.gain, i);
    }
  }
}

void RmsNormBackwardRef(const RmsNormBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * p.width;
    const double rstd = *In(p.rstd, row);
    double dot = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      dot += *In(p.dy, base + i) * *In(p.gain, i) * *In(p.x, base + i) * rstd;
    }
    const double mean = dot / static_cast<double>(p.width);
    for (int64_t i = 0; i < p.width; ++i) {
      const double xhat = *In(p.x, base + i) * rstd;
      const double dy = *In(p.dy, base + i);
      const double residual = p.residual == nullptr ? 0.0 : *In(p.residual, base + i);
      *Out(p.dgain, i) += dy * xhat;
      *Out(p.dx, base + i) = residual + rstd * (dy * *In(p.gain, i) - xhat * mean);
    }
  }
}

double MeanRef(const double* x, int64_t width) {
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += x[i];
  return sum / static_cast<double>(width);
}

void LayerNormForwardRef(const LayerNormForward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const double* x = In(p.x, row * p.width);
    const double mean = MeanRef(x, p.width);
    double squares = 0;
    for (int64_t i = 0; i < p.width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(p.width) + p.eps);
    *Out(p.rstd, row) = rstd;
    for (int64_t i = 0; i < p.width; ++i) {
      *Out(p.y, row * p.width + i) = (x[i] - mean) * rstd * *In(p.gain, i) + *In(p.bias, i);
    }
  }
}

void LayerNormBackwardRef(const LayerNormBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * p.width;
    const double rstd = *In(p.rstd, row);
    const double center = MeanRef(In(p.x, base), p.width);
    double sum = 0;
    double dot = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      const double a = *In(p.dy, base + i) * *In(p.gain, i);
      sum += a;
      dot += a * (*In(p.x, base + i) - center) * rstd;
    }
    const double mean = sum / static_cast<double>(p.width);
    const double slope = dot / static_cast<double>(p.width);
    for (int64_t i = 0; i < p.width; ++i) {
      const double xhat = (*In(p.x, base + i) - center) * rstd;
      const double dy = *In(p.dy, base + i);
      const double residual = p.residual == nullptr ? 0.0 : *In(p.residual, base + i);
      *Out(p.dgain, i) += dy * xhat;
      *Out(p.dbias, i) += dy;
      *Out(p.dx, base + i) = residual + rstd * (dy * *In(p.gain, i) - mean - xhat * slope);
    }
  }
}

void DytForwardRef(const DytForward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < p.width; ++i) {
      const double t = std::tanh(*In(p.alpha) * *In(p.x, row * p.width + i));
      *Out(p.y, row * p.width + i) = *In(p.gain, i) * t + *In(p.bias, i);
    }
  }
}

void DytBackwardRef(const DytBackward& p, RowRange rows) {
  const double alpha = *In(p.alpha);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < p.width; ++i) {
      const int64_t at = row * p.width + i;
      const double x = *In(p.x, at);
      const double dy = *In(p.dy, at);
      const double t = std::tanh(alpha * x);
      const double inner = dy * *In(p.gain, i) * (1.0 - t * t);
      const double residual = p.residual == nullptr ? 0.0 : *In(p.residual, at);
      *Out(p.dgain, i) += dy * t;
      *Out(p.dbias, i) += dy;
      *Out(p.dalpha) += inner * x;
      *Out(p.dx, at) = residual + inner * alpha;
    }
  }
}

void RopeRef(const Rope& p, RowRange rows) {
  const int64_t half = p.head_dim / 2;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const double* from = In(p.from, row * p.from_row + head * p.from_head);
      double* to = Out(p.to, row * p.to_row + head * p.to_head);
      for (int64_t i = 0; i < half; ++i) {
        const int64_t first = p.interleaved ? 2 * i : i;
        const int64_t second = p.interleaved ? 2 * i + 1 : i + half;
        const double c = *In(p.cosine, p.positions[row] * half + i);
        const double s = *In(p.sine, p.positions[row] * half + i) * (p.inverse ? -1.0 : 1.0);
        const double a = from[first];
        const double b = from[second];
        to[first] = a * c - b * s;
        to[second] = b * c + a * s;
      }
    }
  }
}

double SigmoidRef(double x) { return 1.0 / (1.0 + std::exp(-x)); }

void SwigluForwardRef(const SwigluForward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < p.width; ++i) {
      const double gate = *In(p.gate_up, row * 2 * p.width + i);
      const double up = *In(p.gate_up, row * 2 * p.width + p.width + i);
      *Out(p.out, row * p.width + i) = gate * SigmoidRef(gate) * up;
    }
  }
}

void SwigluBackwardRef(const SwigluBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const double weight = p.row_weight == nullptr ? 1.0 : *In(p.row_weight, row);
    double dot = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      double* gate = Out(p.gate_up, row * 2 * p.width + i);
      double* up = Out(p.gate_up, row * 2 * p.width + p.width + i);
      double* out = Out(p.out_gradient, row * p.width + i);
      const double sigmoid = SigmoidRef(*gate);
      const double silu = *gate * sigmoid;
      dot += *out * silu * *up;
      const double d = weight * *out;
      *out = weight * silu * *up;
      *gate = d * *up * (sigmoid + silu * (1.0 - sigmoid));
      *up = d * silu;
    }
    if (p.row_weight != nullptr) *Out(p.row_dot, row) = dot;
  }
}

struct ValueAndSlope {
  double value;
  double slope;
};
ValueAndSlope SiluRef(double x) {
  const double sigmoid = SigmoidRef(x);
  return {x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid)};
}
ValueAndSlope GeluRef(double x) {
  const double cumulative = 0.5 * std::erfc(-x / std::numbers::sqrt2);
  const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi);
  return {x * cumulative, cumulative + x * density};
}

template <ValueAndSlope (*kFunction)(double)>
void ActivationForwardRef(const ActivationForward& p, RowRange rows) {
  for (int64_t i = rows.begin * p.width; i < rows.end * p.width; ++i) {
    *Out(p.out, i) = kFunction(*In(p.x, i)).value;
  }
}

template <ValueAndSlope (*kFunction)(double)>
void ActivationBackwardRef(const ActivationBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const double weight = p.row_weight == nullptr ? 1.0 : *In(p.row_weight, row);
    double dot = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      double* x = Out(p.x, row * p.width + i);
      double* out = Out(p.out_gradient, row * p.width + i);
      const ValueAndSlope f = kFunction(*x);
      dot += *out * f.value;
      *x = weight * *out * f.slope;
      *out = weight * f.value;
    }
    if (p.row_weight != nullptr) *Out(p.row_dot, row) = dot;
  }
}

void RouterLogitsRef(const RouterLogits& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t e = 0; e < p.experts; ++e) {
      double sum = 0;
      for (int64_t i = 0; i < p.width; ++i) {
        sum += *In(p.x, row * p.width + i) * *In(p.weight, e * p.width + i);
      }
      *Out(p.logits, row * p.experts + e) = sum;
    }
  }
}

void RouterWeightGradientRef(const RouterWeightGradient& p, RowRange columns) {
  for (int64_t e = 0; e < p.experts; ++e) {
    for (int64_t i = columns.begin; i < columns.end; ++i) {
      double sum = 0;
      for (int64_t row = 0; row < p.rows; ++row) {
        sum += *In(p.dlogits, row * p.experts + e) * *In(p.x, row * p.width + i);
      }
      *Out(p.dweight, e * p.width + i) += sum;
    }
  }
}

void CombineRowsRef(const CombineRows& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < p.width; ++i) {
      const int64_t at = row * p.width + i;
      double sum = p.residual == nullptr ? 0.0 : *In(p.residual, at);
      if (p.shared != nullptr) sum += *In(p.shared, at);
      for (int64_t j = row * p.per_row; j < (row + 1) * p.per_row; ++j) {
        if (p.slots[j] < 0) continue;
        const double weight = p.weights == nullptr ? 1.0 : *In(p.weights, j);
        sum += weight * *In(p.parts, p.slots[j] * p.width + i);
      }
      for (int64_t e = 0; e < p.experts; ++e) {
        sum += *In(p.dlogits, row * p.experts + e) * *In(p.router, e * p.width + i);
      }
      *Out(p.out, at) = sum;
    }
  }
}

void CrossEntropyRef(const CrossEntropy& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    double* x = Out(p.logits, row * p.vocabulary);
    const int32_t label = p.labels[row];
    p.loss[row] = 0.0;
    if (label < 0) {
      if (p.gradient) std::fill_n(x, p.vocabulary, 0.0);
      continue;
    }
    const double maximum = *std::max_element(x, x + p.vocabulary);
    double sum = 0;
    for (int64_t i = 0; i < p.vocabulary; ++i) sum += std::exp(x[i] - maximum);
    p.loss[row] = std::log(sum) + maximum - x[label];
    if (!p.gradient) continue;
    for (int64_t i = 0; i < p.vocabulary; ++i) {
      const double probability = std::exp(x[i] - maximum) / sum;
      x[i] = (probability - (i == label ? 1.0 : 0.0)) * p.scale;
    }
  }
}

void EmbeddingBackwardRef(const EmbeddingBackward& p, RowRange columns) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = columns.begin; i < columns.end; ++i) {
      *Out(p.table_gradient, int64_t{p.ids[row]} * p.width + i) +=
          *In(p.gradient, row * p.width + i);
    }
  }
}

void AccumulateRef(const Accumulate& p, RowRange elements) {
  for (int64_t i = elements.begin; i < elements.end; ++i) *Out(p.to, i) += *In(p.from, i);
}

void ConvertRef(const Convert& p, RowRange elements) {
  for (int64_t i = elements.begin; i < elements.end; ++i) *Out(p.to, i) = *In(p.from, i);
}

}  // namespace

const Table kReferenceFloat64 = {RmsNormForwardRef,
                                 RmsNormBackwardRef,
                                 LayerNormForwardRef,
                                 LayerNormBackwardRef,
                                 DytForwardRef,
                                 DytBackwardRef,
                                 RopeRef,
                                 SwigluForwardRef,
                                 SwigluBackwardRef,
                                 ActivationForwardRef<GeluRef>,
                                 ActivationBackwardRef<GeluRef>,
                                 ActivationForwardRef<SiluRef>,
                                 ActivationBackwardRef<SiluRef>,
                                 RouterLogitsRef,
                                 RouterWeightGradientRef,
                                 CombineRowsRef,
                                 CrossEntropyRef,
                                 EmbeddingBackwardRef,
                                 AccumulateRef,
                                 ConvertRef};

}  // namespace heddle::kernels::pointwise
