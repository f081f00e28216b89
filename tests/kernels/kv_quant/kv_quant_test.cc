#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/kv_quant/params.h"

namespace heddle::kernels::kv_quant {
namespace {

// Quantised rows, as a cache holds them.
struct Quantised {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
};

// One row of one group whose scale is 1, so that codes are those of the values themselves: the
// first value is the largest of the format.
std::vector<float> WithScaleOne(std::vector<float> values, Format format) {
  values.insert(values.begin(), format == Format::kE4m3 ? 448.0f : 127.0f);
  return values;
}

template <typename T, typename Function>
Quantised QuantiseRows(Function quantize, Layout layout, const std::vector<T>& x,
                       bool power_of_two = false) {
  const int64_t rows = static_cast<int64_t>(x.size()) / layout.columns;
  Quantised out;
  out.codes.resize(x.size());
  out.scales.resize(static_cast<size_t>(rows * layout.groups()));
  Quantize<T> p;
  p.layout = layout;
  p.power_of_two = power_of_two;
  p.x = x.data();
  p.x_stride = layout.columns;
  p.codes = out.codes.data();
  p.scales = out.scales.data();
  quantize(p, {0, rows});
  return out;
}

std::vector<float> Read(const Table& table, Layout layout, const Quantised& q) {
  std::vector<float> out(q.codes.size());
  Dequantize<float> p;
  p.layout = layout;
  p.codes = q.codes.data();
  p.scales = q.scales.data();
  p.out = out.data();
  p.out_stride = layout.columns;
  table.dequantize_f32(p, {0, static_cast<int64_t>(out.size()) / layout.columns});
  return out;
}

// Box and Muller over a fixed sequence: the same on every run.
std::vector<float> Gaussian(int64_t count, double scale = 1.0) {
  std::vector<float> values;
  uint64_t state = 12345;
  const auto uniform = [&] {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (static_cast<double>(state >> 11) + 0.5) / 9007199254740992.0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    values.push_back(static_cast<float>(scale * radius * std::cos(6.283185307179586 * uniform())));
  }
  return values;
}

template <typename Body>
void ForTables(const Body& body) {
  NamedTable tables[4];
  const int count = AvailableTables(tables);
  ASSERT_GE(count, 1);
  for (int i = 0; i < count; ++i) {
    SCOPED_TRACE(tables[i].name);
    body(*tables[i].table);
  }
}

TEST(KvQuant, F1All256CodesSurviveARoundTrip) {
  ForTables([](const Table& table) {
    for (int code = 0; code < 256; ++code) {
      const float value = E4m3Value(static_cast<uint8_t>(code));
      EXPECT_EQ(E4m3Of(value), code);
      if (std::isnan(value)) continue;
      const Layout layout{Format::kE4m3, 2, 2};
      const Quantised q =
          QuantiseRows(table.quantize_f32, layout, WithScaleOne({value}, Format::kE4m3));
      EXPECT_EQ(q.scales[0], 1.0f);
      EXPECT_EQ(q.codes[1], code) << value;
      EXPECT_EQ(Read(table, layout, q)[1], value);
    }
    for (int code = -127; code <= 127; ++code) {
      const Layout layout{Format::kInt8, 2, 2};
      const std::vector<float> row = WithScaleOne({static_cast<float>(code)}, Format::kInt8);
      const Quantised q = QuantiseRows(table.quantize_f32, layout, row);
      EXPECT_EQ(static_cast<int8_t>(q.codes[1]), code);
      EXPECT_EQ(Read(table, layout, q), row);
    }
  });
}

TEST(KvQuant, F2AnchorsHoldAndLargeValuesSaturate) {
  const struct {
    float value;
    int code;
  } anchors[] = {{0.0f, 0x00},    {0x1p-9f, 0x01}, {0x1p-6f, 0x08}, {1.0f, 0x38},   {1.0625f, 0x38},
                 {1.1875f, 0x3A}, {-3.3f, 0xC5},   {17.0f, 0x58},   {240.0f, 0x77}, {448.0f, 0x7E},
                 {-448.0f, 0xFE}, {-0.0f, 0x80},   {0x1p-11f, 0},   {0x1p-10f, 0},  {0x3p-10f, 2}};
  EXPECT_EQ(E4m3Value(0xC5), -3.25f);
  EXPECT_EQ(E4m3Value(0x58), 16.0f);
  for (const auto& anchor : anchors) EXPECT_EQ(E4m3Of(anchor.value), anchor.code) << anchor.value;
  EXPECT_EQ(E4m3Of(500.0f), 0x7E);  // LibTorch's cast gives NaN
  EXPECT_EQ(E4m3Of(-std::numeric_limits<float>::infinity()), 0xFE);
  EXPECT_EQ(E4m3Of(std::nanf("")), 0x7F);
  ForTables([&](const Table& table) {
    std::vector<float> values;
    for (const auto& anchor : anchors) values.push_back(anchor.value);
    const std::vector<float> row = WithScaleOne(values, Format::kE4m3);
    const int64_t columns = static_cast<int64_t>(row.size());
    const Quantised q = QuantiseRows(table.quantize_f32, {Format::kE4m3, columns, columns}, row);
    for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(q.codes[i + 1], anchors[i].code) << i;
    // Whatever its size, the largest value of a group has the largest code.
    for (const float large : {448.0f, 500.0f, 1e30f, 3e38f, 0.37f}) {
      const Layout layout{Format::kE4m3, 3, 3};
      EXPECT_EQ(QuantiseRows(table.quantize_f32, layout, std::vector<float>{0, -large, 0}).codes[1],
                0xFE);
      const Layout bytes{Format::kInt8, 3, 3};
      EXPECT_EQ(QuantiseRows(table.quantize_f32, bytes, std::vector<float>{0, large, 0}).codes[1],
                127);
    }
  });
}

TEST(KvQuant, F2ZeroRowsAndValuesThatAreNotFinite) {
  ForTables([](const Table& table) {
    const float inf = std::numeric_limits<float>::infinity();
    for (const Format format : {Format::kE4m3, Format::kInt8}) {
      const Layout layout{format, 6, 3};
      const Quantised zero = QuantiseRows(table.quantize_f32, layout, std::vector<float>(6, 0.0f));
      EXPECT_EQ(zero.scales[0], 1e-4f / (format == Format::kE4m3 ? 448.0f : 127.0f));
      EXPECT_EQ(zero.codes, std::vector<uint8_t>(6, 0));
      for (const float bad : {std::nanf(""), inf, -inf}) {
        const std::vector<float> row = {1, bad, 2, 1, 2, 3};
        const std::vector<float> back =
            Read(table, layout, QuantiseRows(table.quantize_f32, layout, row));
        for (int i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(back[static_cast<size_t>(i)]));
        EXPECT_EQ(back[5], 3.0f);  // the other head is untouched
      }
    }
  });
}

TEST(KvQuant, F3QuantisingWhatWasReadChangesNoCode) {
  ForTables([](const Table& table) {
    for (const Format format : {Format::kE4m3, Format::kInt8}) {
      for (const int64_t group : {1, 6, 16, 37, 64}) {
        const Layout layout{format, 64, group};
        for (const double scale : {1e-6, 1.0, 3e4}) {
          const Quantised once = QuantiseRows(table.quantize_f32, layout, Gaussian(64 * 50, scale));
          const Quantised twice =
              QuantiseRows(table.quantize_f32, layout, Read(table, layout, once));
          EXPECT_EQ(once.codes, twice.codes) << group << " " << scale;
        }
      }
    }
  });
}

TEST(KvQuant, F4ErrorsStayWithinTheirBounds) {
  const std::vector<float> x = Gaussian(128 * 4000);
  const auto rms = [&](const std::vector<float>& back) {
    double error = 0;
    double square = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      error += (back[i] - x[i]) * (back[i] - x[i]);
      square += x[i] * x[i];
    }
    return std::sqrt(error / square);
  };
  ForTables([&](const Table& table) {
    const Layout fp8{Format::kE4m3, 128, 128};
    const Quantised q = QuantiseRows(table.quantize_f32, fp8, x);
    const std::vector<float> back = Read(table, fp8, q);
    for (size_t i = 0; i < x.size(); ++i) {
      const float amax = q.scales[i / 128] * 448.0f;
      const float error = std::fabs(back[i] - x[i]);
      ASSERT_LE(error, amax / 28.0f * 1.0001f);
      if (std::fabs(x[i]) >= q.scales[i / 128] * 0x1p-6f) {
        ASSERT_LE(error, std::fabs(x[i]) * 0x1p-4f * 1.0001f);
      }
    }
    EXPECT_NEAR(rms(back), 0.0257, 0.0003);
    const Quantised powers = QuantiseRows(table.quantize_f32, fp8, x, /*power_of_two=*/true);
    for (const float scale : powers.scales) {
      int exponent = 0;
      ASSERT_EQ(std::frexp(scale, &exponent), 0.5f);
    }
    EXPECT_NEAR(rms(Read(table, fp8, powers)), 0.0266, 0.0003);
    const Layout bytes{Format::kInt8, 128, 128};
    const Quantised eight = QuantiseRows(table.quantize_f32, bytes, x);
    const std::vector<float> read = Read(table, bytes, eight);
    EXPECT_NEAR(rms(read), 0.0065, 0.0002);
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_LE(std::fabs(read[i] - x[i]), eight.scales[i / 128] * 0.5001f);
    }
  });
}

// K1 and K2: bits of every table are those of the reference, for odd widths and short last groups.
TEST(KvQuant, EveryInstructionSetGivesTheReferencesBits) {
  const std::vector<float> source = Gaussian(4'000, 2.0);
  std::vector<uint16_t> halves;
  std::vector<double> wide;
  for (const float value : source) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    halves.push_back(static_cast<uint16_t>(bits >> 16));
    bits &= 0xffff0000u;
    float rounded;
    std::memcpy(&rounded, &bits, sizeof(rounded));
    wide.push_back(rounded);
  }
  const std::vector<double> exact(source.begin(), source.end());
  ForTables([&](const Table& table) {
    for (const Format format : {Format::kE4m3, Format::kInt8}) {
      for (const int64_t group : {1, 7, 16, 20, 33, 50}) {
        const Layout layout{format, 50, group};
        for (const bool power : {false, true}) {
          const Quantised got = QuantiseRows(table.quantize_f32, layout, source, power);
          const Quantised want = QuantiseRows(QuantizeReference, layout, exact, power);
          ASSERT_EQ(got.codes, want.codes);
          ASSERT_EQ(got.scales, want.scales);
          const Quantised half = QuantiseRows(table.quantize_bf16, layout, halves, power);
          const Quantised half_want = QuantiseRows(QuantizeReference, layout, wide, power);
          ASSERT_EQ(half.codes, half_want.codes);
          ASSERT_EQ(half.scales, half_want.scales);
        }
      }
    }
  });
}

TEST(KvQuant, TheReferenceReadsTheSameValues) {
  const std::vector<float> x = Gaussian(10 * 7);
  ForTables([&](const Table& table) {
    for (const Format format : {Format::kE4m3, Format::kInt8}) {
      const Layout layout{format, 10, 4};
      const Quantised q = QuantiseRows(table.quantize_f32, layout, x);
      const std::vector<float> got = Read(table, layout, q);
      std::vector<double> want(x.size());
      DequantizeReference({layout, q.codes.data(), q.scales.data(), want.data(), 10}, {0, 7});
      for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(got[i], static_cast<float>(want[i]));
    }
  });
}

}  // namespace
}  // namespace heddle::kernels::kv_quant
