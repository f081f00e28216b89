#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/adamw/params.h"

namespace heddle::kernels::adamw {
namespace {

struct State {
  std::vector<float> p, m, v, g;
  std::vector<uint16_t> w;
  explicit State(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      p.push_back(std::sin(0.37f * static_cast<float>(i)));
      m.push_back(0.1f * std::cos(0.2f * static_cast<float>(i)));
      v.push_back(0.01f + 0.01f * std::sin(0.5f * static_cast<float>(i)));
      g.push_back(std::sin(0.9f * static_cast<float>(i)));
      w.push_back(0);
    }
  }
  Params params() {
    Params out;
    out.elements = static_cast<int64_t>(p.size());
    out.master = p.data();
    out.m = m.data();
    out.v = v.data();
    out.gradient = g.data();
    out.weights = w.data();
    out.gradient_factor = 0.5f;
    out.learning_rate = 1e-2f;
    out.weight_decay = 0.1f;
    out.beta1 = 0.9f;
    out.beta2 = 0.95f;
    out.eps = 1e-8f;
    out.bias_correction1 = 0.271f;
    out.bias_correction2_root = 0.3776f;
    return out;
  }
};

TEST(AdamWKernel, EveryTableFollowsTheFormula) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  for (const int64_t n : {1, 15, 16, 50}) {
    for (int k = 0; k < count; ++k) {
      State before(n);
      State after(n);
      tables[k].table->adamw(after.params());
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        const double g = 0.5 * before.g[i];
        const double m = 0.9 * before.m[i] + 0.1 * g;
        const double v = 0.95 * before.v[i] + 0.05 * g * g;
        const double p =
            before.p[i] * (1 - 1e-3) - 1e-2 / 0.271 * m / (std::sqrt(v) / 0.3776 + 1e-8);
        EXPECT_NEAR(after.p[i], p, 1e-6) << tables[k].name;
        EXPECT_NEAR(after.m[i], m, 1e-7);
        EXPECT_NEAR(after.v[i], v, 1e-7);
      }
    }
  }
}

TEST(AdamWKernel, LionStandsStillAtZeroAndMovesByTheSign) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  for (int k = 0; k < count; ++k) {
    State state(20);
    state.p.assign(20, 1.0f);
    state.m.assign(20, 0.0f);
    state.g.assign(20, 0.0f);
    state.g[3] = 1e-30f;
    state.g[17] = -5.0f;
    Params p = state.params();
    p.weight_decay = 0.0f;
    tables[k].table->lion(p);
    EXPECT_FLOAT_EQ(state.p[0], 1.0f);
    EXPECT_FLOAT_EQ(state.p[3], 0.99f);
    EXPECT_FLOAT_EQ(state.p[17], 1.01f);
  }
}

TEST(AdamWKernel, Avx2AndAvx512GiveTheSameBits) {
  NamedTable tables[4];
  if (AvailableTables(tables) < 3) GTEST_SKIP() << "needs AVX-512, and no HEDDLE_ISA below it";
  State a(1001);
  State b(1001);
  for (int step = 0; step < 3; ++step) {
    tables[1].table->adamw(a.params());
    tables[2].table->adamw(b.params());
  }
  EXPECT_EQ(a.p, b.p);
  EXPECT_EQ(a.m, b.m);
  EXPECT_EQ(a.v, b.v);
  EXPECT_EQ(a.w, b.w);
}

TEST(AdamWKernel, MeasuresSumsAndCountsNonFiniteValues) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  for (int k = 0; k < count; ++k) {
    std::vector<float> values(37, 2.0f);
    EXPECT_EQ(tables[k].table->measure(values.data(), 37).sum_of_squares, 148.0);
    values[36] = std::numeric_limits<float>::infinity();
    values[5] = std::nanf("");
    const Stats stats = tables[k].table->measure(values.data(), 37);
    EXPECT_EQ(stats.non_finite, 2) << tables[k].name;
    EXPECT_EQ(stats.sum_of_squares, 140.0);
  }
}

}  // namespace
}  // namespace heddle::kernels::adamw
