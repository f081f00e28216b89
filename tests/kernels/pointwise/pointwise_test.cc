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
    const size_t count = static_cast<size_t>(kRows * width), w = static_cast<size_t>(width);
    // Far from zero, so that a mean or a variance over the padding lanes would show.
    auto x = Values(kRows * width, 0.1);
    for (double& v : x) v = FromBits(ToBits(static_cast<float>(v + 3.0)));
    const auto dy = Values(kRows * width, 0.7), residual = Values(kRows * width, 2.2);
    const auto gain = Values(width, 1.3), bias = Values(width, 0.3);
    std::vector<double> y(count), rstd(kRows), dx(count), dgain(w, 0.5), dbias(w, 0.25);
    reference_.layer_norm_forward(
        {width, 1e-2, x.data(), gain.data(), bias.data(), y.data(), rstd.data()}, {0, kRows});
    LayerNormBackward p{width,           x.data(),  gain.data(),  rstd.data(), dy.data(),
                        residual.data(), dx.data(), dgain.data(), dbias.data()};
    reference_.layer_norm_backward(p, {0, kRows});
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed tx(e, x), tg(e, gain), tb(e, bias), tdy(e, dy), tr(e, residual), ty(e, y);
      std::vector<float> trstd(kRows), tdgain(w, 0.5f), tdbias(w, 0.25f);
      for (const RowRange rows : {RowRange{0, 2}, RowRange{2, kRows}}) {
        table.layer_norm_forward(
            {width, 1e-2, tx.data(), tg.data(), tb.data(), ty.data(), trstd.data()}, rows);
      }
      ExpectClose(ty, y, count, tolerance);
      ExpectClose(trstd, rstd, kRows, 1e-5);
      // In place of dy.
      LayerNormBackward q{width,     tx.data(),  tg.data(),     trstd.data(), tdy.data(),
                          tr.data(), tdy.data(), tdgain.data(), tdbias.data()};
      table.layer_norm_backward(q, {0, kRows});
      ExpectClose(tdy, dx, count, 4 * tolerance);
      ExpectClose(tdgain, dgain, w, 1e-4);
      ExpectClose(tdbias, dbias, w, 1e-5);
    });
  }
}

TEST_F(Pointwise, DytForwardAndBackward) {
  for (const int64_t width : kWidths) {
    const size_t count = static_cast<size_t>(kRows * width), w = static_cast<size_t>(width);
    const auto x = Values(kRows * width, 0.1, 8.0), dy = Values(kRows * width, 0.7);
    const auto gain = Values(width, 1.3), bias = Values(width, 0.3);
    const auto residual = Values(kRows * width, 2.2);
    const std::vector<double> alpha = {0.5};
    std::vector<double> y(count), dx(count), dalpha = {0.125}, dgain(w, 0.5), dbias(w, 0.25);
    reference_.dyt_forward({width, x.data(), alpha.data(), gain.data(), bias.data(), y.data()},
                           {0, kRows});
    DytBackward p{width,           x.data(),  alpha.data(),  gain.data(),  dy.data(),
                  residual.data(), dx.data(), dalpha.data(), dgain.data(), dbias.data()};
    reference_.dyt_backward(p, {0, kRows});
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed tx(e, x), ta(e, alpha), tg(e, gain), tb(e, bias), tdy(e, dy), tr(e, residual);
      Typed ty(e, y);
      std::vector<float> tdalpha = {0.125f}, tdgain(w, 0.5f), tdbias(w, 0.25f);
      table.dyt_forward({width, tx.data(), ta.data(), tg.data(), tb.data(), ty.data()}, {0, kRows});
      ExpectClose(ty, y, count, tolerance);
      DytBackward q{width,     tx.data(),  ta.data(),      tg.data(),     tdy.data(),
                    tr.data(), tdy.data(), tdalpha.data(), tdgain.data(), tdbias.data()};
      table.dyt_backward(q, {0, kRows});
      ExpectClose(tdy, dx, count, tolerance);
      ExpectClose(tdalpha, dalpha, 1, 1e-4);
      ExpectClose(tdgain, dgain, w, 1e-4);
      ExpectClose(tdbias, dbias, w, 1e-5);
    });
  }
}

// The tails matter: tanh near 0 and gelu far below 0 are small numbers, not zero.
TEST_F(Pointwise, TanhAndGeluKeepRelativePrecision) {
  NamedTable tables[4];
  const int count = AvailableTables(Element::kFloat32, tables);
  std::vector<float> x;
  for (int i = -1200; i <= 1200; ++i) x.push_back(0.01f * static_cast<float>(i) + 1e-4f);
  const int64_t width = static_cast<int64_t>(x.size());
  const std::vector<float> one(x.size(), 1.0f), zero(x.size(), 0.0f);
  std::vector<float> y(x.size());
  for (int t = 0; t < count; ++t) {
    SCOPED_TRACE(tables[t].name);
    tables[t].table->dyt_forward({width, x.data(), one.data(), one.data(), zero.data(), y.data()},
                                 {0, 1});
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_NEAR(y[i] / std::tanh(static_cast<double>(x[i])), 1.0, 4e-7) << x[i];
    }
    tables[t].table->gelu_forward({width, x.data(), y.data()}, {0, 1});
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i];
      ASSERT_NEAR(y[i] / (0.5 * v * std::erfc(-v / std::sqrt(2.0))), 1.0, 3e-5) << x[i];
    }
  }
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

// With row weights w the gradients are w times those of dL/d(w f), and row_dot is dL/dw.
TEST_F(Pointwise, SwigluBackwardWithRowWeights) {
  for (const int64_t width : kWidths) {
    const size_t count = static_cast<size_t>(kRows * width);
    const auto gate_up = Values(2 * kRows * width, 0.2, 9.0), d = Values(kRows * width, 0.9);
    const std::vector<double> weight = {0.5, 0.0, 2.0, -1.0, 0.25};
    std::vector<double> plain_gu = gate_up, plain_out = d, gu = gate_up, out = d, dot(kRows);
    reference_.swiglu_backward({width, plain_gu.data(), plain_out.data()}, {0, kRows});
    reference_.swiglu_backward({width, gu.data(), out.data(), weight.data(), dot.data()},
                               {0, kRows});
    for (size_t row = 0; row < kRows; ++row) {
      double expected = 0;
      for (size_t i = row * count / kRows; i < (row + 1) * count / kRows; ++i) {
        expected += d[i] * plain_out[i];
        ASSERT_NEAR(out[i], weight[row] * plain_out[i], 1e-12);
      }
      ASSERT_NEAR(dot[row], expected, 1e-10);
      for (size_t i = row * 2 * count / kRows; i < (row + 1) * 2 * count / kRows; ++i) {
        ASSERT_NEAR(gu[i], weight[row] * plain_gu[i], 1e-12);
      }
    }
    ForTables([&](const Table& table, Element e, double tolerance) {
      Typed tgu(e, gate_up), td(e, d);
      const std::vector<float> tweight = Floats(weight);
      std::vector<float> tdot(kRows);
      table.swiglu_backward({width, tgu.data(), td.data(), tweight.data(), tdot.data()},
                            {0, kRows});
      ExpectClose(tgu, gu, 2 * count, tolerance);
      ExpectClose(td, out, count, tolerance);
      ExpectClose(tdot, dot, kRows, 2e-5);
    });
  }
}

TEST_F(Pointwise, GeluAndSiluForwardAndBackward) {
  for (const bool gelu : {true, false}) {
    for (const int64_t width : kWidths) {
      const size_t count = static_cast<size_t>(kRows * width);
      const auto x = Values(kRows * width, 0.2, 5.0), d = Values(kRows * width, 0.9);
      const std::vector<double> weight = {0.5, 0.0, 2.0, -1.0, 0.25};
      const auto forward = gelu ? &Table::gelu_forward : &Table::silu_forward;
      const auto backward = gelu ? &Table::gelu_backward : &Table::silu_backward;
      std::vector<double> out(count), dx = x, again = d, wdx = x, wout = d, dot(kRows);
      (reference_.*forward)({width, x.data(), out.data()}, {0, kRows});
      (reference_.*backward)({width, dx.data(), again.data()}, {0, kRows});
      (reference_.*backward)({width, wdx.data(), wout.data(), weight.data(), dot.data()},
                             {0, kRows});
      ExpectClose(again, out, count, 1e-12);
      const size_t at = count / 2;  // of the row with weight 2
      EXPECT_NEAR(wdx[at], 2.0 * dx[at], 1e-12);
      ForTables([&](const Table& table, Element e, double tolerance) {
        Typed tx(e, x), tout(e, out), td(e, d), twx(e, x), twd(e, d);
        (table.*forward)({width, tx.data(), tout.data()}, {0, kRows});
        ExpectClose(tout, out, count, tolerance);
        (table.*backward)({width, tx.data(), td.data()}, {0, kRows});
        ExpectClose(tx, dx, count, tolerance);
        ExpectClose(td, out, count, tolerance);
        const std::vector<float> tweight = Floats(weight);
        std::vector<float> tdot(kRows);
        (table.*backward)({width, twx.data(), twd.data(), tweight.data(), tdot.data()}, {0, kRows});
        ExpectClose(twx, wdx, count, tolerance);
        ExpectClose(twd, wout, count, tolerance);
        ExpectClose(tdot, dot, kRows, 2e-5);
      });
    }
  }
}

// C5: the logit of a (row, expert) has the same bits alone and in any batch.
TEST_F(Pointwise, RouterLogitsDoNotDependOnTheBatch) {
  for (const int64_t width : kWidths) {
    for (const int64_t experts : {1, 3, 4, 9}) {
      const auto x = Values(kRows * width, 0.1), weight = Values(experts * width, 1.3);
      const size_t count = static_cast<size_t>(kRows * experts);
      std::vector<double> logits(count);
      reference_.router_logits({width, experts, x.data(), weight.data(), logits.data()},
                               {0, kRows});
      ForTables([&](const Table& table, Element e, double) {
        Typed tx(e, x), tw(e, weight);
        std::vector<float> whole(count), alone(count), few(count);
        const RouterLogits p{width, experts, tx.data(), tw.data(), whole.data()};
        table.router_logits(p, {0, kRows});
        ExpectClose(whole, logits, count, 2e-5);
        RouterLogits q = p;
        q.logits = alone.data();
        for (int64_t row = 0; row < kRows; ++row) table.router_logits(q, {row, row + 1});
        EXPECT_EQ(whole, alone);
        q.experts = 1;  // the first expert without the others
        q.logits = few.data();
        table.router_logits(q, {0, kRows});
        for (size_t row = 0; row < kRows; ++row) {
          EXPECT_EQ(few[row], whole[row * static_cast<size_t>(experts)]);
        }
      });
    }
  }
}

TEST_F(Pointwise, RouterWeightGradientDoesNotDependOnTheColumnSplit) {
  const int64_t width = 150;
  for (const int64_t experts : {1, 4, 7}) {
    const auto x = Values(kRows * width, 0.1), d = Values(kRows * experts, 1.3);
    const size_t count = static_cast<size_t>(experts * width);
    std::vector<double> expected(count, 1.0);
    reference_.router_weight_gradient({kRows, width, experts, d.data(), x.data(), expected.data()},
                                      {0, width});
    ForTables([&](const Table& table, Element e, double) {
      Typed tx(e, x);
      const std::vector<float> td = Floats(d);
      std::vector<float> whole(count, 1.0f), parts(count, 1.0f);
      table.router_weight_gradient({kRows, width, experts, td.data(), tx.data(), whole.data()},
                                   {0, width});
      for (const RowRange columns : {RowRange{0, 16}, RowRange{16, 96}, RowRange{96, width}}) {
        table.router_weight_gradient({kRows, width, experts, td.data(), tx.data(), parts.data()},
                                     columns);
      }
      ExpectClose(whole, expected, count, 1e-5);
      EXPECT_EQ(whole, parts);
    });
  }
}

TEST_F(Pointwise, CombineRowsAddsWhatIsThere) {
  for (const int64_t width : {1, 17, 530}) {
    const size_t count = static_cast<size_t>(kRows * width);
    const auto parts = Values(4 * width, 0.1), residual = Values(kRows * width, 0.7);
    const auto shared = Values(kRows * width, 0.9), router = Values(3 * width, 1.1);
    const auto dlogits = Values(kRows * 3, 1.7), weights = Values(kRows * 2, 0.3);
    const std::vector<int32_t> slots = {0, 1, -1, 2, 3, -1, -1, -1, 2, 0};
    for (int form = 0; form < 16; ++form) {
      SCOPED_TRACE(form);
      const auto with = [form](int bit) { return (form >> bit & 1) != 0; };
      CombineRows p;
      p.width = width;
      p.per_row = 2;
      p.slots = slots.data();
      p.experts = with(3) ? 3 : 0;
      std::vector<double> expected(count);
      const auto run = [&](const Table& table, const void* y, const void* w, const void* r,
                           const void* s, const void* d, const void* m, void* out) {
        CombineRows q = p;
        q.parts = y;
        q.weights = with(0) ? w : nullptr;
        q.residual = with(1) ? r : nullptr;
        q.shared = with(2) ? s : nullptr;
        q.dlogits = d;
        q.router = m;
        q.out = out;
        table.combine_rows(q, {0, 3});
        table.combine_rows(q, {3, kRows});
      };
      run(reference_, parts.data(), weights.data(), residual.data(), shared.data(), dlogits.data(),
          router.data(), expected.data());
      ForTables([&](const Table& table, Element e, double tolerance) {
        Typed ty(e, parts), tr(e, residual), ts(e, shared), tm(e, router);
        const std::vector<float> tw = Floats(weights), td = Floats(dlogits);
        run(table, ty.data(), tw.data(), tr.data(), ts.data(), td.data(), tm.data(), tr.data());
        ExpectClose(tr, expected, count, tolerance);
      });
    }
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
      std::vector<float> scratch(static_cast<size_t>(vocabulary));
      table.cross_entropy(
          {vocabulary, t.data(), labels.data(), got.data(), false, 1.0, scratch.data()},
          {0, kRows});
      ExpectClose(got, loss, kRows, 2e-6);
      ExpectClose(t, logits, count, 0.0);
      table.cross_entropy(
          {vocabulary, t.data(), labels.data(), got.data(), true, 0.25, scratch.data()},
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
      float scratch[32];
      table.cross_entropy({32, t.data(), &label, &loss, false, 1.0, scratch}, {0, 1});
      EXPECT_FALSE(std::isfinite(loss));
      Typed tgu(e, logits);
      Typed out(e, Values(16, 0));
      table.swiglu_forward({16, tgu.data(), out.data()}, {0, 1});
      EXPECT_FALSE(std::isfinite(out[4]));
      Typed wide(e, logits), one(e, std::vector<double>(32, 1.0)), y(e, Values(32, 0));
      float rstd = 0;
      table.layer_norm_forward({32, 1e-5, wide.data(), one.data(), one.data(), y.data(), &rstd},
                               {0, 1});
      EXPECT_FALSE(std::isfinite(y[0]));
      float routed = 0;
      table.router_logits({32, 1, wide.data(), one.data(), &routed}, {0, 1});
      EXPECT_FALSE(std::isfinite(routed));
      table.gelu_forward({32, wide.data(), y.data()}, {0, 1});
      EXPECT_FALSE(std::isfinite(y[20]));
      // tanh of infinity is 1; NaN stays.
      table.dyt_forward({32, wide.data(), one.data(), one.data(), one.data(), y.data()}, {0, 1});
      EXPECT_EQ(std::isnan(y[20]), std::isnan(bad));
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
  const auto x = Floats(Values(kRows * 40, 0.4, 3.0)), weight = Floats(Values(5 * 40, 0.1));
  std::vector<float> c(kRows * 5), d(kRows * 5), rstd(kRows);
  for (std::vector<float>* logits : {&c, &d}) {
    const Table& table = *tables[logits == &c ? 1 : 2].table;
    table.router_logits({40, 5, x.data(), weight.data(), logits->data()}, {0, kRows});
    std::vector<float>& y = logits == &c ? a : b;
    table.gelu_forward({40, x.data(), y.data()}, {0, 2});
    table.dyt_forward({40, x.data(), x.data(), weight.data(), x.data(), y.data()}, {2, 4});
    table.layer_norm_forward({40, 1e-5, x.data(), weight.data(), x.data(), y.data(), rstd.data()},
                             {4, kRows});
  }
  EXPECT_EQ(a, b);
  EXPECT_EQ(c, d);
}

}  // namespace
}  // namespace heddle::kernels::pointwise
