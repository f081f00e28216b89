// Compiled with the flags of avx2 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/pointwise/body.h"
#include "kernels/pointwise/tables.h"

namespace heddle::kernels::pointwise {

const Table kAvx2Float32 = MakeTable<float>();
const Table kAvx2BFloat16 = MakeTable<uint16_t>();

}  // namespace heddle::kernels::pointwise
