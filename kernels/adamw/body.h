// Bodies of the optimizer kernels, compiled once per instruction set: every stream read and written
// once, no lane depends on another. Included by generic.cc, avx2.cc and avx512.cc only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/adamw/lanes.h"
#include "kernels/adamw/params.h"
#include "kernels/adamw/rounding.h"

namespace heddle::kernels::adamw {
namespace {  // NOLINT: ISA file (architecture.md T12)

// How far ahead the streams are asked for. The processor's own prefetch stops at the end of every
// page of every stream, which is a tenth of the time of a pass over memory.
constexpr int64_t kAhead = 384;

template <typename Moment>
inline void Prefetch(const Params& p, const Moment* m, const Moment* v, int64_t i) {
  __builtin_prefetch(p.gradient + i + kAhead, 0);
  __builtin_prefetch(p.master + i + kAhead, 1);
  __builtin_prefetch(m + i + kAhead, 1);
  if (v != nullptr) __builtin_prefetch(v + i + kAhead, 1);
  if (p.weights != nullptr) __builtin_prefetch(p.weights + i + kAhead, 1);
}

// Moments in fp32 are kept as they are; `random` is for those in bf16.
inline void Keep(Floats value, float* to, int64_t lanes, const uint16_t* /*random*/) {
  Store(value, to, lanes);
}
inline void Keep(Floats value, uint16_t* to, int64_t lanes, const uint16_t* random) {
  StoreVector(Rounded(value, random), to, lanes);
}

template <typename Moment>
[[gnu::always_inline]] inline void AdamWLanes(const Params& p, Moment* m_at, Moment* v_at,
                                              int64_t i, int64_t n, const uint16_t* random) {
  Prefetch(p, m_at, v_at, i);
  const Floats g = Load(p.gradient + i, n) * p.gradient_factor;
  const Floats m = Load(m_at + i, n) * p.beta1 + g * (1.0f - p.beta1);
  const Floats v = Load(v_at + i, n) * p.beta2 + g * g * (1.0f - p.beta2);
  const Floats decayed = Load(p.master + i, n) * (1.0f - p.learning_rate * p.weight_decay);
  // One division: they are what the pass waits for when its data are in a cache.
  const Floats denominator = Sqrt(v) * (1.0f / p.bias_correction2_root) + p.eps;
  const Floats w = decayed - (p.learning_rate / p.bias_correction1) * m / denominator;
  Keep(m, m_at + i, n, random);
  Keep(v, v_at + i, n, random);
  Store(w, p.master + i, n);
  if (p.weights != nullptr) Store(w, p.weights + i, n);
}

template <typename Moment>
[[gnu::always_inline]] inline void LionLanes(const Params& p, Moment* m_at, Moment* /*v_at*/,
                                             int64_t i, int64_t n, const uint16_t* random) {
  Prefetch<Moment>(p, m_at, nullptr, i);
  const Floats g = Load(p.gradient + i, n) * p.gradient_factor;
  const Floats m = Load(m_at + i, n);
  const Floats direction = m * p.beta1 + g * (1.0f - p.beta1);
  const Floats zero{};
  const Floats one = zero + 1.0f;
  const Floats sign = direction > zero ? one : (direction < zero ? -one : direction);
  const Floats before = Load(p.master + i, n);
  const Floats w = before - p.learning_rate * (sign + p.weight_decay * before);
  Keep(m * p.beta2 + g * (1.0f - p.beta2), m_at + i, n, random);
  Store(w, p.master + i, n);
  if (p.weights != nullptr) Store(w, p.weights + i, n);
}

template <typename Moment>
using Update = void(const Params&, Moment*, Moment*, int64_t, int64_t, const uint16_t*);

// By value: a local copy cannot be what the stores of floats change, so that factors stay in
// registers.
template <Update<float> kUpdate>
inline void RunExact(Params p) {
  int64_t i = 0;
  for (; i + kLanes <= p.elements; i += kLanes) kUpdate(p, p.m, p.v, i, kLanes, nullptr);
  if (i < p.elements) kUpdate(p, p.m, p.v, i, p.elements - i, nullptr);
}

// A quarter of the group at i, and of the work on the next one's bits.
template <Update<uint16_t> kUpdate, int kQuarter>
[[gnu::always_inline]] inline void Quarter(const Params& p, int64_t i, const uint16_t* random,
                                           RandomBits& bits) {
  bits.Rounds(kQuarter * RandomBits::kRounds / 4, (kQuarter + 1) * RandomBits::kRounds / 4);
  constexpr int64_t kElements = kRandomGroup / 4;
  for (int64_t j = kQuarter * kElements; j < (kQuarter + 1) * kElements; j += kLanes) {
    kUpdate(p, p.m_bf16, p.v_bf16, i + j, kLanes, random + j);
  }
}

template <Update<uint16_t> kUpdate>
inline void RunRounding(Params p) {
  // The last lanes of a part read past their bits.
  alignas(64) uint16_t random[kRandomGroup + kLanes] = {};
  RandomBits bits(p.rounding);
  bits.Start(p.rounding.first / kRandomGroup);
  bits.Rounds(0, RandomBits::kRounds);
  for (int64_t i = 0; i < p.elements;) {
    const int64_t place = p.rounding.first + i;
    const int64_t within = place % kRandomGroup;
    bits.Write(random);
    bits.Start(place / kRandomGroup + 1);
    if (within == 0 && p.elements - i >= kRandomGroup) {
      Quarter<kUpdate, 0>(p, i, random, bits);
      Quarter<kUpdate, 1>(p, i, random, bits);
      Quarter<kUpdate, 2>(p, i, random, bits);
      Quarter<kUpdate, 3>(p, i, random, bits);
      i += kRandomGroup;
      continue;
    }
    bits.Rounds(0, RandomBits::kRounds);
    const int64_t end = std::min(i + kRandomGroup - within, p.elements);
    for (const uint16_t* at = random + within; i < end; at += kLanes) {
      const int64_t lanes = std::min(end - i, kLanes);
      kUpdate(p, p.m_bf16, p.v_bf16, i, lanes, at);
      i += lanes;
    }
  }
}

void AdamWRange(const Params& p) {
  if (p.m_bf16 != nullptr) {
    RunRounding<AdamWLanes<uint16_t>>(p);
  } else {
    RunExact<AdamWLanes<float>>(p);
  }
}

void LionRange(const Params& p) {
  if (p.m_bf16 != nullptr) {
    RunRounding<LionLanes<uint16_t>>(p);
  } else {
    RunExact<LionLanes<float>>(p);
  }
}

// Squares are exact in double; sixteen partial sums, whatever the width, then one fixed order.
class Squares {
 public:
  static constexpr int64_t kSums = 16;

  void Add(const float* values, int64_t count) {
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t left = count - part * kLanes;
      const Floats v = count == kSums ? Load(values + part * kLanes, kLanes)
                       : left > 0     ? Load(values + part * kLanes, std::min(left, kLanes))
                                      : Floats{};
      const Ints finite = (v - v) == Floats{};
      finite_ -= finite;
      const Floats good = finite ? v : Floats{};
      HalfFloats half[2];
      std::memcpy(half, &good, sizeof(good));
      const Doubles low = __builtin_convertvector(half[0], Doubles);
      const Doubles high = __builtin_convertvector(half[1], Doubles);
      sums_[part][0] += low * low;
      sums_[part][1] += high * high;
    }
    lanes_ += kSums;
  }

  Stats Result() const {
    double all[kSums];
    std::memcpy(all, sums_, sizeof(all));
    Stats stats;
    for (int64_t j = 0; j < kSums / 2; ++j) stats.sum_of_squares += all[j] + all[j + kSums / 2];
    stats.non_finite = lanes_;
    for (int64_t j = 0; j < kLanes; ++j) stats.non_finite -= finite_[j];
    return stats;
  }

 private:
  static constexpr int64_t kParts = kSums / kLanes;

  Doubles sums_[kParts][2] = {};
  Ints finite_{};
  int64_t lanes_ = 0;  // those past the end are zero
};

Stats MeasureRange(const float* values, int64_t elements) {
  Squares squares;
  int64_t i = 0;
  for (; i + Squares::kSums <= elements; i += Squares::kSums) {
    __builtin_prefetch(values + i + 2 * kAhead);
    squares.Add(values + i, Squares::kSums);
  }
  if (i < elements) squares.Add(values + i, elements - i);
  return squares.Result();
}

}  // namespace
}  // namespace heddle::kernels::adamw
