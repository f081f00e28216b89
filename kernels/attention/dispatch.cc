#include "kernels/attention/params.h"
#include "kernels/attention/tables.h"
#include "kernels/common/isa.h"

namespace heddle::kernels::attention {

const Table& Kernels() {
  if (SelectedIsa() >= Isa::kAvx512) return kAvx512;
  return SelectedIsa() == Isa::kAvx2 ? kAvx2 : kGeneric;
}

}  // namespace heddle::kernels::attention
