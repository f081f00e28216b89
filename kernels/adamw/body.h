// Bodies of the optimizer kernels, compiled once per instruction set: sixteen lanes at a time,
// every stream read and written once, no lane depends on another. Included by generic.cc, avx2.cc
// and avx512.cc only.
#pragma once

#include <cmath>

#include "kernels/adamw/params.h"
#include "kernels/common/simd.h"

namespace heddle::kernels::adamw {
namespace {  // NOLINT: ISA file (architecture.md T12)

inline F16 Sqrt(F16 v) {
  F16 out;
  for (int64_t i = 0; i < kLanes; ++i) out[i] = std::sqrt(v[i]);
  return out;
}

inline F16 LoadN(const float* from, int64_t lanes) {
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

inline void AdamWLanes(const Params& p, int64_t i, int64_t n) {
  const F16 g = LoadN(p.gradient + i, n) * p.gradient_factor;
  const F16 m = LoadN(p.m + i, n) * p.beta1 + g * (1.0f - p.beta1);
  const F16 v = LoadN(p.v + i, n) * p.beta2 + g * g * (1.0f - p.beta2);
  const F16 decayed = LoadN(p.master + i, n) * (1.0f - p.learning_rate * p.weight_decay);
  const F16 denominator = Sqrt(v) / p.bias_correction2_root + p.eps;
  const F16 w = decayed - (p.learning_rate / p.bias_correction1) * m / denominator;
  StoreN(m, p.m + i, n);
  StoreN(v, p.v + i, n);
  StoreN(w, p.master + i, n);
  if (p.weights != nullptr) StoreN(w, p.weights + i, n);
}

inline void LionLanes(const Params& p, int64_t i, int64_t n) {
  const F16 g = LoadN(p.gradient + i, n) * p.gradient_factor;
  const F16 m = LoadN(p.m + i, n);
  const F16 direction = m * p.beta1 + g * (1.0f - p.beta1);
  const F16 one = Splat(1.0f);
  const F16 zero{};
  const F16 sign = direction > zero ? one : (direction < zero ? -one : direction);
  const F16 before = LoadN(p.master + i, n);
  const F16 w = before - p.learning_rate * (sign + p.weight_decay * before);
  StoreN(m * p.beta2 + g * (1.0f - p.beta2), p.m + i, n);
  StoreN(w, p.master + i, n);
  if (p.weights != nullptr) StoreN(w, p.weights + i, n);
}

void AdamWRange(const Params& p) {
  int64_t i = 0;
  for (; i + kLanes <= p.elements; i += kLanes) AdamWLanes(p, i, kLanes);
  if (i < p.elements) AdamWLanes(p, i, p.elements - i);
}

void LionRange(const Params& p) {
  int64_t i = 0;
  for (; i + kLanes <= p.elements; i += kLanes) LionLanes(p, i, kLanes);
  if (i < p.elements) LionLanes(p, i, p.elements - i);
}

using D8 = double __attribute__((vector_size(64)));

Stats MeasureRange(const float* values, int64_t elements) {
  // Squares are exact in double; sixteen partial sums in two vectors, then one fixed order.
  D8 low{};
  D8 high{};
  Stats stats;
  for (int64_t i = 0; i < elements; i += kLanes) {
    const int64_t n = elements - i < kLanes ? elements - i : kLanes;
    F16 v = LoadN(values + i, n);
    const I16 finite = (v - v) == F16{};
    v = finite ? v : F16{};
    int32_t all[kLanes];
    std::memcpy(all, &finite, sizeof(all));
    int32_t good = 0;
    for (const int32_t lane : all) good -= lane;
    stats.non_finite += kLanes - good;
    float lanes[kLanes];
    Store(v, lanes);
    D8 a;
    D8 b;
    for (int j = 0; j < 8; ++j) {
      a[j] = lanes[j];
      b[j] = lanes[j + 8];
    }
    low += a * a;
    high += b * b;
  }
  const D8 both = low + high;
  for (int j = 0; j < 8; ++j) stats.sum_of_squares += both[j];
  return stats;
}

}  // namespace
}  // namespace heddle::kernels::adamw
