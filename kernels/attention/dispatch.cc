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

// Measured by bench_attention with avx512_bf16, head widths 64 and 128. With amx, not measured:
// products of tiles take about a quarter of the time.
PairCost GatheredPairCost(int64_t group) {
  PairCost cost{3, 5.5};
  if (group < 8) cost = {3.5, 6.5};
  if (group < 2) cost = {8, 14};
  if (SelectedIsa() >= Isa::kAmx) return {4 * cost.forward, 4 * cost.backward};
  return HasAvx512Bf16() ? cost : PairCost{};
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
