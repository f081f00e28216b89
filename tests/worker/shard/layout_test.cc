#include "worker/shard/layout.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/model/tiny_model.h"

namespace heddle::shard {
namespace {

using model_test::Kind;
using model_test::TinyConfig;

// Units of 1, 31, 32, 33 and 1000 elements, one after the other as a plan has them.
model::ModelPlan PlanOf(const std::vector<int64_t>& sizes) {
  model::ModelPlan plan;
  for (const int64_t size : sizes) {
    model::UnitSpec unit;
    unit.offset = plan.flat_elements;
    unit.elements = size;
    plan.units.push_back(unit);
    plan.flat_elements += size;
  }
  return plan;
}

TEST(Layout, EveryElementIsOwnedOnce) {
  const model::ModelPlan plan = PlanOf({1, 31, 32, 33, 1000, 64});
  for (int world = 1; world <= 9; ++world) {
    std::vector<int> owners(static_cast<size_t>(plan.flat_elements), 0);
    for (int rank = 0; rank < world; ++rank) {
      const Layout layout(plan, rank, world);
      for (int u = 0; u < layout.units(); ++u) {
        const FlatRange range = layout.Owned(u);
        EXPECT_LE(range.begin, range.end);
        EXPECT_LE(range.size(), layout.unit(u).slice);
        for (int64_t i = range.begin; i < range.end; ++i) ++owners[static_cast<size_t>(i)];
      }
    }
    EXPECT_EQ(owners, std::vector<int>(owners.size(), 1)) << world;
  }
}

TEST(Layout, SlicesAreEqualAndAligned) {
  const Layout layout(PlanOf({1, 33, 1000}), 2, 3);
  int64_t owned = 0;
  for (int u = 0; u < layout.units(); ++u) {
    EXPECT_EQ(layout.unit(u).slice % model::kFlatAlignment, 0);
    EXPECT_GE(layout.unit(u).padded(3), layout.unit(u).elements);
    EXPECT_EQ(layout.unit(u).owned_offset, owned);
    owned += layout.unit(u).slice;
  }
  EXPECT_EQ(layout.owned_elements(), owned);
  EXPECT_EQ(layout.Owned(0).size(), 0) << "one element: the first rank has it";
  EXPECT_EQ(layout.Owned(2).size(), 1000 - 2 * 352);
  EXPECT_EQ(layout.largest_unit(), 3 * 352);
}

TEST(Layout, StateOfARankShrinksWithTheRanks) {
  const model::ModelPlan plan = *model::PlanModel(TinyConfig(Kind::kDense, false));
  for (const int world : {2, 3, 4, 8}) {
    const Layout layout(plan, 0, world);
    const int64_t rounding = model::kFlatAlignment * layout.units();
    EXPECT_LE(layout.owned_elements(), plan.flat_elements / world + rounding) << world;
  }
}

}  // namespace
}  // namespace heddle::shard
