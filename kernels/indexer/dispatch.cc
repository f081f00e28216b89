#include "kernels/common/isa.h"
#include "kernels/indexer/params.h"
#include "kernels/indexer/tables.h"

namespace heddle::kernels::indexer {

const Table<float>& FloatKernels() {
  if (SelectedIsa() >= Isa::kAvx512) return kAvx512Float;
  return SelectedIsa() == Isa::kAvx2 ? kAvx2Float : kGenericFloat;
}

const Table<double>& DoubleKernels() { return kGenericDouble; }

}  // namespace heddle::kernels::indexer
