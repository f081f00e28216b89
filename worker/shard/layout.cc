#include "worker/shard/layout.h"

#include <algorithm>

#include "base/status/status.h"

namespace heddle::shard {

Layout::Layout(const model::ModelPlan& plan, int rank, int world) : rank_(rank), world_(world) {
  HEDDLE_CHECK(rank >= 0 && rank < world);
  for (const model::UnitSpec& unit : plan.units) {
    UnitSlices slices;
    slices.offset = unit.offset;
    slices.elements = unit.elements;
    slices.slice = model::SliceElements(unit, world);
    slices.owned_offset = owned_elements_;
    owned_elements_ += slices.slice;
    units_.push_back(slices);
  }
}

FlatRange Layout::Owned(int unit) const {
  const UnitSlices& slices = this->unit(unit);
  const int64_t begin = std::min(slices.slice * rank_, slices.elements);
  const int64_t end = std::min(slices.slice * (rank_ + 1), slices.elements);
  return {slices.offset + begin, slices.offset + end};
}

int64_t Layout::largest_unit() const {
  int64_t largest = 0;
  for (const UnitSlices& unit : units_) largest = std::max(largest, unit.padded(world_));
  return largest;
}

}  // namespace heddle::shard
