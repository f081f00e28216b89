// Compiled with the flags of generic (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/adamw/body.h"
#include "kernels/adamw/tables.h"

namespace heddle::kernels::adamw {

const Table kGeneric = {AdamWRange, LionRange, MeasureRange};

}  // namespace heddle::kernels::adamw
