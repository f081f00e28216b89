// Compiled with the flags of avx512 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/kv_quant/body.h"
#include "kernels/kv_quant/tables.h"

namespace heddle::kernels::kv_quant {

const Table kAvx512 = MakeTable();

}  // namespace heddle::kernels::kv_quant
