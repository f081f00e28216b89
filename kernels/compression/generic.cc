// Compiled with the flags of generic (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/compression/body.h"
#include "kernels/compression/tables.h"

namespace heddle::kernels::compression {

const Table<float> kGeneric = {PoolForward, PoolBackwardRows, PoolBackwardTaps};

}  // namespace heddle::kernels::compression
