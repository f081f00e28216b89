#include <algorithm>

#include "kernels/common/isa.h"
#include "kernels/linear/params.h"
#include "kernels/linear/sizes.h"
#include "kernels/linear/tables.h"

namespace heddle::kernels::linear {
namespace {

constexpr int64_t kHalf = sizeof(uint16_t);

}  // namespace

// The input in pairs, and one block of rows of the weight where it must be padded.
int64_t WorkspaceBytes(const Forward& p) {
  return (Padded(p.rows) + kBlock) * Padded(p.in) * kHalf;
}

// Of a part of the depth two blocks of columns of the weight in pairs, and dy; sums between parts.
int64_t WorkspaceBytes(const InputGradient& p) {
  const int64_t depth = std::min(kChunkDepth, Padded(p.out));
  const int64_t sums = p.out > kChunkDepth ? Padded(p.rows) * Padded(p.in) : 0;
  return (Padded(p.rows) + 2 * kBlock) * depth * kHalf + sums * static_cast<int64_t>(sizeof(float));
}

// The input in pairs, and one block of columns of dy transposed.
int64_t WorkspaceBytes(const WeightGradient& p) {
  return std::min(Padded(p.rows), kChunkRows) * (Padded(p.in) + kBlock) * kHalf;
}

const Table& Kernels() {
  if (SelectedIsa() >= Isa::kAmx) return kAmx;
  if (HasAvx512Bf16()) return kAvx512Bf16;
  if (SelectedIsa() >= Isa::kAvx512) return kAvx512;
  return SelectedIsa() == Isa::kAvx2 ? kAvx2 : kGeneric;
}

bool HasPairProducts() { return HasAvx512Bf16(); }

int AvailableTables(NamedTable out[5]) {
  int count = 0;
  out[count++] = {"generic", &kGeneric};
  if (SelectedIsa() >= Isa::kAvx2) out[count++] = {"avx2", &kAvx2};
  if (SelectedIsa() >= Isa::kAvx512) out[count++] = {"avx512", &kAvx512};
  if (HasAvx512Bf16()) out[count++] = {"avx512_bf16", &kAvx512Bf16};
  if (SelectedIsa() >= Isa::kAmx) out[count++] = {"amx", &kAmx};
  return count;
}

}  // namespace heddle::kernels::linear
