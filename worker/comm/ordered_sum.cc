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

}  // namespace

void OrderedSum(const float* rows, size_t world, size_t count, float* out) {
  Sum(rows, world, count, out);
}

void OrderedSum(const double* rows, size_t world, size_t count, double* out) {
  Sum(rows, world, count, out);
}

}  // namespace heddle::comm
