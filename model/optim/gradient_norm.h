// Norm and verdict of gradients (training-runtime.md section 8): sums in fp64 in a fixed order, so
// that the result does not depend on threads.
#pragma once

#include <cstdint>
#include <span>

namespace heddle::optim {

struct GradientStats {
  double sum_of_squares = 0.0;  // of the finite values
  int64_t non_finite = 0;
};

GradientStats MeasureGradients(std::span<const float> gradients);

// Factor by which the gradient is to be divided so that its norm is at most `clip`;
// 1 when clip <= 0 (no clipping).
double ClipDivisor(double norm, double clip);

}  // namespace heddle::optim
