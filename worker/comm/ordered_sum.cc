#include "worker/comm/ordered_sum.h"

#include <cstring>

namespace heddle::comm {

namespace {

template <typename T>
void Sum(const T* rows, size_t world, size_t count, T* out) {
  std::memcpy(out, rows, count * sizeof(T));
  for (size_t r = 1; r < world; ++r) {
    const T* __restrict row = rows + r * count;
    T* __restrict target = out;
    for (size_t i = 0; i < count; ++i) {
      target[i] += row[i];
    }
  }
}

float Widen(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace

void OrderedSum(const float* rows, size_t world, size_t count, float* out) {
  Sum(rows, world, count, out);
}

void OrderedSum(const double* rows, size_t world, size_t count, double* out) {
  Sum(rows, world, count, out);
}

void OrderedSum(const uint16_t* rows, size_t world, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) {
    out[i] = Widen(rows[i]);
  }
  for (size_t r = 1; r < world; ++r) {
    const uint16_t* row = rows + r * count;
    for (size_t i = 0; i < count; ++i) {
      out[i] += Widen(row[i]);
    }
  }
}

void RoundToBf16(const float* from, size_t count, uint16_t* to) {
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
  }
}

}  // namespace heddle::comm
