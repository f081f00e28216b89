// Compiled with the flags of avx512 (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/block_selection/body.h"
#include "kernels/block_selection/tables.h"

namespace heddle::kernels::block_selection {

const Table<float> kAvx512 = {Select};

}  // namespace heddle::kernels::block_selection
