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

// x - mean; lanes beyond the row's end are 0.
template <typename T>
inline F16 Deviation(const T* x, int64_t lanes, float mean) {
  F16 v = LoadN(x, lanes) - mean;
  for (int64_t j = lanes; j < kLanes; ++j) v[j] = 0.0f;
  return v;
}

template <typename T>
void LayerNormForwardT(const LayerNormForward& p, RowRange rows) {
  const T* gain = static_cast<const T*>(p.gain);
  const T* bias = static_cast<const T*>(p.bias);
  const float width = static_cast<float>(p.width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    T* y = static_cast<T*>(p.y) + row * p.width;
    F16 sums{};
    ForVectors(p.width, [&](int64_t i, int64_t n) { sums += LoadN(x + i, n); });
    const float mean = Sum(sums) / width;
    F16 squares{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 v = Deviation(x + i, n, mean);
      squares += v * v;
    });
    const float rstd = 1.0f / std::sqrt(Sum(squares) / width + static_cast<float>(p.eps));
    static_cast<float*>(p.mean)[row] = mean;
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
  const float width = static_cast<float>(p.width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    const T* dy = static_cast<const T*>(p.dy) + row * p.width;
    const T* residual =
        p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.width;
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    const float mean = static_cast<const float*>(p.mean)[row];
    const float rstd = static_cast<const float*>(p.rstd)[row];
    F16 sums{};
    F16 dots{};
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 g = LoadN(dy + i, n) * LoadN(gain + i, n);
      sums += g;
      dots += g * Deviation(x + i, n, mean);
    });
    // Means over the row of gain dy, and of gain dy times xhat.
    const float a = Sum(sums) / width;
    const float b = Sum(dots) * rstd / width;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 xhat = (LoadN(x + i, n) - mean) * rstd;
      const F16 g = LoadN(dy + i, n);
      F16 out = rstd * (g * LoadN(gain + i, n) - a - xhat * b);
      if (residual != nullptr) out += LoadN(residual + i, n);
      StoreN(LoadN(dgain + i, n) + g * xhat, dgain + i, n);
      StoreN(LoadN(dbias + i, n) + g, dbias + i, n);
      StoreN(out, dx + i, n);
    });
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

template <typename T>
void SwigluBackwardT(const SwigluBackward& p, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    T* gate = static_cast<T*>(p.gate_up) + row * 2 * p.width;
    T* up = gate + p.width;
    T* out = static_cast<T*>(p.out_gradient) + row * p.width;
    ForVectors(p.width, [&](int64_t i, int64_t n) {
      const F16 g = LoadN(gate + i, n);
      const F16 u = LoadN(up + i, n);
      const F16 d = LoadN(out + i, n);
      const F16 sigmoid = Sigmoid(g);
      const F16 silu = g * sigmoid;
      StoreN(d * u * (sigmoid + silu * (1.0f - sigmoid)), gate + i, n);
      StoreN(d * silu, up + i, n);
      StoreN(silu * u, out + i, n);
    });
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
      sums += e;
    });
    const float sum = Sum(sums);
    p.loss[row] = std::log(static_cast<double>(sum)) + maximum - picked;
    if (!p.gradient) continue;
    const float scale = static_cast<float>(p.scale);
    const float factor = scale / sum;
    ForVectors(p.vocabulary, [&](int64_t i, int64_t n) {
      StoreN(Exp(LoadN(x + i, n) - maximum) * factor, x + i, n);
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
  return Table{RmsNormForwardT<T>,    RmsNormBackwardT<T>,  RopeT<T>,
               SwigluForwardT<T>,     SwigluBackwardT<T>,   CrossEntropyT<T>,
               EmbeddingBackwardT<T>, AccumulateT<T>,       ConvertT<T>,
               LayerNormForwardT<T>,  LayerNormBackwardT<T>};
}

}  // namespace
}  // namespace heddle::kernels::pointwise
