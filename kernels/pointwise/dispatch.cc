#include <initializer_list>

#include "kernels/common/isa.h"
#include "kernels/pointwise/params.h"
#include "kernels/pointwise/tables.h"

namespace heddle::kernels::pointwise {
namespace {

const Table* TableOf(Isa isa, Element element) {
  const bool bf16 = element == Element::kBFloat16;
  switch (isa) {
    case Isa::kAmx:
    case Isa::kAvx512:
      return bf16 ? &kAvx512BFloat16 : &kAvx512Float32;
    case Isa::kAvx2:
      return bf16 ? &kAvx2BFloat16 : &kAvx2Float32;
    case Isa::kGeneric:
      break;
  }
  return bf16 ? &kGenericBFloat16 : &kGenericFloat32;
}

}  // namespace

const Table& Kernels(Element element) {
  if (element == Element::kFloat64) return kReferenceFloat64;
  return *TableOf(SelectedIsa(), element);
}

int AvailableTables(Element element, NamedTable out[4]) {
  if (element == Element::kFloat64) {
    out[0] = {"reference", &kReferenceFloat64};
    return 1;
  }
  int count = 0;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= SelectedIsa()) out[count++] = {IsaName(isa), TableOf(isa, element)};
  }
  return count;
}

}  // namespace heddle::kernels::pointwise
