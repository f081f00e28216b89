#include "base/rng/rng.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

namespace heddle {
namespace {

// Known answers of Random123 (kat_vectors, "philox4x32 10").
TEST(Philox, GivesTheKnownAnswersOfRandom123) {
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(Philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Stored runs depend on these bits: a change here breaks every resume.
TEST(Rng, ValuesNeverChange) {
  // FNV-1a of the empty purpose is the offset basis, so the blocks can be written out.
  const Rng rng(0x0123456789abcdef, "");
  const PhiloxBlock block = Philox4x32({7, 0, 0x84222325, 0xcbf29ce4}, {0x89abcdef, 0x01234567});
  EXPECT_EQ(rng.At(14), block[0] | (uint64_t{block[1]} << 32));
  EXPECT_EQ(rng.At(15), block[2] | (uint64_t{block[3]} << 32));
  // FNV-1a("a") = af63dc4c8601ec8c, published with the hash.
  const PhiloxBlock named = Philox4x32({0, 0, 0x8601ec8c, 0xaf63dc4c}, {1, 0});
  EXPECT_EQ(Rng(1, "a").At(0), named[0] | (uint64_t{named[1]} << 32));
}

TEST(Rng, StreamsOfSeedsPurposesAndChildrenDiffer) {
  const Rng rng(1, "data.order");
  std::set<uint64_t> first = {rng.At(0),
                              Rng(2, "data.order").At(0),
                              Rng(1, "model.init").At(0),
                              rng.Child("a").At(0),
                              rng.Child("b").At(0),
                              rng.Child("a").Child("b").At(0),
                              rng.Child("ab").At(0),
                              rng.Child(0).At(0),
                              rng.Child(1).At(0)};
  EXPECT_EQ(first.size(), 9u);
  EXPECT_EQ(Rng(1, "data.order").Child(7).At(3), rng.Child(7).At(3));
}

TEST(Rng, BelowStaysBelowAndReachesEveryValue) {
  const Rng rng(3, "below");
  std::vector<int> seen(7);
  for (uint64_t i = 0; i < 7000; ++i) {
    const uint64_t value = rng.BelowAt(i, 7);
    ASSERT_LT(value, 7u);
    ++seen[value];
  }
  // 1000 expected each, standard deviation 29.
  EXPECT_GT(*std::min_element(seen.begin(), seen.end()), 850);
  EXPECT_LT(*std::max_element(seen.begin(), seen.end()), 1150);
  EXPECT_EQ(rng.BelowAt(0, 1), 0u);
}

TEST(Rng, BelowRejectsTheBiasedRest) {
  // With a bound just above 2^63 half of all draws are rejected: the retries must end and stay
  // below.
  const Rng rng(4, "below");
  const uint64_t bound = (uint64_t{1} << 63) + 1;
  int upper = 0;
  for (uint64_t i = 0; i < 2000; ++i) {
    const uint64_t value = rng.BelowAt(i, bound);
    ASSERT_LT(value, bound);
    upper += value >= bound / 2;
  }
  EXPECT_NEAR(upper, 1000, 150);
}

TEST(Rng, NormalHasTheMomentsOfTheNormalDistribution) {
  const Rng rng(5, "normal");
  const int count = 20000;
  double sum = 0;
  double squares = 0;
  double fourth = 0;
  for (int i = 0; i < count; ++i) {
    const double x = rng.NormalAt(i);
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(sum / count, 0, 0.03);
  EXPECT_NEAR(squares / count, 1, 0.05);
  EXPECT_NEAR(fourth / count, 3, 0.35);
}

TEST(Rng, UniformIsInTheHalfOpenUnitInterval) {
  RngCursor cursor(Rng(6, "uniform"), 100);
  double sum = 0;
  for (int i = 0; i < 10000; ++i) {
    const double x = cursor.Uniform();
    ASSERT_GE(x, 0);
    ASSERT_LT(x, 1);
    sum += x;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 0.02);
  EXPECT_EQ(cursor.position(), 10100u);
}

TEST(Shuffle, IsAPermutationAndReproducible) {
  std::vector<int> a(100);
  std::iota(a.begin(), a.end(), 0);
  std::vector<int> b = a;
  const std::vector<int> sorted = a;
  Shuffle(Rng(7, "shuffle"), a);
  Shuffle(Rng(7, "shuffle"), b);
  EXPECT_EQ(a, b);
  EXPECT_NE(a, sorted);
  EXPECT_TRUE(std::is_permutation(a.begin(), a.end(), sorted.begin()));
}

}  // namespace
}  // namespace heddle
