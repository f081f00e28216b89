#include <initializer_list>

#include "kernels/common/isa.h"
#include "kernels/sparse_attention/params.h"
#include "kernels/sparse_attention/tables.h"

namespace heddle::kernels::sparse_attention {
namespace {

const Table<float>* TableOf(Isa isa) {
  if (isa >= Isa::kAvx512) return &kAvx512;
  return isa == Isa::kAvx2 ? &kAvx2 : &kGeneric;
}

}  // namespace

const Table<float>& FloatKernels() { return *TableOf(SelectedIsa()); }
const Table<double>& DoubleKernels() { return kGenericDouble; }

int AvailableFloatTables(NamedTable out[4]) {
  int count = 0;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= SelectedIsa()) out[count++] = {IsaName(isa), TableOf(isa)};
  }
  return count;
}

}  // namespace heddle::kernels::sparse_attention
