// Compiled with the flags of avx512 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/compression/body.h"
#include "kernels/compression/tables.h"

namespace heddle::kernels::compression {

const Table<float> kAvx512 = {PoolForward, PoolBackwardRows, PoolBackwardTaps};

}  // namespace heddle::kernels::compression
