#include "kernels/attention/params.h"
#include "kernels/attention/tables.h"
#include "kernels/common/isa.h"

namespace heddle::kernels::attention {

const Table& Kernels() {
  if (SelectedIsa() >= Isa::kAmx) return kAmx;
  if (HasAvx512Bf16()) return kAvx512Bf16;
  if (SelectedIsa() >= Isa::kAvx512) return kAvx512;
  return SelectedIsa() == Isa::kAvx2 ? kAvx2 : kGeneric;
}

// Measured with avx512_bf16: equal at 5.5 with groups of 4 query heads, at 4.2 with 16. With amx
// products of tiles take about a quarter of that time.
double GatheredPairCost() {
  if (SelectedIsa() >= Isa::kAmx) return 18;
  return HasAvx512Bf16() ? 4.5 : 0;
}

int AvailableTables(NamedTable out[5]) {
  int count = 0;
  out[count++] = {"generic", &kGeneric};
  if (SelectedIsa() >= Isa::kAvx2) out[count++] = {"avx2", &kAvx2};
  if (SelectedIsa() >= Isa::kAvx512) out[count++] = {"avx512", &kAvx512};
  if (HasAvx512Bf16()) out[count++] = {"avx512_bf16", &kAvx512Bf16};
  if (SelectedIsa() >= Isa::kAmx) out[count++] = {"amx", &kAmx};
  return count;
}

}  // namespace heddle::kernels::attention
