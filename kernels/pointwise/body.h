// Bodies of the pointwise kernels for f32 and bf16, compiled once per instruction set. The row is
// walked in vectors of 16 lanes, sums are 16 partial sums reduced in a fixed order; arithmetic is
// fp32. Memory map: everything streams once, except rows that are read twice from L1/L2.
// Included by generic.cc, avx2.cc and avx512.cc only.
#pragma once

#include <cmath>

#include "kernels/common/simd.h"
#include "kernels/pointwise/params.h"

namespace heddle::kernels::pointwise {
namespace {  // NOLINT: ISA file (architecture.md T12)

// Calls body(offset, load, store) for each vector of a row, tail included, where load(p) and
// store(value, p) touch only the lanes that exist.
template <typename Body>
inline void ForVectors(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}
template <typename T>
inline F16 LoadN(const T* from, int64_t lanes) {
  return lanes == kLanes ? Load(from) : LoadPart(from, lanes);
}
template <typename T>
inline void StoreN(F16 value, T* to, int64_t lanes) {
  if (lanes == kLanes) {
    Store(value, to);
  } else {
    StorePart(value, to, lanes);
  }
}

template <typename T>
void RmsNormForwardT(const RmsNormForward& p, RowRange rows) {
  const T* gain = static_cast<const T*>(p.gain);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    T* y = static_cast<T*>(p.y) + row * p.width;
    F16 squares{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 v = LoadN(x + i, n);
      squares += v * v;
    });
    const float mean = Sum(squares) / static_cast<float>(p.width);
    const float rstd = 1.0f / std::sqrt(mean + static_cast<float>(p.eps));
    static_cast<float*>(p.rstd)[row] = rstd;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      StoreN(LoadN(x + i, n) * rstd * LoadN(gain + i, n), y + i, n);
    });
  }
}

template <typename T>
void RmsNormBackwardT(const RmsNormBackward& p, RowRange rows) {
  const T* gain = static_cast<const T*>(p.gain);
  float* dgain = static_cast<float*>(p.dgain);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    const T* dy = static_cast<const T*>(p.dy) + row * p.width;
    const T* residual =
        p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.width;
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    const float rstd = static_cast<const float*>(p.rstd)[row];
    F16 dots{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      dots += LoadN(dy + i, n) * LoadN(gain + i, n) * LoadN(x + i, n);
    });
    // mean over the row of (gain dy) xhat, times rstd once more for xhat in the second pass.
    const float c = Sum(dots) * rstd * rstd / static_cast<float>(p.width);
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 v = LoadN(x + i, n);
      const F16 g = LoadN(dy + i, n);
      F16 out = rstd * (g * LoadN(gain + i, n) - v * c);
      if (residual != nullptr) out += LoadN(residual + i, n);
      StoreN(LoadN(dgain + i, n) + g * v * rstd, dgain + i, n);
      StoreN(out, dx + i, n);
    });
  }
}

// The first n lanes, 0 in the others.
inline F16 KeepLanes(F16 v, int64_t n) {
  for (int64_t j = n; j < kLanes; ++j) v[j] = 0.0f;
  return v;
}

template <typename T>
inline float RowMean(const T* x, int64_t width) {
  F16 sums{};
  ForVectors(width, [&](int64_t i, int64_t n) { sums += LoadN(x + i, n); });
  return Sum(sums) / static_cast<float>(width);
}

template <typename T>
void LayerNormForwardT(const LayerNormForward& p, RowRange rows) {
  const T* gain = static_cast<const T*>(p.gain);
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    T* y = static_cast<T*>(p.y) + row * p.width;
    const float mean = RowMean(x, p.width);
    F16 squares{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 v = LoadN(x + i, n) - mean;
      squares += n == kLanes ? v * v : KeepLanes(v * v, n);
    });
    const float variance = Sum(squares) / static_cast<float>(p.width);
    const float rstd = 1.0f / std::sqrt(variance + static_cast<float>(p.eps));
    static_cast<float*>(p.rstd)[row] = rstd;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      StoreN((LoadN(x + i, n) - mean) * rstd * LoadN(gain + i, n) + LoadN(bias + i, n), y + i, n);
    });
  }
}

template <typename T>
void LayerNormBackwardT(const LayerNormBackward& p, RowRange rows) {
  const T* gain = static_cast<const T*>(p.gain);
  float* dgain = static_cast<float*>(p.dgain);
  float* dbias = static_cast<float*>(p.dbias);
  const float inverse_width = 1.0f / static_cast<float>(p.width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    const T* dy = static_cast<const T*>(p.dy) + row * p.width;
    const T* residual =
        p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.width;
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    const float rstd = static_cast<const float*>(p.rstd)[row];
    const float center = RowMean(x, p.width);
    F16 sums{};
    F16 dots{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      // gain is 0 beyond the row, so the tail adds nothing.
      const F16 a = LoadN(dy + i, n) * LoadN(gain + i, n);
      sums += a;
      dots += a * (LoadN(x + i, n) - center);
    });
    const float mean = Sum(sums) * inverse_width;
    const float slope = Sum(dots) * rstd * inverse_width;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 xhat = (LoadN(x + i, n) - center) * rstd;
      const F16 g = LoadN(dy + i, n);
      F16 out = rstd * (g * LoadN(gain + i, n) - mean - xhat * slope);
      if (residual != nullptr) out += LoadN(residual + i, n);
      StoreN(LoadN(dgain + i, n) + g * xhat, dgain + i, n);
      StoreN(LoadN(dbias + i, n) + g, dbias + i, n);
      StoreN(out, dx + i, n);
    });
  }
}

// Relative error below 4 ulp everywhere: a polynomial in x^2 near 0, the exponential elsewhere.
inline F16 Tanh(F16 x) {
  const F16 magnitude = x < 0.0f ? -x : x;
  const F16 z = x * x;
  F16 p = Splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const F16 near = x + x * z * p;
  const F16 far = 1.0f - 2.0f / (Exp(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

template <typename T>
void DytForwardT(const DytForward& p, RowRange rows) {
  const float alpha = LoadN(static_cast<const T*>(p.alpha), 1)[0];
  const T* gain = static_cast<const T*>(p.gain);
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    T* y = static_cast<T*>(p.y) + row * p.width;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      StoreN(Tanh(LoadN(x + i, n) * alpha) * LoadN(gain + i, n) + LoadN(bias + i, n), y + i, n);
    });
  }
}

template <typename T>
void DytBackwardT(const DytBackward& p, RowRange rows) {
  const float alpha = LoadN(static_cast<const T*>(p.alpha), 1)[0];
  const T* gain = static_cast<const T*>(p.gain);
  float* dalpha = static_cast<float*>(p.dalpha);
  float* dgain = static_cast<float*>(p.dgain);
  float* dbias = static_cast<float*>(p.dbias);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    const T* dy = static_cast<const T*>(p.dy) + row * p.width;
    const T* residual =
        p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.width;
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    F16 alphas{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 v = LoadN(x + i, n);
      const F16 g = LoadN(dy + i, n);
      const F16 t = Tanh(v * alpha);
      const F16 inner = g * LoadN(gain + i, n) * (1.0f - t * t);
      F16 out = inner * alpha;
      if (residual != nullptr) out += LoadN(residual + i, n);
      alphas += inner * v;
      StoreN(LoadN(dgain + i, n) + g * t, dgain + i, n);
      StoreN(LoadN(dbias + i, n) + g, dbias + i, n);
      StoreN(out, dx + i, n);
    });
    *dalpha += Sum(alphas);
  }
}

template <typename T>
void RopeHalfHead(const Rope& p, const T* from, T* to, const float* cosine, const float* sine) {
  const int64_t half = p.head_dim / 2;
  const float sign = p.inverse ? -1.0f : 1.0f;
  ForVectors(half, [&](int64_t i, int64_t n) {
    const F16 a = LoadN(from + i, n);
    const F16 b = LoadN(from + half + i, n);
    const F16 c = LoadN(cosine + i, n);
    const F16 s = LoadN(sine + i, n) * sign;
    StoreN(a * c - b * s, to + i, n);
    StoreN(b * c + a * s, to + half + i, n);
  });
}

template <typename T>
void RopeInterleavedHead(const Rope& p, const T* from, T* to, const float* cosine,
                         const float* sine) {
  const float sign = p.inverse ? -1.0f : 1.0f;
  // Eight pairs a vector: even lanes hold the first of a pair, odd lanes the second.
  ForVectors(p.head_dim, [&](int64_t i, int64_t n) {
    const F16 v = LoadN(from + i, n);
    float c[kLanes] = {};
    float s[kLanes] = {};
    for (int64_t j = 0; j < n; ++j) {
      c[j] = cosine[(i + j) / 2];
      s[j] = (j % 2 == 0 ? -sign : sign) * sine[(i + j) / 2];
    }
    const I16 swap = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    const F16 swapped = __builtin_shuffle(v, swap);
    StoreN(v * Load(c) + swapped * Load(s), to + i, n);
  });
}

template <typename T>
void RopeT(const Rope& p, RowRange rows) {
  const int64_t half = p.head_dim / 2;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* cosine = static_cast<const float*>(p.cosine) + p.positions[row] * half;
    const float* sine = static_cast<const float*>(p.sine) + p.positions[row] * half;
    for (int64_t head = 0; head < p.heads; ++head) {
      const T* from = static_cast<const T*>(p.from) + row * p.from_row + head * p.from_head;
      T* to = static_cast<T*>(p.to) + row * p.to_row + head * p.to_head;
      if (p.interleaved) {
        RopeInterleavedHead(p, from, to, cosine, sine);
      } else {
        RopeHalfHead(p, from, to, cosine, sine);
      }
    }
  }
}

inline F16 Sigmoid(F16 x) { return 1.0f / (1.0f + Exp(-x)); }

template <typename T>
void SwigluForwardT(const SwigluForward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.width;
    const T* up = gate + p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 g = LoadN(gate + i, n);
      StoreN(g * Sigmoid(g) * LoadN(up + i, n), out + i, n);
    });
  }
}

// kWeighted at compile time: the plain form must not pay for the weights.
template <typename T, bool kWeighted>
void SwigluBackwardRows(const SwigluBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    T* gate = static_cast<T*>(p.gate_up) + row * 2 * p.width;
    T* up = gate + p.width;
    T* out = static_cast<T*>(p.out_gradient) + row * p.width;
    const float weight = kWeighted ? static_cast<const float*>(p.row_weight)[row] : 1.0f;
    F16 dots{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 g = LoadN(gate + i, n);
      const F16 u = LoadN(up + i, n);
      F16 d = LoadN(out + i, n);
      const F16 sigmoid = Sigmoid(g);
      const F16 silu = g * sigmoid;
      F16 value = silu * u;
      if constexpr (kWeighted) {
        dots += d * value;
        d *= weight;
        value *= weight;
      }
      StoreN(d * u * (sigmoid + silu * (1.0f - sigmoid)), gate + i, n);
      StoreN(d * silu, up + i, n);
      StoreN(value, out + i, n);
    });
    if constexpr (kWeighted) static_cast<float*>(p.row_dot)[row] = Sum(dots);
  }
}
template <typename T>
void SwigluBackwardT(const SwigluBackward& p, RowRange rows) {
  if (p.row_weight == nullptr) {
    SwigluBackwardRows<T, false>(p, rows);
  } else {
    SwigluBackwardRows<T, true>(p, rows);
  }
}

struct Silu {
  static F16 Value(F16 x) { return x * Sigmoid(x); }
  static void ValueAndSlope(F16 x, F16* value, F16* slope) {
    const F16 sigmoid = Sigmoid(x);
    *value = x * sigmoid;
    *slope = sigmoid + *value * (1.0f - sigmoid);
  }
};

// Phi(x) = erfc(-x / sqrt 2) / 2 by Chebyshev's fit of ln(erfc(z) exp(z^2) / t), t = 1 / (1 + z/2),
// for z >= 0 (Numerical Recipes 6.2): relative error 1.2e-7 of the fit, and in the lower tail
// x^2 6e-8 from the rounding of z^2.
inline F16 NormalCdf(F16 x) {
  const F16 z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const F16 t = 1.0f / (1.0f + 0.5f * z);
  F16 p = Splat(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const F16 tail = 0.5f * t * Exp(p - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

struct Gelu {
  static F16 Value(F16 x) { return x * NormalCdf(x); }
  static void ValueAndSlope(F16 x, F16* value, F16* slope) {
    const F16 cumulative = NormalCdf(x);
    *value = x * cumulative;
    *slope = cumulative + x * (0.39894228040143268f * Exp(-0.5f * x * x));
  }
};

template <typename T, typename Function>
void ActivationForwardT(const ActivationForward& p, RowRange rows) {
  const T* x = static_cast<const T*>(p.x) + rows.begin * p.width;
  T* out = static_cast<T*>(p.out) + rows.begin * p.width;
  for (int64_t row = rows.begin; row < rows.end; ++row, x += p.width, out += p.width) {
    ForVectors(p.width,
               [&](int64_t i, int64_t n) { StoreN(Function::Value(LoadN(x + i, n)), out + i, n); });
  }
}

template <typename T, typename Function>
void ActivationBackwardT(const ActivationBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    T* x = static_cast<T*>(p.x) + row * p.width;
    T* out = static_cast<T*>(p.out_gradient) + row * p.width;
    const float weight =
        p.row_weight == nullptr ? 1.0f : static_cast<const float*>(p.row_weight)[row];
    F16 dots{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 d = LoadN(out + i, n);
      F16 value, slope;
      Function::ValueAndSlope(LoadN(x + i, n), &value, &slope);
      dots += d * value;
      StoreN(d * weight * slope, x + i, n);
      StoreN(value * weight, out + i, n);
    });
    if (p.row_weight != nullptr) static_cast<float*>(p.row_dot)[row] = Sum(dots);
  }
}

// Logits of kRows rows and kExperts experts at once, so that each load serves several products. The
// order of additions of a pair does not depend on the block it falls into.
template <typename T, int kRows, int kExperts>
inline void RouterBlock(const RouterLogits& p, const T* x, const T* weight, float* logits) {
  F16 sums[kRows][kExperts] = {};
  ForVectors(p.width, [&](int64_t i, int64_t n) {
    F16 w[kExperts];
    for (int e = 0; e < kExperts; ++e) w[e] = LoadN(weight + e * p.width + i, n);
    for (int r = 0; r < kRows; ++r) {
      const F16 v = LoadN(x + r * p.width + i, n);
      for (int e = 0; e < kExperts; ++e) sums[r][e] += v * w[e];
    }
  });
  for (int r = 0; r < kRows; ++r) {
    for (int e = 0; e < kExperts; ++e) logits[r * p.experts + e] = Sum(sums[r][e]);
  }
}

template <typename T, int kExperts>
void RouterLogitsOf(const RouterLogits& p, RowRange rows, int64_t expert) {
  const T* weight = static_cast<const T*>(p.weight) + expert * p.width;
  const T* x = static_cast<const T*>(p.x);
  float* logits = static_cast<float*>(p.logits) + expert;
  int64_t row = rows.begin;
  for (; row + 4 <= rows.end; row += 4) {
    RouterBlock<T, 4, kExperts>(p, x + row * p.width, weight, logits + row * p.experts);
  }
  for (; row < rows.end; ++row) {
    RouterBlock<T, 1, kExperts>(p, x + row * p.width, weight, logits + row * p.experts);
  }
}

template <typename T>
void RouterLogitsT(const RouterLogits& p, RowRange rows) {
  int64_t expert = 0;
  for (; expert + 4 <= p.experts; expert += 4) RouterLogitsOf<T, 4>(p, rows, expert);
  for (; expert < p.experts; ++expert) RouterLogitsOf<T, 1>(p, rows, expert);
}

// Gradients of kExperts rows of the router's matrix in kVectors vectors of `lanes` columns; several
// vectors are whole ones. Sums stay in registers over all rows.
template <typename T, int kVectors, int kExperts>
inline void RouterGradientBlock(const RouterWeightGradient& p, int64_t column, int64_t lanes,
                                int64_t expert) {
  const T* x = static_cast<const T*>(p.x) + column;
  const float* dlogits = static_cast<const float*>(p.dlogits) + expert;
  F16 sums[kExperts][kVectors] = {};
  for (int64_t row = 0; row < p.rows; ++row, x += p.width, dlogits += p.experts) {
    F16 v[kVectors];
    for (int k = 0; k < kVectors; ++k) v[k] = LoadN(x + k * kLanes, lanes);
    for (int e = 0; e < kExperts; ++e) {
      for (int k = 0; k < kVectors; ++k) sums[e][k] += v[k] * dlogits[e];
    }
  }
  float* to = static_cast<float*>(p.dweight) + expert * p.width + column;
  for (int e = 0; e < kExperts; ++e, to += p.width) {
    for (int k = 0; k < kVectors; ++k) {
      StoreN(LoadN(to + k * kLanes, lanes) + sums[e][k], to + k * kLanes, lanes);
    }
  }
}

template <typename T, int kVectors>
inline void RouterGradientColumns(const RouterWeightGradient& p, int64_t column, int64_t lanes) {
  int64_t expert = 0;
  for (; expert + 4 <= p.experts; expert += 4) {
    RouterGradientBlock<T, kVectors, 4>(p, column, lanes, expert);
  }
  for (; expert < p.experts; ++expert) {
    RouterGradientBlock<T, kVectors, 1>(p, column, lanes, expert);
  }
}

template <typename T>
void RouterWeightGradientT(const RouterWeightGradient& p, RowRange columns) {
  int64_t i = columns.begin;
  for (; i + 4 * kLanes <= columns.end; i += 4 * kLanes) RouterGradientColumns<T, 4>(p, i, kLanes);
  for (; i < columns.end; i += kLanes) {
    RouterGradientColumns<T, 1>(p, i, columns.end - i < kLanes ? columns.end - i : kLanes);
  }
}

template <typename T>
void CombineRow(const CombineRows& p, int64_t row, RowRange columns) {
  const T* parts = static_cast<const T*>(p.parts);
  const T* router = static_cast<const T*>(p.router);
  const float* weights = static_cast<const float*>(p.weights);
  const float* dlogits = static_cast<const float*>(p.dlogits) + row * p.experts;
  ForVectors(columns.end - columns.begin, [&](int64_t offset, int64_t n) {
    const int64_t i = columns.begin + offset;
    const int64_t at = row * p.width + i;
    F16 sum{};
    if (p.residual != nullptr) sum += LoadN(static_cast<const T*>(p.residual) + at, n);
    if (p.shared != nullptr) sum += LoadN(static_cast<const T*>(p.shared) + at, n);
    for (int64_t j = row * p.per_row; j < (row + 1) * p.per_row; ++j) {
      if (p.slots[j] < 0) continue;
      const F16 part = LoadN(parts + p.slots[j] * p.width + i, n);
      sum += weights == nullptr ? part : part * weights[j];
    }
    for (int64_t e = 0; e < p.experts; ++e) sum += LoadN(router + e * p.width + i, n) * dlogits[e];
    StoreN(sum, static_cast<T*>(p.out) + at, n);
  });
}

template <typename T>
void CombineRowsT(const CombineRows& p, RowRange rows) {
  // Column blocks keep the router's weights in the cache from row to row.
  constexpr int64_t kColumns = 512;
  for (int64_t begin = 0; begin < p.width; begin += kColumns) {
    const int64_t end = begin + kColumns < p.width ? begin + kColumns : p.width;
    for (int64_t row = rows.begin; row < rows.end; ++row) CombineRow<T>(p, row, {begin, end});
  }
}

template <typename T>
void FillRow(T* row, int64_t width) {
  std::memset(row, 0, static_cast<size_t>(width) * sizeof(T));
}

template <typename T>
void CrossEntropyT(const CrossEntropy& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    T* x = static_cast<T*>(p.logits) + row * p.vocabulary;
    const int32_t label = p.labels[row];
    p.loss[row] = 0.0;
    if (label < 0) {
      if (p.gradient) FillRow(x, p.vocabulary);
      continue;
    }
    const F16 first = LoadN(x, p.vocabulary < kLanes ? p.vocabulary : kLanes);
    F16 best = Splat(first[0]);
    ForVectors(p.vocabulary, [&](int64_t i, int64_t n) {
      const F16 v = n == kLanes ? Load(x + i) : LoadPart(x + i, n, x[i]);
      best = v > best ? v : best;
    });
    const float maximum = Max(best);
    const float picked = LoadN(x + label, 1)[0];
    F16 sums{};
    ForVectors(p.vocabulary, [&](int64_t i, int64_t n) {
      F16 e = Exp(LoadN(x + i, n) - maximum);
      if (n != kLanes) {
        for (int64_t j = n; j < kLanes; ++j) e[j] = 0.0f;
      }
      StoreN(e, p.exponentials + i, n);
      sums += e;
    });
    const float sum = Sum(sums);
    p.loss[row] = std::log(static_cast<double>(sum)) + maximum - picked;
    if (!p.gradient) continue;
    const float scale = static_cast<float>(p.scale);
    const float factor = scale / sum;
    ForVectors(p.vocabulary, [&](int64_t i, int64_t n) {
      StoreN(LoadN(p.exponentials + i, n) * factor, x + i, n);
    });
    // The label's entry from fp32, not from the rounded product.
    const F16 at_label = Splat(std::exp(picked - maximum) * factor - scale);
    StorePart(at_label, x + label, 1);
  }
}

template <typename T>
void EmbeddingBackwardT(const EmbeddingBackward& p, RowRange columns) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* from = static_cast<const T*>(p.gradient) + row * p.width + columns.begin;
    float* to =
        static_cast<float*>(p.table_gradient) + int64_t{p.ids[row]} * p.width + columns.begin;
    ForVectors(width, [&](int64_t i, int64_t n) {
      StoreN(LoadN(to + i, n) + LoadN(from + i, n), to + i, n);
    });
  }
}

template <typename T>
void AccumulateT(const Accumulate& p, RowRange elements) {
  const T* from = static_cast<const T*>(p.from) + elements.begin;
  float* to = static_cast<float*>(p.to) + elements.begin;
  ForVectors(elements.end - elements.begin, [&](int64_t i, int64_t n) {
    StoreN(LoadN(to + i, n) + LoadN(from + i, n), to + i, n);
  });
}

template <typename T>
void ConvertT(const Convert& p, RowRange elements) {
  const float* from = static_cast<const float*>(p.from) + elements.begin;
  T* to = static_cast<T*>(p.to) + elements.begin;
  ForVectors(elements.end - elements.begin,
             [&](int64_t i, int64_t n) { StoreN(LoadN(from + i, n), to + i, n); });
}

template <typename T>
constexpr Table MakeTable() {
  return Table{RmsNormForwardT<T>,
               RmsNormBackwardT<T>,
               LayerNormForwardT<T>,
               LayerNormBackwardT<T>,
               DytForwardT<T>,
               DytBackwardT<T>,
               RopeT<T>,
               SwigluForwardT<T>,
               SwigluBackwardT<T>,
               ActivationForwardT<T, Gelu>,
               ActivationBackwardT<T, Gelu>,
               ActivationForwardT<T, Silu>,
               ActivationBackwardT<T, Silu>,
               RouterLogitsT<T>,
               RouterWeightGradientT<T>,
               CombineRowsT<T>,
               CrossEntropyT<T>,
               EmbeddingBackwardT<T>,
               AccumulateT<T>,
               ConvertT<T>};
}

}  // namespace
}  // namespace heddle::kernels::pointwise
