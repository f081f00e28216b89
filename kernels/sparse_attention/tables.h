// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/sparse_attention/params.h"

namespace heddle::kernels::sparse_attention {

extern const Table<float> kGeneric, kAvx2, kAvx512;
extern const Table<double> kGenericDouble;

}  // namespace heddle::kernels::sparse_attention
