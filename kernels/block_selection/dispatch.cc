#include <initializer_list>

#include "kernels/block_selection/params.h"
#include "kernels/block_selection/tables.h"
#include "kernels/common/isa.h"

namespace heddle::kernels::block_selection {
namespace {

const Table<float>* TableOf(Isa isa) {
  if (isa >= Isa::kAvx512) return &kAvx512;
  return isa == Isa::kAvx2 ? &kAvx2 : &kGeneric;
}

}  // namespace

int64_t ScratchElements(const Shape& shape, int64_t position) {
  // A whole tile of probabilities is written at a time.
  constexpr int64_t kTile = 16;
  const int64_t probabilities = (VisibleWindows(shape, position) + kTile - 1) / kTile * kTile;
  return probabilities + position / shape.block + 1 + ChosenBlocks(shape, position);
}

const Table<float>& FloatKernels() { return *TableOf(SelectedIsa()); }
const Table<double>& DoubleKernels() { return kReference; }

int AvailableTables(NamedTable out[3]) {
  int count = 0;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= SelectedIsa()) out[count++] = {IsaName(isa), TableOf(isa)};
  }
  return count;
}

}  // namespace heddle::kernels::block_selection
