// Compiled with the flags of generic (CMakeLists.txt); only params.h and body.h may be included.
#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"

namespace heddle::kernels::attention {

const Table kGeneric = MakeTable();

}  // namespace heddle::kernels::attention
