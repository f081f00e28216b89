// Compiled with the flags of generic (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/sparse_attention/body.h"
#include "kernels/sparse_attention/tables.h"

namespace heddle::kernels::sparse_attention {

const Table<float> kGeneric = MakeTable<float>();
const Table<double> kGenericDouble = MakeTable<double>();

}  // namespace heddle::kernels::sparse_attention
