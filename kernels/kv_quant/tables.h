// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/kv_quant/params.h"

namespace heddle::kernels::kv_quant {

extern const Table kGeneric, kAvx2, kAvx512;

}  // namespace heddle::kernels::kv_quant
