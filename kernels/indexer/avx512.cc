// Compiled with the flags of avx512 (CMakeLists.txt); only params.h and bodies may be included.
#include "kernels/indexer/body.h"
#include "kernels/indexer/tables.h"

namespace heddle::kernels::indexer {

const Table<float> kAvx512Float = MakeTable<float>();

}  // namespace heddle::kernels::indexer
