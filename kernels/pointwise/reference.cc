// The pointwise operations in double, one plain loop each: the oracle of the other tables and the
// arithmetic of the fp64 model that the gradient checks run.
#include <algorithm>
#include <cmath>
#include <limits>

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

void LayerNormForwardRef(const LayerNormForward& p, RowRange rows) {
  const double width = static_cast<double>(p.width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const double* x = In(p.x, row * p.width);
    double mean = 0;
    for (int64_t i = 0; i < p.width; ++i) mean += x[i] / width;
    double variance = 0;
    for (int64_t i = 0; i < p.width; ++i) variance += (x[i] - mean) * (x[i] - mean) / width;
    const double rstd = 1.0 / std::sqrt(variance + p.eps);
    *Out(p.mean, row) = mean;
    *Out(p.rstd, row) = rstd;
    for (int64_t i = 0; i < p.width; ++i) {
      *Out(p.y, row * p.width + i) = (x[i] - mean) * rstd * *In(p.gain, i) + *In(p.bias, i);
    }
  }
}

void LayerNormBackwardRef(const LayerNormBackward& p, RowRange rows) {
  const double width = static_cast<double>(p.width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * p.width;
    const double mean = *In(p.mean, row);
    const double rstd = *In(p.rstd, row);
    double a = 0;  // means over the row of gain dy, and of gain dy xhat
    double b = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      const double g = *In(p.dy, base + i) * *In(p.gain, i);
      a += g / width;
      b += g * (*In(p.x, base + i) - mean) * rstd / width;
    }
    for (int64_t i = 0; i < p.width; ++i) {
      const double xhat = (*In(p.x, base + i) - mean) * rstd;
      const double dy = *In(p.dy, base + i);
      const double residual = p.residual == nullptr ? 0.0 : *In(p.residual, base + i);
      *Out(p.dgain, i) += dy * xhat;
      *Out(p.dbias, i) += dy;
      *Out(p.dx, base + i) = residual + rstd * (dy * *In(p.gain, i) - a - xhat * b);
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
    for (int64_t i = 0; i < p.width; ++i) {
      double* gate = Out(p.gate_up, row * 2 * p.width + i);
      double* up = Out(p.gate_up, row * 2 * p.width + p.width + i);
      double* out = Out(p.out_gradient, row * p.width + i);
      const double sigmoid = SigmoidRef(*gate);
      const double silu = *gate * sigmoid;
      const double d = *out;
      *out = silu * *up;
      *gate = d * *up * (sigmoid + silu * (1.0 - sigmoid));
      *up = d * silu;
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

const Table kReferenceFloat64 = {RmsNormForwardRef,    RmsNormBackwardRef,  RopeRef,
                                 SwigluForwardRef,     SwigluBackwardRef,   CrossEntropyRef,
                                 EmbeddingBackwardRef, AccumulateRef,       ConvertRef,
                                 LayerNormForwardRef,  LayerNormBackwardRef};

}  // namespace heddle::kernels::pointwise
