// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/block_selection/params.h"

namespace heddle::kernels::block_selection {

extern const Table<float> kGeneric, kAvx2, kAvx512;
extern const Table<double> kReference;

}  // namespace heddle::kernels::block_selection
