// The three products of a linear layer, every table against sums in double: sizes with and without
// tails, strides, the bits of one row among others, memory around results.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "base/status/status.h"
#include "kernels/linear/params.h"
#include "kernels/linear/reference.h"

namespace heddle::kernels::linear {
namespace {

struct Sizes {
  int64_t rows, in, out;
};

std::string NameOf(const Sizes& s) { return Str(s.rows, " rows, ", s.in, " in, ", s.out, " out"); }

// Tails of rows, depth and width; more rows than a chunk of a weight gradient.
std::vector<Sizes> AllSizes() {
  return {{1, 32, 32},   {1, 64, 96},    {2, 256, 344},  {7, 172, 256},  {15, 96, 64},
          {16, 32, 32},  {17, 64, 33},   {31, 31, 31},   {32, 128, 64},  {33, 256, 344},
          {48, 512, 64}, {100, 172, 40}, {256, 96, 128}, {3, 1, 1},      {1, 2, 65},
          {64, 64, 16},  {1100, 40, 72}, {2080, 32, 64}, {40, 72, 1100}, {5, 1060, 40},
          {70, 33, 1024}};
}

float FloatOf(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

constexpr uint16_t kNan = 0x7fc0;

// Rows of `width` random halves, `stride` apart; NaN between them, which must never be read.
std::vector<uint16_t> Halves(int64_t rows, int64_t width, int64_t stride, const std::string& name) {
  const Rng rng = Rng(11, "linear").Child(name);
  std::vector<uint16_t> out(static_cast<size_t>(rows * stride), kNan);
  for (int64_t i = 0; i < rows * stride; ++i) {
    if (i % stride >= width) continue;
    const float value = static_cast<float>(rng.NormalAt(static_cast<uint64_t>(i)));
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    out[static_cast<size_t>(i)] = static_cast<uint16_t>(bits >> 16);
  }
  return out;
}

template <typename Product>
void Compute(void (*run)(const Product&, void*), const Product& p) {
  // Contents of the workspace must not matter, nor memory behind it change.
  const auto bytes = static_cast<size_t>(WorkspaceBytes(p));
  std::vector<uint16_t> memory(bytes / 2 + 64, kNan);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  const size_t skip = (64 - address % 64) % 64 / 2;
  run(p, memory.data() + skip);
  for (size_t i = skip + bytes / 2; i < memory.size(); ++i) ASSERT_EQ(memory[i], kNan);
}

// One problem with its operands; x, dy and the weight have strides of their own.
struct Problem {
  explicit Problem(const Sizes& sizes)
      : s(sizes),
        in_stride(s.in + 5),
        out_stride(s.out + 3),
        x(Halves(s.rows, s.in, in_stride, "x")),
        dy(Halves(s.rows, s.out, out_stride, "dy")),
        weight(Halves(s.out, s.in, in_stride, "weight")) {}

  std::vector<uint16_t> ForwardOf(const Table& table) const {
    std::vector<uint16_t> y(static_cast<size_t>(s.rows * out_stride), kNan);
    Compute(table.forward, Forward{s.rows, s.in, s.out, x.data(), in_stride, weight.data(),
                                   in_stride, y.data(), out_stride});
    return y;
  }
  std::vector<uint16_t> InputGradientOf(const Table& table) const {
    std::vector<uint16_t> dx(static_cast<size_t>(s.rows * in_stride), kNan);
    Compute(table.input_gradient, InputGradient{s.rows, s.in, s.out, dy.data(), out_stride,
                                                weight.data(), in_stride, dx.data(), in_stride});
    return dx;
  }
  std::vector<float> WeightGradientOf(const Table& table) const {
    std::vector<float> gradient(static_cast<size_t>(s.out * in_stride), 0.5f);
    Compute(table.weight_gradient, WeightGradient{s.rows, s.in, s.out, dy.data(), out_stride,
                                                  x.data(), in_stride, gradient.data(), in_stride});
    return gradient;
  }

  Sizes s;
  int64_t in_stride, out_stride;
  std::vector<uint16_t> x, dy, weight;
};

// Largest error of [rows, width] halves as a share of what rounding to bf16 and the sums allow.
double WorstHalf(const std::vector<uint16_t>& got, int64_t rows, int64_t width, int64_t stride,
                 const std::vector<double>& sums, const std::vector<double>& magnitudes) {
  double worst = 0;
  for (int64_t i = 0; i < rows * stride; ++i) {
    const uint16_t bits = got[static_cast<size_t>(i)];
    if (i % stride >= width) {
      EXPECT_EQ(bits, kNan) << "written between rows";
      continue;
    }
    const auto at = static_cast<size_t>(i / stride * width + i % stride);
    const double allowed = std::abs(sums[at]) / 256 + 2e-6 * magnitudes[at] + 1e-37;
    const double error = std::abs(double{FloatOf(bits)} - sums[at]) / allowed;
    worst = error <= worst ? worst : error;  // NaN is kept
  }
  return worst;
}

class EveryTable : public testing::TestWithParam<Sizes> {
 protected:
  template <typename Check>
  static void ForTables(const Check& check) {
    NamedTable tables[5];
    const int count = AvailableTables(tables);
    ASSERT_GE(count, 1);
    for (int i = 0; i < count; ++i) {
      SCOPED_TRACE(Str(tables[i].name, ": ", NameOf(GetParam())));
      check(*tables[i].table);
    }
  }
};

TEST_P(EveryTable, ForwardGivesTheSums) {
  const Problem problem(GetParam());
  const Sizes& s = problem.s;
  std::vector<double> sums(static_cast<size_t>(s.rows * s.out));
  std::vector<double> sizes = sums;
  ReferenceForward({s.rows, s.in, s.out, problem.x.data(), problem.in_stride, problem.weight.data(),
                    problem.in_stride, nullptr, 0},
                   sums.data(), sizes.data());
  ForTables([&](const Table& table) {
    EXPECT_LE(WorstHalf(problem.ForwardOf(table), s.rows, s.out, problem.out_stride, sums, sizes),
              1);
  });
}

TEST_P(EveryTable, InputGradientGivesTheSums) {
  const Problem problem(GetParam());
  const Sizes& s = problem.s;
  std::vector<double> sums(static_cast<size_t>(s.rows * s.in));
  std::vector<double> sizes = sums;
  ReferenceInputGradient({s.rows, s.in, s.out, problem.dy.data(), problem.out_stride,
                          problem.weight.data(), problem.in_stride, nullptr, 0},
                         sums.data(), sizes.data());
  ForTables([&](const Table& table) {
    EXPECT_LE(
        WorstHalf(problem.InputGradientOf(table), s.rows, s.in, problem.in_stride, sums, sizes), 1);
  });
}

TEST_P(EveryTable, WeightGradientAddsTheSums) {
  const Problem problem(GetParam());
  const Sizes& s = problem.s;
  std::vector<double> sums(static_cast<size_t>(s.out * s.in));
  std::vector<double> sizes = sums;
  ReferenceWeightGradient({s.rows, s.in, s.out, problem.dy.data(), problem.out_stride,
                           problem.x.data(), problem.in_stride, nullptr, 0},
                          sums.data(), sizes.data());
  ForTables([&](const Table& table) {
    const std::vector<float> got = problem.WeightGradientOf(table);
    double worst = 0;
    for (int64_t i = 0; i < s.out * problem.in_stride; ++i) {
      const double value = got[static_cast<size_t>(i)];
      if (i % problem.in_stride >= s.in) {
        EXPECT_EQ(value, 0.5) << "written between rows";
        continue;
      }
      const auto at = static_cast<size_t>(i / problem.in_stride * s.in + i % problem.in_stride);
      const double error = std::abs(value - 0.5 - sums[at]) / (sizes[at] + 0.5);
      worst = error <= worst ? worst : error;
    }
    EXPECT_LE(worst, 2e-6);
  });
}

// What a decode of one row gives is what it gives within any batch.
TEST_P(EveryTable, ARowHasTheSameBitsAmongAnyOthers) {
  const Problem problem(GetParam());
  const Sizes& s = problem.s;
  ForTables([&](const Table& table) {
    const std::vector<uint16_t> y = problem.ForwardOf(table);
    const std::vector<uint16_t> dx = problem.InputGradientOf(table);
    for (const int64_t row : {int64_t{0}, s.rows / 2, s.rows - 1}) {
      std::vector<uint16_t> one(static_cast<size_t>(s.out));
      Compute(table.forward,
              Forward{1, s.in, s.out, problem.x.data() + row * problem.in_stride, s.in,
                      problem.weight.data(), problem.in_stride, one.data(), s.out});
      EXPECT_EQ(std::memcmp(one.data(), y.data() + row * problem.out_stride, one.size() * 2), 0);
      one.resize(static_cast<size_t>(s.in));
      Compute(table.input_gradient,
              InputGradient{1, s.in, s.out, problem.dy.data() + row * problem.out_stride, s.out,
                            problem.weight.data(), problem.in_stride, one.data(), s.in});
      EXPECT_EQ(std::memcmp(one.data(), dx.data() + row * problem.in_stride, one.size() * 2), 0);
    }
  });
}

// A NaN reaches its own row and nothing else.
TEST_P(EveryTable, NanStaysInItsRow) {
  Problem problem(GetParam());
  const Sizes& s = problem.s;
  ForTables([&](const Table& table) {
    const std::vector<uint16_t> before = problem.ForwardOf(table);
    const auto at = static_cast<size_t>(s.rows / 2 * problem.in_stride + s.in / 2);
    const uint16_t value = problem.x[at];
    problem.x[at] = kNan;
    const std::vector<uint16_t> y = problem.ForwardOf(table);
    problem.x[at] = value;
    for (int64_t i = 0; i < s.rows * problem.out_stride; ++i) {
      const auto index = static_cast<size_t>(i);
      if (i / problem.out_stride == s.rows / 2) {
        EXPECT_TRUE(std::isnan(FloatOf(y[index])));
      } else {
        EXPECT_EQ(y[index], before[index]);
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Linear, EveryTable, testing::ValuesIn(AllSizes()),
                         [](const testing::TestParamInfo<Sizes>& info) {
                           return Str(info.param.rows, "_", info.param.in, "_", info.param.out);
                         });

TEST(Linear, NoRowsAndNoDepth) {
  NamedTable tables[5];
  const int count = AvailableTables(tables);
  for (int i = 0; i < count; ++i) {
    const Problem nothing({0, 64, 64});
    EXPECT_TRUE(nothing.ForwardOf(*tables[i].table).empty());
    for (const float g : nothing.WeightGradientOf(*tables[i].table)) ASSERT_EQ(g, 0.5f);
    const Problem flat({2, 0, 3});
    const std::vector<uint16_t> y = flat.ForwardOf(*tables[i].table);
    for (int o = 0; o < 3; ++o) EXPECT_EQ(y[static_cast<size_t>(o)], 0);
  }
}

}  // namespace
}  // namespace heddle::kernels::linear
