// The tables of every instruction set, for the dispatcher.
#pragma once

#include "kernels/adamw/params.h"

namespace heddle::kernels::adamw {

extern const Table kGeneric, kAvx2, kAvx512;

}  // namespace heddle::kernels::adamw
