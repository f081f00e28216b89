// The product of flash attention, every table against sums in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "kernels/attention/params.h"

namespace heddle::kernels::attention {
namespace {

float FloatOf(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

std::vector<uint16_t> Halves(int64_t count, const std::string& name) {
  const Rng rng = Rng(11, "pair product").Child(name);
  std::vector<uint16_t> out(static_cast<size_t>(count));
  for (size_t i = 0; i < out.size(); ++i) {
    const float value = static_cast<float>(rng.NormalAt(i));
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    out[i] = static_cast<uint16_t>(bits >> 16);
  }
  return out;
}

struct Sizes {
  int64_t rows, columns, depth;
};

// Largest difference to the sums in double, as a share of the sum of magnitudes.
double WorstError(const Table& table, const Sizes& sizes, bool add) {
  const int64_t a_stride = sizes.depth + 6;
  const int64_t c_stride = sizes.columns + 3;
  const std::vector<uint16_t> a = Halves(sizes.rows * a_stride, "a");
  const std::vector<uint16_t> b = Halves(sizes.depth * sizes.columns, "b");
  std::vector<float> c(static_cast<size_t>(sizes.rows * c_stride), 0.5f);
  table.begin();
  table.pair_product({sizes.rows, sizes.columns, sizes.depth, a.data(), a_stride, b.data(),
                      c.data(), c_stride, add});
  table.end();
  double worst = 0;
  for (int64_t i = 0; i < sizes.rows; ++i) {
    for (int64_t j = 0; j < c_stride; ++j) {
      const double got = c[static_cast<size_t>(i * c_stride + j)];
      if (j >= sizes.columns) {  // between the rows
        EXPECT_EQ(got, 0.5);
        continue;
      }
      double sum = add ? 0.5 : 0;
      double magnitude = std::abs(sum);
      for (int64_t k = 0; k < sizes.depth; ++k) {
        const size_t at = static_cast<size_t>((k / 2 * sizes.columns + j) * 2 + k % 2);
        const double term =
            double{FloatOf(a[static_cast<size_t>(i * a_stride + k)])} * double{FloatOf(b[at])};
        sum += term;
        magnitude += std::abs(term);
      }
      worst = std::max(worst, std::abs(got - sum) / magnitude);
    }
  }
  return worst;
}

TEST(PairProduct, EveryTableGivesTheSums) {
  NamedTable tables[5];
  const int count = AvailableTables(tables);
  ASSERT_GE(count, 1);
  for (int i = 0; i < count; ++i) {
    for (const Sizes& sizes : {Sizes{32, 64, 64}, Sizes{128, 64, 32}, Sizes{64, 32, 128},
                               Sizes{32, 32, 32}, Sizes{96, 64, 256}, Sizes{48, 64, 64},
                               Sizes{7, 64, 2}, Sizes{9, 32, 6}, Sizes{1, 64, 256}}) {
      for (const bool add : {false, true}) {
        EXPECT_LT(WorstError(*tables[i].table, sizes, add), 2e-6)
            << tables[i].name << " " << sizes.rows << " x " << sizes.columns << " x " << sizes.depth
            << " add " << add;
      }
    }
  }
}

}  // namespace
}  // namespace heddle::kernels::attention
