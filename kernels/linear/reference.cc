#include "kernels/linear/reference.h"

#include <cmath>
#include <cstring>

namespace heddle::kernels::linear {
namespace {

double Wide(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// out[i, j] = sum over k of a(i, k) b(j, k).
template <typename A, typename B>
void Sums(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, double* out,
          double* magnitude) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      double size = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = Wide(a(i, k)) * Wide(b(j, k));
        sum += term;
        size += std::abs(term);
      }
      out[i * columns + j] = sum;
      magnitude[i * columns + j] = size;
    }
  }
}

}  // namespace

void ReferenceForward(const Forward& p, double* y, double* magnitude) {
  Sums(
      p.rows, p.out, p.in, [&](int64_t r, int64_t i) { return p.x[r * p.x_stride + i]; },
      [&](int64_t o, int64_t i) { return p.weight[o * p.weight_stride + i]; }, y, magnitude);
}

void ReferenceInputGradient(const InputGradient& p, double* dx, double* magnitude) {
  Sums(
      p.rows, p.in, p.out, [&](int64_t r, int64_t o) { return p.dy[r * p.dy_stride + o]; },
      [&](int64_t i, int64_t o) { return p.weight[o * p.weight_stride + i]; }, dx, magnitude);
}

void ReferenceWeightGradient(const WeightGradient& p, double* gradient, double* magnitude) {
  Sums(
      p.out, p.in, p.rows, [&](int64_t o, int64_t r) { return p.dy[r * p.dy_stride + o]; },
      [&](int64_t i, int64_t r) { return p.x[r * p.x_stride + i]; }, gradient, magnitude);
}

}  // namespace heddle::kernels::linear
