// Compiled with no vector flags (CMakeLists.txt); only params.h and the bodies may be
// included.
#include "kernels/linear/block.h"
#include "kernels/linear/body.h"
#include "kernels/linear/tables.h"

namespace heddle::kernels::linear {

const Table kGeneric = MakeTable<VectorBlocks>();

}  // namespace heddle::kernels::linear
