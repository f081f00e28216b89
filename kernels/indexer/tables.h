// The tables of every instruction set, for the dispatcher and the tests that compare them.
#pragma once

#include "kernels/indexer/params.h"

namespace heddle::kernels::indexer {

extern const Table<float> kGenericFloat, kAvx2Float, kAvx512Float;
extern const Table<double> kGenericDouble;

}  // namespace heddle::kernels::indexer
