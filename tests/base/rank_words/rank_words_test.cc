#include "base/rank_words/rank_words.h"

#include <gtest/gtest.h>

namespace heddle {
namespace {

TEST(RankWords, PhasesAndCollectivesHaveTheirWords) {
  EXPECT_EQ(PhaseText(3), "forward");
  EXPECT_EQ(PhaseText(9), "backward");
  EXPECT_EQ(PartOfPhase(2), PhasePart::kData);
  EXPECT_EQ(PartOfPhase(9), PhasePart::kCompute);
  EXPECT_EQ(PartOfPhase(6), PhasePart::kDisk);
  EXPECT_EQ(CollectiveText(1812, 3, 8, 12), "#1812 all-gather block.7");
  EXPECT_EQ(CollectiveText(5, 4, 13, 12), "#5 reduce-scatter head");
  EXPECT_EQ(CollectiveText(6, 6, 2, 12), "#6 all-to-all block.1");
  EXPECT_EQ(CollectiveText(9, 1, 17, 12), "#9 all-reduce block.3.experts");
}

TEST(RankWords, SumsOverAllParametersNameNoUnit) {
  EXPECT_EQ(CollectiveText(7, 1, -1, 12), "#7 all-reduce");
  EXPECT_EQ(CollectiveText(7, 1, uint32_t{0xffffffff}, 12), "#7 all-reduce") << "as in the page";
  EXPECT_EQ(CollectiveText(7, 2, 0, 12), "#7 agreement");
}

// A page may be written by a newer version, or by nobody in his right mind.
TEST(RankWords, UnknownNumbersStillGiveText) {
  EXPECT_EQ(PhaseText(77), "phase 77");
  EXPECT_EQ(PartOfPhase(77), PhasePart::kNone);
  EXPECT_EQ(CollectiveText(1, 99, -5, 2), "#1 operation 99");
  EXPECT_EQ(UnitText(-1, 2), "");
  EXPECT_EQ(UnitText(4, 2), "block.0.experts");
  EXPECT_EQ(UnitText(5, 2), "block.1.experts");
  EXPECT_EQ(UnitText(6, 2), "");
  EXPECT_EQ(UnitText(0, 2), "embedding");
  EXPECT_EQ(UnitText(3, 2), "head");
  EXPECT_LE(PhaseCount(), 16u) << "the page has room for sixteen";
}

}  // namespace
}  // namespace heddle
