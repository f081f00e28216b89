#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/pointwise/params.h"

namespace heddle::kernels::pointwise {
namespace {

// Every table that this machine can run, on f32 and bf16, against the double reference. Inputs are
// values that bf16 holds exactly, so that only arithmetic and the rounding of results differ.

float FromBits(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
uint16_t ToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::vector<double> Values(int64_t count, double phase, double scale = 2.0) {
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(FromBits(ToBits(static_cast<float>(scale * std::sin(0.7 * i * i + phase)))));
  }
  return values;
}

// A tensor in the element type of a table.
struct Typed {
  Element element;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Typed(Element e, const std::vector<double>& values) : element(e) {
    for (const double v : values) {
      floats.push_back(static_cast<float>(v));
      halves.push_back(ToBits(static_cast<float>(v)));
    }
  }
  void* data() {
    return element == Element::kBFloat16 ? static_cast<void*>(halves.data()) : floats.data();
  }
  double operator[](size_t i) const {
    return element == Element::kBFloat16 ? FromBits(halves[i]) : floats[i];
  }
};

std::vector<float> Floats(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

class Pointwise : public testing::Test {
 protected:
  // Calls body(table, element, tolerance) for every table.
  template <typename Body>
  void ForTables(const Body& body) {
    for (const Element element : {Element::kFloat32, Element::kBFloat16}) {
      NamedTable tables[4];
      const int count = AvailableTables(element, tables);
      ASSERT_GE(count, 1);
      for (int i = 0; i < count; ++i) {
        const bool bf16 = element == Element::kBFloat16;
        SCOPED_TRACE(std::string(tables[i].name) + (bf16 ? " bf16" : " f32"));
        body(*tables[i].table, element, bf16 ? 1e-2 : 2e-5);
      }
    }
  }
  const Table& reference_ = Kernels(Element::kFloat64);
};

template <typename A, typename B>
void ExpectClose(const A& got, const B& expected, size_t count, double tolerance) {
  for (size_t i = 0; i < count; ++i) {
    ASSERT_NEAR(got[i], expected[i], tolerance * (1.0 + std::abs(expected[i]))) << "element " << i;
  }
}

// Widths around the vector length: tails must be right and nothing beyond them touched.
const int64_t kWidths[] = {1, 15, 16, 17, 40};
constexpr int64_t kRows = 5;

TEST_F(Pointwise, RmsNormForwardAndBackward) {
  for (const int64_t width : kWidths) {
    const size_t count = static_cast<size_t>(kRows * width);
    const auto x = Values(kRows * width, 0.1), dy = Values(kRows * width, 0.7);
    const auto gain = Values(width, 1.3), residual = Values(kRows * width, 2.2);
    std::vector<double> y(count), rstd(kRows), dx(count), dgain(static_cast<size_t>(width), 0.5);
    reference_.rms_norm_forward({width, 1e-5, x.data(), gain.data(), y.data(), rstd.data()},
                                {0, kRows});
    reference_.rms_norm_backward({width, x.data(), gain.data(), rstd.data(), dy.data(),
                                  residual.data(), dx.data(), dgain.data()},
                                 {0, kRows});
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed tx(e, x), tg(e, gain), tdy(e, dy), tr(e, residual), ty(e, y), tdx(e, dx);
      std::vector<float> trstd(kRows), tdgain(static_cast<size_t>(width), 0.5f);
      table.rms_norm_forward({width, 1e-5, tx.data(), tg.data(), ty.data(), trstd.data()}, {0, 2});
      table.rms_norm_forward({width, 1e-5, tx.data(), tg.data(), ty.data(), trstd.data()},
                             {2, kRows});
      ExpectClose(ty, y, count, tolerance);
      ExpectClose(trstd, rstd, kRows, 1e-5);
      table.rms_norm_backward({width, tx.data(), tg.data(), trstd.data(), tdy.data(), tr.data(),
                               tdx.data(), tdgain.data()},
                              {0, kRows});
      ExpectClose(tdx, dx, count, tolerance);
      ExpectClose(tdgain, dgain, static_cast<size_t>(width), 1e-4);
    });
  }
}

TEST_F(Pointwise, LayerNormForwardAndBackward) {
  for (const int64_t width : kWidths) {
    const size_t count = static_cast<size_t>(kRows * width);
    const size_t columns = static_cast<size_t>(width);
    const auto x = Values(kRows * width, 0.1), dy = Values(kRows * width, 0.7);
    const auto gain = Values(width, 1.3), bias = Values(width, 0.4);
    const auto residual = Values(kRows * width, 2.2);
    // A width of one has no variance: its rows are the bias.
    const double eps = width == 1 ? 1.0 : 1e-5;
    std::vector<double> y(count), mean(kRows), rstd(kRows), dx(count);
    std::vector<double> dgain(columns, 0.5), dbias(columns, -0.25);
    reference_.layer_norm_forward(
        {width, eps, x.data(), gain.data(), bias.data(), y.data(), mean.data(), rstd.data()},
        {0, kRows});
    reference_.layer_norm_backward(
        {width, x.data(), gain.data(), mean.data(), rstd.data(), dy.data(), residual.data(),
         dx.data(), dgain.data(), dbias.data()},
        {0, kRows});
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed tx(e, x), tg(e, gain), tb(e, bias), tdy(e, dy), tr(e, residual), ty(e, y), tdx(e, dx);
      std::vector<float> tmean(kRows), trstd(kRows), tdgain(columns, 0.5f);
      std::vector<float> tdbias(columns, -0.25f);
      const LayerNormForward f{width,     eps,       tx.data(),    tg.data(),
                               tb.data(), ty.data(), tmean.data(), trstd.data()};
      table.layer_norm_forward(f, {0, 2});
      table.layer_norm_forward(f, {2, kRows});
      ExpectClose(ty, y, count, tolerance);
      ExpectClose(tmean, mean, kRows, 1e-6);
      ExpectClose(trstd, rstd, kRows, 1e-5);
      table.layer_norm_backward({width, tx.data(), tg.data(), tmean.data(), trstd.data(),
                                 tdy.data(), tr.data(), tdx.data(), tdgain.data(), tdbias.data()},
                                {0, kRows});
      ExpectClose(tdx, dx, count, tolerance);
      ExpectClose(tdgain, dgain, columns, 1e-4);
      ExpectClose(tdbias, dbias, columns, 1e-4);
    });
  }
}

// The reference's own gradients, by central differences.
TEST_F(Pointwise, LayerNormReferenceHasItsGradient) {
  const int64_t width = 7;
  auto x = Values(width, 0.1), gain = Values(width, 1.3), bias = Values(width, 0.4);
  const auto dy = Values(width, 0.7);
  const auto loss = [&] {
    std::vector<double> y(static_cast<size_t>(width));
    double mean = 0, rstd = 0, sum = 0;
    reference_.layer_norm_forward(
        {width, 1e-5, x.data(), gain.data(), bias.data(), y.data(), &mean, &rstd}, {0, 1});
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
    return sum;
  };
  std::vector<double> y(7), dx(7), dgain(7), dbias(7);
  double mean = 0, rstd = 0;
  reference_.layer_norm_forward(
      {width, 1e-5, x.data(), gain.data(), bias.data(), y.data(), &mean, &rstd}, {0, 1});
  reference_.layer_norm_backward({width, x.data(), gain.data(), &mean, &rstd, dy.data(), nullptr,
                                  dx.data(), dgain.data(), dbias.data()},
                                 {0, 1});
  const auto check = [&](std::vector<double>* values, const std::vector<double>& gradient) {
    for (size_t i = 0; i < values->size(); ++i) {
      const double kept = (*values)[i];
      (*values)[i] = kept + 1e-6;
      const double up = loss();
      (*values)[i] = kept - 1e-6;
      const double down = loss();
      (*values)[i] = kept;
      EXPECT_NEAR((up - down) / 2e-6, gradient[i], 1e-7) << "element " << i;
    }
  };
  check(&x, dx);
  check(&gain, dgain);
  check(&bias, dbias);
}

TEST_F(Pointwise, RopeBothLayoutsAndTheirInverse) {
  for (const bool interleaved : {false, true}) {
    for (const int64_t dim : {2, 6, 32, 36}) {
      const int64_t stride = 3 * dim + 5;
      const auto x = Values(kRows * stride, 0.4);
      const int32_t positions[kRows] = {0, 3, 1, 2, 3};
      std::vector<double> cosine, sine;
      for (int64_t i = 0; i < 4 * dim / 2; ++i) {
        cosine.push_back(std::cos(0.3 * i));
        sine.push_back(std::sin(0.3 * i));
      }
      const auto fcos = Floats(cosine), fsin = Floats(sine);
      Rope p;
      p.heads = 3;
      p.head_dim = dim;
      p.interleaved = interleaved;
      p.positions = positions;
      p.from_row = p.to_row = stride;
      p.from_head = p.to_head = dim;
      std::vector<double> expected = x;
      p.cosine = cosine.data();
      p.sine = sine.data();
      p.from = p.to = expected.data();
      reference_.rope(p, {0, kRows});
      EXPECT_EQ(expected[static_cast<size_t>(3 * dim)], x[static_cast<size_t>(3 * dim)]);
      ForTables([&](const Table& table, Element e, double tolerance) {
        Typed t(e, x);
        Rope q = p;
        q.cosine = fcos.data();
        q.sine = fsin.data();
        q.from = q.to = t.data();
        table.rope(q, {0, kRows});
        ExpectClose(t, expected, x.size(), tolerance);
        q.inverse = true;
        table.rope(q, {0, kRows});
        ExpectClose(t, x, x.size(), 2 * tolerance);
      });
    }
  }
}

TEST_F(Pointwise, SwigluForwardAndBackward) {
  for (const int64_t width : kWidths) {
    const size_t count = static_cast<size_t>(kRows * width);
    const auto gate_up = Values(2 * kRows * width, 0.2, 9.0), d = Values(kRows * width, 0.9);
    std::vector<double> out(count), dgu = gate_up, again = d;
    reference_.swiglu_forward({width, gate_up.data(), out.data()}, {0, kRows});
    reference_.swiglu_backward({width, dgu.data(), again.data()}, {0, kRows});
    ExpectClose(again, out, count, 1e-12);
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed tgu(e, gate_up), tout(e, out), td(e, d);
      table.swiglu_forward({width, tgu.data(), tout.data()}, {0, kRows});
      ExpectClose(tout, out, count, tolerance);
      table.swiglu_backward({width, tgu.data(), td.data()}, {0, kRows});
      ExpectClose(tgu, dgu, 2 * count, tolerance);
      ExpectClose(td, out, count, tolerance);
    });
  }
}

TEST_F(Pointwise, CrossEntropyLossAndGradient) {
  for (const int64_t vocabulary : {1, 7, 16, 37, 64}) {
    const size_t count = static_cast<size_t>(kRows * vocabulary);
    const auto logits = Values(kRows * vocabulary, 0.3, 30.0);
    std::vector<int32_t> labels = {0, -1, static_cast<int32_t>(vocabulary - 1), 0, -100};
    std::vector<double> expected = logits, loss(kRows);
    reference_.cross_entropy({vocabulary, expected.data(), labels.data(), loss.data(), true, 0.25},
                             {0, kRows});
    EXPECT_EQ(loss[1], 0.0);
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed t(e, logits);
      std::vector<double> got(kRows, -1.0);
      table.cross_entropy({vocabulary, t.data(), labels.data(), got.data(), false, 1.0},
                          {0, kRows});
      ExpectClose(got, loss, kRows, 2e-6);
      ExpectClose(t, logits, count, 0.0);
      table.cross_entropy({vocabulary, t.data(), labels.data(), got.data(), true, 0.25},
                          {0, kRows});
      ExpectClose(t, expected, count, tolerance);
    });
  }
}

TEST_F(Pointwise, NanAndInfinityAreNotHidden) {
  ForTables([&](const Table& table, Element e, double) {
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      auto logits = Values(32, 0.3);
      logits[20] = bad;
      Typed t(e, logits);
      const int32_t label = 3;
      double loss = 0;
      table.cross_entropy({32, t.data(), &label, &loss, false, 1.0}, {0, 1});
      EXPECT_FALSE(std::isfinite(loss));
      Typed tgu(e, logits);
      Typed out(e, Values(16, 0));
      table.swiglu_forward({16, tgu.data(), out.data()}, {0, 1});
      EXPECT_FALSE(std::isfinite(out[4]));
    }
  });
}

TEST_F(Pointwise, EmbeddingGradientAddsRepeatedIds) {
  const int64_t width = 21;
  const std::vector<int32_t> ids = {2, 0, 2, 2, 1};
  const auto gradient = Values(kRows * width, 0.5);
  std::vector<double> table(3 * width, 1.0);
  reference_.embedding_backward({kRows, width, ids.data(), gradient.data(), table.data()},
                                {0, width});
  ForTables([&](const Table& kernels, Element e, double) {
    Typed t(e, gradient);
    std::vector<float> got(3 * width, 1.0f);
    kernels.embedding_backward({kRows, width, ids.data(), t.data(), got.data()}, {0, 16});
    kernels.embedding_backward({kRows, width, ids.data(), t.data(), got.data()}, {16, width});
    ExpectClose(got, table, got.size(), 1e-6);
  });
}

TEST_F(Pointwise, ConvertsToNearestEvenAndKeepsNan) {
  NamedTable tables[4];
  const int count = AvailableTables(Element::kBFloat16, tables);
  std::vector<float> from = {1.0f,         1.00390625f, 1.01171875f,
                             -1.00390625f, 3.4e38f,     0.0f,
                             -0.0f,        1e-40f,      std::numeric_limits<float>::infinity()};
  from.resize(19, 1.0f);
  from[18] = std::nanf("");
  const std::vector<uint16_t> expected = {0x3f80, 0x3f80, 0x3f82, 0xbf80, 0x7f80,
                                          0x0000, 0x8000, 0x0001, 0x7f80};
  for (int i = 0; i < count; ++i) {
    std::vector<uint16_t> to(from.size());
    tables[i].table->convert({from.data(), to.data()}, {0, static_cast<int64_t>(from.size())});
    for (size_t k = 0; k < expected.size(); ++k) EXPECT_EQ(to[k], expected[k]) << tables[i].name;
    EXPECT_TRUE(std::isnan(FromBits(to[18]))) << tables[i].name;
  }
}

// 20.11 and S49: fused multiply-add on both, the same order: the same bits.
TEST_F(Pointwise, Avx2AndAvx512GiveTheSameBits) {
  NamedTable tables[4];
  if (AvailableTables(Element::kFloat32, tables) < 3) {
    GTEST_SKIP() << "needs a processor with AVX-512, and no HEDDLE_ISA below it";
  }
  const auto gate_up = Floats(Values(2 * kRows * 40, 0.2, 9.0));
  std::vector<float> a(kRows * 40), b(kRows * 40);
  tables[1].table->swiglu_forward({40, gate_up.data(), a.data()}, {0, kRows});
  tables[2].table->swiglu_forward({40, gate_up.data(), b.data()}, {0, kRows});
  EXPECT_EQ(a, b);
}

}  // namespace
}  // namespace heddle::kernels::pointwise
