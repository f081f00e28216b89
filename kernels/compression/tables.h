// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/compression/params.h"

namespace heddle::kernels::compression {

extern const Table<float> kGeneric, kAvx2, kAvx512;
extern const Table<double> kReference;

}  // namespace heddle::kernels::compression
