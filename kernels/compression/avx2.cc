// Compiled with the flags of avx2 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/compression/body.h"
#include "kernels/compression/tables.h"

namespace heddle::kernels::compression {

const Table<float> kAvx2 = {PoolForward, PoolBackwardRows, PoolBackwardTaps};

}  // namespace heddle::kernels::compression
