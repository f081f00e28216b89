// Compiled with the flags of avx512 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/sparse_attention/body.h"
#include "kernels/sparse_attention/tables.h"

namespace heddle::kernels::sparse_attention {

const Table<float> kAvx512 = MakeTable<float>();

}  // namespace heddle::kernels::sparse_attention
