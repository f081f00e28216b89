// The products in double with plain loops: the oracle of the kernels.
#pragma once

#include "kernels/linear/params.h"

namespace heddle::kernels::linear {

// y [rows, out], dx [rows, in], gradient [out, in], all dense and overwritten; `magnitude`, of the
// same shape, is the sum of the magnitudes of the terms. Result pointers of `p` are not read.
void ReferenceForward(const Forward& p, double* y, double* magnitude);
void ReferenceInputGradient(const InputGradient& p, double* dx, double* magnitude);
void ReferenceWeightGradient(const WeightGradient& p, double* gradient, double* magnitude);

}  // namespace heddle::kernels::linear
