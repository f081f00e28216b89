#include <initializer_list>

#include "kernels/common/isa.h"
#include "kernels/compression/params.h"
#include "kernels/compression/tables.h"

namespace heddle::kernels::compression {
namespace {

const Table<float>* TableOf(Isa isa) {
  if (isa >= Isa::kAvx512) return &kAvx512;
  return isa == Isa::kAvx2 ? &kAvx2 : &kGeneric;
}

}  // namespace

const Table<float>& FloatKernels() { return *TableOf(SelectedIsa()); }
const Table<double>& DoubleKernels() { return kReference; }

int AvailableTables(NamedTable out[3]) {
  int count = 0;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= SelectedIsa()) out[count++] = {IsaName(isa), TableOf(isa)};
  }
  return count;
}

}  // namespace heddle::kernels::compression
