#include "worker/comm/ordered_sum.h"

#include <cstring>
#include <vector>

namespace heddle::comm {

namespace {

float Widen(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

float Widen(float value) { return value; }
double Widen(double value) { return value; }

// Blocks that stay in the first-level cache while all rows are added.
constexpr size_t kBlock = 2048;

template <typename From, typename To>
void Sum(const From* const* rows, size_t world, size_t count, To* out) {
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t size = count - begin < kBlock ? count - begin : kBlock;
    To* __restrict target = out + begin;
    To sums[kBlock];
    for (size_t i = 0; i < size; ++i) sums[i] = Widen(rows[0][begin + i]);
    for (size_t r = 1; r < world; ++r) {
      const From* __restrict row = rows[r] + begin;
      for (size_t i = 0; i < size; ++i) sums[i] += Widen(row[i]);
    }
    std::memcpy(target, sums, size * sizeof(To));
  }
}

template <typename From, typename To>
void SumEven(const From* rows, size_t world, size_t count, To* out) {
  std::vector<const From*> starts;
  for (size_t r = 0; r < world; ++r) starts.push_back(rows + r * count);
  Sum(starts.data(), world, count, out);
}

}  // namespace

void OrderedSum(const float* rows, size_t world, size_t count, float* out) {
  SumEven(rows, world, count, out);
}
void OrderedSum(const double* rows, size_t world, size_t count, double* out) {
  SumEven(rows, world, count, out);
}
void OrderedSum(const uint16_t* rows, size_t world, size_t count, float* out) {
  SumEven(rows, world, count, out);
}
void OrderedSum(const float* const* rows, size_t world, size_t count, float* out) {
  Sum(rows, world, count, out);
}
void OrderedSum(const double* const* rows, size_t world, size_t count, double* out) {
  Sum(rows, world, count, out);
}
void OrderedSum(const uint16_t* const* rows, size_t world, size_t count, float* out) {
  Sum(rows, world, count, out);
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
