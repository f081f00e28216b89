// Compiled with the flags of generic (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/block_selection/body.h"
#include "kernels/block_selection/tables.h"

namespace heddle::kernels::block_selection {

const Table<float> kGeneric = {Select};

}  // namespace heddle::kernels::block_selection
