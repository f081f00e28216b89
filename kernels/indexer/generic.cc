// Compiled with the flags of generic (CMakeLists.txt); only params.h and bodies may be included.
#include "kernels/indexer/body.h"
#include "kernels/indexer/tables.h"

namespace heddle::kernels::indexer {

const Table<float> kGenericFloat = MakeTable<float>();
const Table<double> kGenericDouble = MakeTable<double>();

}  // namespace heddle::kernels::indexer
