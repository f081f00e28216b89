// Compiled with the flags of avx2 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/adamw/body.h"
#include "kernels/adamw/tables.h"

namespace heddle::kernels::adamw {

const Table kAvx2 = {AdamWRange, LionRange, MeasureRange};

}  // namespace heddle::kernels::adamw
