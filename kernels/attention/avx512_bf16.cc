// Compiled with the flags of avx512 and avx512bf16 (CMakeLists.txt); only params.h and body.h may
// be included.
#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"

namespace heddle::kernels::attention {

const Table kAvx512Bf16 = MakeTable();

}  // namespace heddle::kernels::attention
