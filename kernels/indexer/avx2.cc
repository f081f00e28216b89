// Compiled with the flags of avx2 (CMakeLists.txt); only params.h and bodies may be included.
#include "kernels/indexer/body.h"
#include "kernels/indexer/tables.h"

namespace heddle::kernels::indexer {

const Table<float> kAvx2Float = MakeTable<float>();

}  // namespace heddle::kernels::indexer
