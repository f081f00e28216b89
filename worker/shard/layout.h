// Which elements of a model each rank keeps (training-runtime.md 5.2, 5.3): every unit of the flat
// layout is cut into one slice per rank, equal in size but for the last ones, by elements and not
// by rows. Torch-free. Checkpoints never depend on it: they name tensors and element ranges.
#pragma once

#include <cstdint>
#include <vector>

#include "model/model_plan.h"

namespace heddle::shard {

// Elements [begin, end) of the flat layout.
struct FlatRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

struct UnitSlices {
  int64_t offset = 0;        // of the unit in the flat layout
  int64_t elements = 0;      // of the unit
  int64_t slice = 0;         // elements per rank, a multiple of model::kFlatAlignment
  int64_t owned_offset = 0;  // of this rank's slice in its own arrays
  int64_t padded(int world) const { return slice * world; }
};

class Layout {
 public:
  // REQUIRES: 0 <= rank < world.
  Layout(const model::ModelPlan& plan, int rank, int world);

  int rank() const { return rank_; }
  int world() const { return world_; }
  int units() const { return static_cast<int>(units_.size()); }
  const UnitSlices& unit(int u) const { return units_[static_cast<size_t>(u)]; }

  // What this rank owns of a unit; empty where the slices before it hold everything.
  FlatRange Owned(int unit) const;
  // Length of arrays that hold all own slices, the padding of each included.
  int64_t owned_elements() const { return owned_elements_; }
  // Elements of the largest unit with padding.
  int64_t largest_unit() const;

 private:
  const int rank_;
  const int world_;
  std::vector<UnitSlices> units_;
  int64_t owned_elements_ = 0;
};

}  // namespace heddle::shard
