// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/pointwise/params.h"

namespace heddle::kernels::pointwise {

extern const Table kGenericFloat32, kGenericBFloat16;
extern const Table kAvx2Float32, kAvx2BFloat16;
extern const Table kAvx512Float32, kAvx512BFloat16;
extern const Table kReferenceFloat64;

}  // namespace heddle::kernels::pointwise
