// Compiled with the flags of generic (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/pointwise/body.h"
#include "kernels/pointwise/tables.h"

namespace heddle::kernels::pointwise {

const Table kGenericFloat32 = MakeTable<float>();
const Table kGenericBFloat16 = MakeTable<uint16_t>();

}  // namespace heddle::kernels::pointwise
