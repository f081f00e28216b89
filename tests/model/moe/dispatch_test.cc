#include "model/moe/dispatch.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng/rng.h"

namespace heddle::moe {
namespace {

Dispatch Build(const std::vector<int32_t>& experts, int64_t top_k, int64_t n_experts,
               int64_t capacity = INT64_MAX) {
  Dispatch d;
  BuildDispatch(experts, top_k, n_experts, capacity, &d);
  return d;
}

TEST(Dispatch, SortsByExpertAndKeepsTheOrderOfTokens) {
  const Dispatch d = Build({1, 3, 0, 1, 1, 3}, 2, 5);
  EXPECT_EQ(d.counts, (std::vector<int64_t>{1, 3, 0, 2, 0}));
  EXPECT_EQ(d.begin, (std::vector<int64_t>{0, 1, 4, 4, 6, 6}));
  EXPECT_EQ(d.row_assignment, (std::vector<int32_t>{2, 0, 3, 4, 1, 5}));
  EXPECT_EQ(d.slots, (std::vector<int32_t>{1, 4, 0, 2, 3, 5}));
  EXPECT_EQ(d.dropped, 0);
  EXPECT_EQ(d.token(3), 2);
}

TEST(Dispatch, CapacityKeepsTheEarliestTokensAndCountsTheRest) {
  const Dispatch d = Build({0, 0, 1, 0, 0, 1}, 1, 2, 2);
  EXPECT_EQ(d.slots, (std::vector<int32_t>{0, 1, 2, -1, -1, 3}));
  EXPECT_EQ(d.counts, (std::vector<int64_t>{4, 2}));
  EXPECT_EQ(d.dropped, 2);
}

TEST(Dispatch, CapacityIsTheCeilingOfTheFactorTimesTheMean) {
  EXPECT_EQ(Capacity(0, 100, 2, 8), INT64_MAX);
  EXPECT_EQ(Capacity(1, 100, 2, 8), 25);
  EXPECT_EQ(Capacity(1.25, 100, 2, 8), 32);  // 31.25
  EXPECT_EQ(Capacity(1.1, 100, 1, 10), 11);  // 11 in whole numbers, a little more in doubles
  EXPECT_EQ(Capacity(1.5, 0, 2, 8), 0);
}

// Every assignment has its own row in its expert's range; all other rows are padding at its end.
TEST(Dispatch, RangesArePaddedAtTheirEnd) {
  const Rng rng(3, "dispatch");
  for (const int64_t tokens : {0, 1, 15, 16, 17, 700, 5000}) {
    std::vector<int32_t> experts;
    for (int64_t t = 0; t < tokens; ++t) {
      experts.push_back(static_cast<int32_t>(rng.BelowAt(static_cast<uint64_t>(t), 3)));
    }
    const Dispatch d = Build(experts, 1, 4);
    EXPECT_EQ(d.counts[3], 0);
    EXPECT_EQ(d.begin[3], d.begin[4]);
    for (size_t e = 0; e < 4; ++e) {
      EXPECT_EQ(d.begin[e + 1] - d.begin[e], PaddedRows(d.counts[e]));
      for (int64_t i = 0; i < PaddedRows(d.counts[e]); ++i) {
        const int32_t a = d.row_assignment[static_cast<size_t>(d.begin[e] + i)];
        ASSERT_EQ(a >= 0, i < d.counts[e]);
        if (a >= 0) {
          ASSERT_EQ(d.slots[static_cast<size_t>(a)], d.begin[e] + i);
          ASSERT_EQ(experts[static_cast<size_t>(a)], static_cast<int32_t>(e));
        }
      }
    }
  }
}

TEST(Dispatch, PaddingIsSmallAndTakesFewValues) {
  int64_t values = 0, last = -1;
  for (int64_t rows = 0; rows <= 4096; ++rows) {
    const int64_t padded = PaddedRows(rows);
    ASSERT_GE(padded, rows);
    ASSERT_LE(padded, rows + std::max<int64_t>(15, rows / 16));
    ASSERT_GE(padded, last);
    values += padded != last;
    last = padded;
  }
  EXPECT_LT(values, 110);
}

TEST(Dispatch, AllRowsIsTheIdentity) {
  const Dispatch d = AllRows(7);
  EXPECT_TRUE(d.identity());
  EXPECT_EQ(d.rows(), 7);
  EXPECT_EQ(d.token(4), 4);
}

}  // namespace
}  // namespace heddle::moe
