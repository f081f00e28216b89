// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/attention/params.h"

namespace heddle::kernels::attention {

extern const Table kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx;

}  // namespace heddle::kernels::attention
