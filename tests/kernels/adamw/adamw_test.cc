#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "base/rng/rng.h"
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

float Wide(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Moments as bf16 and, widened, as fp32.
struct RoundedState : State {
  std::vector<uint16_t> m16, v16;
  explicit RoundedState(int64_t n) : State(n) {
    for (size_t i = 0; i < p.size(); ++i) {
      m16.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(m[i]) >> 16));
      v16.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(v[i]) >> 16));
      m[i] = Wide(m16[i]);
      v[i] = Wide(v16[i]);
    }
  }
  Params rounding(int64_t first) {
    Params out = params();
    out.m = out.v = nullptr;
    out.m_bf16 = m16.data();
    out.v_bf16 = v16.data();
    out.rounding = {.seed = 0x123456789abcdef0u, .stream = 0xfedcba9876543210u, .first = first};
    return out;
  }
};

// The sixteen bits of an element, of base/rng's generator.
uint32_t RandomOf(const Rounding& rounding, int64_t element) {
  const uint64_t place = static_cast<uint64_t>(element) % 64;
  const uint64_t block = static_cast<uint64_t>(element) / 64 * 8 + place % 32 / 4;
  const PhiloxBlock words = Philox4x32(
      {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
       static_cast<uint32_t>(rounding.stream), static_cast<uint32_t>(rounding.stream >> 32)},
      {static_cast<uint32_t>(rounding.seed), static_cast<uint32_t>(rounding.seed >> 32)});
  const uint32_t word = words[place / 32 * 2 + place % 4 / 2];
  return place % 2 == 0 ? word & 0xffffu : word >> 16;
}

uint16_t RoundedBy(uint32_t random, float value) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(value) + random) >> 16);
}

// Bf16 moments differ from fp32 ones by their rounding alone, and the rounding is Philox's of the
// element's place; everywhere, so the random bits are the same in all tables. Places beyond 2^35:
// the block's number has two words.
TEST(AdamWKernel, RoundsMomentsByThePlaceOfTheElement) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  for (const bool lion : {false, true}) {
    for (const int64_t first : {int64_t{0}, int64_t{16}, int64_t{37}, (int64_t{1} << 36) + 5}) {
      for (const int64_t n : {1, 16, 63, 64, 300}) {
        for (int k = 0; k < count; ++k) {
          const auto run = lion ? tables[k].table->lion : tables[k].table->adamw;
          RoundedState exact(n);
          RoundedState rounded(n);
          run(exact.params());
          const Params p = rounded.rounding(first);
          run(p);
          EXPECT_EQ(exact.p, rounded.p) << tables[k].name;
          EXPECT_EQ(exact.w, rounded.w) << tables[k].name;
          for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
            const uint32_t random = RandomOf(p.rounding, first + static_cast<int64_t>(i));
            ASSERT_EQ(rounded.m16[i], RoundedBy(random, exact.m[i])) << tables[k].name << ' ' << i;
            const uint16_t v = lion ? rounded.v16[i] : RoundedBy(random, exact.v[i]);
            ASSERT_EQ(rounded.v16[i], v) << tables[k].name << ' ' << i;
          }
        }
      }
    }
  }
}

TEST(AdamWKernel, Avx2AndAvx512RoundMomentsAlike) {
  NamedTable tables[4];
  if (AvailableTables(tables) < 3) GTEST_SKIP() << "needs AVX-512, and no HEDDLE_ISA below it";
  RoundedState a(1001);
  RoundedState b(1001);
  for (int step = 0; step < 3; ++step) {
    for (const bool lion : {false, true}) {
      (lion ? tables[1].table->lion : tables[1].table->adamw)(a.rounding(step));
      (lion ? tables[2].table->lion : tables[2].table->adamw)(b.rounding(step));
    }
  }
  EXPECT_EQ(a.p, b.p);
  EXPECT_EQ(a.m16, b.m16);
  EXPECT_EQ(a.v16, b.v16);
}

TEST(AdamWKernel, RoundingKeepsTheMeanAndWhatIsNotFinite) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  constexpr size_t kSize = 20'000;
  for (int k = 0; k < count; ++k) {
    RoundedState state(kSize);
    // 0.3 of the way from one bf16 value to the next, twice: m moves by beta1, v by beta2.
    state.g.assign(kSize, 0.0f);
    const float low = Wide(0x3c80);
    const float high = Wide(0x3c81);
    Params p = state.rounding(0);
    p.beta1 = (low + 0.3f * (high - low)) / low;
    p.beta2 = 1.0f;
    p.weights = nullptr;
    state.m16.assign(kSize, 0x3c80);
    state.v16.assign(kSize, 0x3c80);
    state.m16[7] = 0x7f80;  // infinity
    state.m16[8] = 0xffff;  // a NaN
    tables[k].table->adamw(p);
    size_t up = 0;
    for (size_t i = 0; i < kSize; ++i) {
      up += state.m16[i] == 0x3c81 ? 1 : 0;
      if (i == 7 || i == 8) continue;
      ASSERT_TRUE(state.m16[i] == 0x3c80 || state.m16[i] == 0x3c81) << tables[k].name;
      ASSERT_EQ(state.v16[i], 0x3c80) << tables[k].name << ": what needs no rounding stays";
    }
    EXPECT_NEAR(static_cast<double>(up) / kSize, 0.3, 0.015) << tables[k].name;
    EXPECT_EQ(state.m16[7], 0x7f80) << tables[k].name;
    EXPECT_TRUE(std::isnan(Wide(state.m16[8]))) << tables[k].name;
  }
}

TEST(AdamWKernel, MeasuresSumsAndCountsNonFiniteValues) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  for (int k = 0; k < count; ++k) {
    for (int64_t n = 1; n < 70; ++n) {
      std::vector<float> ramp;
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        ramp.push_back(static_cast<float>(i + 1));
        sum += static_cast<double>((i + 1) * (i + 1));
      }
      const Stats stats = tables[k].table->measure(ramp.data(), n);
      EXPECT_EQ(stats.sum_of_squares, sum) << tables[k].name << ' ' << n;
      EXPECT_EQ(stats.non_finite, 0) << tables[k].name << ' ' << n;
    }
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
