#include <initializer_list>

#include "kernels/common/isa.h"
#include "kernels/kv_quant/params.h"
#include "kernels/kv_quant/tables.h"

namespace heddle::kernels::kv_quant {
namespace {

const Table* TableOf(Isa isa) {
  if (isa >= Isa::kAvx512) return &kAvx512;
  return isa == Isa::kAvx2 ? &kAvx2 : &kGeneric;
}

}  // namespace

const Table& Kernels() { return *TableOf(SelectedIsa()); }

int AvailableTables(NamedTable out[4]) {
  int count = 0;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= SelectedIsa()) out[count++] = {IsaName(isa), TableOf(isa)};
  }
  return count;
}

}  // namespace heddle::kernels::kv_quant
