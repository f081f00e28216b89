// Compiled with the flags of avx512 and avx512bf16 (CMakeLists.txt); only params.h and the bodies
// may be included.
#include "kernels/linear/block.h"
#include "kernels/linear/body.h"
#include "kernels/linear/tables.h"

namespace heddle::kernels::linear {

const Table kAvx512Bf16 = MakeTable<VectorBlocks>();

}  // namespace heddle::kernels::linear
