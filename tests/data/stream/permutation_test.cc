#include "data/stream/permutation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace heddle::stream {
namespace {

TEST(Permutation, HitsEveryNumberOnce) {
  for (const uint64_t n : {1u, 2u, 3u, 4u, 5u, 7u, 8u, 9u, 100u, 1023u, 1024u, 1025u, 40000u}) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      const Permutation permutation(Rng(seed, "test"), n);
      std::vector<bool> hit(n, false);
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t value = permutation.At(i);
        ASSERT_LT(value, n);
        ASSERT_FALSE(hit[value]) << n << " " << i;
        hit[value] = true;
      }
    }
  }
}

TEST(Permutation, SpreadsNeighboursEvenly) {
  // Mean distance of the images of neighbours is n / 3 for a random order.
  const uint64_t n = 100000;
  const Permutation permutation(Rng(9, "test"), n);
  double sum = 0;
  for (uint64_t i = 0; i + 1 < n; ++i) {
    sum += std::abs(static_cast<double>(permutation.At(i)) -
                    static_cast<double>(permutation.At(i + 1)));
  }
  EXPECT_NEAR(sum / static_cast<double>(n) / (static_cast<double>(n) / 3), 1, 0.02);
}

TEST(Permutation, DiffersByKeyAndNeverChanges) {
  const Permutation a(Rng(1, "test"), 1000);
  const Permutation b(Rng(2, "test"), 1000);
  int equal = 0;
  for (uint64_t i = 0; i < 1000; ++i) equal += a.At(i) == b.At(i) ? 1 : 0;
  EXPECT_LT(equal, 10);
  // The order is stored in runs: these values hold for ever.
  std::vector<uint64_t> first;
  for (uint64_t i = 0; i < 6; ++i) first.push_back(a.At(i));
  EXPECT_EQ(first, (std::vector<uint64_t>{34, 425, 356, 381, 727, 122}));
}

}  // namespace
}  // namespace heddle::stream
