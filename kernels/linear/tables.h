// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/linear/params.h"

namespace heddle::kernels::linear {

extern const Table kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx;

}  // namespace heddle::kernels::linear
