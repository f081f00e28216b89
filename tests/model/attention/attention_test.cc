#include "model/attention/attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <string>

#include "heddle/v1/config.pb.h"
#include "kernels/attention/reference.h"
#include "model/inference/kv_cache.h"
#include "model/layers/layers.h"
#include "model/layers/rope.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using kernels::attention::Shape;
using model_test::Gen;
using model_test::Summarize;
using model_test::Summary;
using model_test::SwapHeads;

constexpr int64_t kHeads = 4;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kDim = 8;
const double kScale = 1.0 / std::sqrt(8.0);

struct Mechanism {
  std::string name;
  int64_t window = 0;
  int64_t sinks = 0;
};

std::unique_ptr<AttentionCore> Make(const Mechanism& mechanism) {
  if (mechanism.window == 0) return MakeDense(kScale);
  return MakeSlidingWindow(kScale, {mechanism.window, mechanism.sinks});
}

at::Tensor ToTensor(const std::vector<double>& values, int64_t heads, at::ScalarType type) {
  at::Tensor out =
      at::empty({static_cast<int64_t>(values.size()) / heads / kDim, heads, kDim}, at::kDouble);
  std::copy(values.begin(), values.end(), out.data_ptr<double>());
  return out.to(type);
}

std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel()};
}

struct Inputs {
  std::vector<double> q, k, v, dout;  // [N, heads, D]
};

Inputs RandomInputs(int64_t rows) {
  return {Gen(rows * kHeads * kDim, 0.3), Gen(rows * kKvHeads * kDim, 1.1),
          Gen(rows * kKvHeads * kDim, 2.0), Gen(rows * kHeads * kDim, 0.9)};
}

struct Outputs {
  std::vector<double> out, dq, dk, dv;
};

Outputs RunCore(AttentionCore* core, const std::vector<int32_t>& cu, const Inputs& in,
                at::ScalarType type) {
  const at::Tensor q = ToTensor(in.q, kHeads, type);
  const at::Tensor k = ToTensor(in.k, kKvHeads, type);
  const at::Tensor v = ToTensor(in.v, kKvHeads, type);
  const at::Tensor dout = ToTensor(in.dout, kHeads, type);
  // NaN shows rows that nobody wrote.
  const auto blank = [](const at::Tensor& like) {
    return at::full(like.sizes(), std::numeric_limits<double>::quiet_NaN(), like.options());
  };
  const at::Tensor out = blank(q);
  const at::Tensor dq = blank(q);
  const at::Tensor dk = blank(k);
  const at::Tensor dv = blank(v);
  Saved saved;
  core->Begin(cu);
  core->Forward(q, k, v, out, &saved);
  core->Backward(q, k, v, out, saved, dout, dq, dk, dv);
  return {ToVector(out), ToVector(dq), ToVector(dk), ToVector(dv)};
}

Outputs Reference(const Mechanism& mechanism, const std::vector<int32_t>& cu, const Inputs& in) {
  Shape shape;
  shape.heads = kHeads;
  shape.kv_heads = kKvHeads;
  shape.key_dim = shape.value_dim = kDim;
  shape.documents = static_cast<int64_t>(cu.size()) - 1;
  shape.cu_seqlens = cu.data();
  shape.scale = kScale;
  shape.window = mechanism.window;
  shape.sinks = mechanism.sinks;
  Outputs o{std::vector<double>(in.q.size()), std::vector<double>(in.q.size()),
            std::vector<double>(in.k.size()), std::vector<double>(in.v.size())};
  std::vector<double> lse(in.q.size() / kDim);
  ReferenceForward(shape, in.q.data(), in.k.data(), in.v.data(), o.out.data(), lse.data());
  ReferenceBackward(shape, in.q.data(), in.k.data(), in.v.data(), o.out.data(), lse.data(),
                    in.dout.data(), o.dq.data(), o.dk.data(), o.dv.data());
  return o;
}

double MaxDifference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= worst)) worst = difference;
  }
  return worst;
}

void ExpectNear(const Outputs& a, const Outputs& b, double tolerance, const std::string& what) {
  EXPECT_LE(MaxDifference(a.out, b.out), tolerance) << what << " out";
  EXPECT_LE(MaxDifference(a.dq, b.dq), tolerance) << what << " dq";
  EXPECT_LE(MaxDifference(a.dk, b.dk), tolerance) << what << " dk";
  EXPECT_LE(MaxDifference(a.dv, b.dv), tolerance) << what << " dv";
}

std::vector<int32_t> Cumulative(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> cu = {0};
  for (const int32_t length : lengths) cu.push_back(cu.back() + length);
  return cu;
}

const std::vector<Mechanism> kMechanisms = {{"dense", 0, 0},       {"swa W6 A2", 6, 2},
                                            {"swa W1 A0", 1, 0},   {"swa W16 A0", 16, 0},
                                            {"swa W64 A4", 64, 4}, {"swa W5 A90", 5, 90}};

// C2, C9: zero-length, length-1, window, window +- 1, long and equal neighbours.
const std::vector<std::vector<int32_t>> kBatches = {
    {40},
    {1},
    {0, 3, 0, 1, 0},
    {5, 6, 7, 8, 9},
    {300, 300, 17, 300, 1, 2, 260, 90, 3, 40, 64, 68, 69}};

TEST(Attention, EqualsTheReferenceOnPackedDocuments) {
  for (const Mechanism& mechanism : kMechanisms) {
    const auto core = Make(mechanism);
    for (const std::vector<int32_t>& lengths : kBatches) {
      const std::vector<int32_t> cu = Cumulative(lengths);
      const Inputs in = RandomInputs(cu.back());
      const std::string what = mechanism.name + " N " + std::to_string(cu.back());
      const Outputs expected = Reference(mechanism, cu, in);
      ExpectNear(RunCore(core.get(), cu, in, at::kDouble), expected, 1e-10, what + " fp64");
      ExpectNear(RunCore(core.get(), cu, in, at::kFloat), expected, 2e-4, what + " fp32");
      ExpectNear(RunCore(core.get(), cu, in, at::kBFloat16), expected, 0.5, what + " bf16");
    }
  }
}

TEST(Attention, Bf16StaysWithinTwoPercentOfTheLargestValue) {
  const std::vector<int32_t> cu = Cumulative({300, 40});
  // Inputs that bf16 holds exactly, so that only the arithmetic differs.
  const auto rounded = [](const std::vector<double>& values, int64_t heads) {
    return ToVector(ToTensor(values, heads, at::kBFloat16));
  };
  const Inputs exact = RandomInputs(cu.back());
  const Inputs in = {rounded(exact.q, kHeads), rounded(exact.k, kKvHeads),
                     rounded(exact.v, kKvHeads), rounded(exact.dout, kHeads)};
  for (const Mechanism& mechanism : kMechanisms) {
    const auto core = Make(mechanism);
    const Outputs expected = Reference(mechanism, cu, in);
    const Outputs got = RunCore(core.get(), cu, in, at::kBFloat16);
    const auto largest = [](const std::vector<double>& v) {
      return std::abs(*std::max_element(
          v.begin(), v.end(), [](double a, double b) { return std::abs(a) < std::abs(b); }));
    };
    // A window of one has zero gradients for q and k.
    const auto tolerance = [&](const std::vector<double>& v) { return 2e-2 * largest(v) + 1e-6; };
    EXPECT_LE(MaxDifference(got.out, expected.out), tolerance(expected.out)) << mechanism.name;
    EXPECT_LE(MaxDifference(got.dq, expected.dq), tolerance(expected.dq)) << mechanism.name;
    EXPECT_LE(MaxDifference(got.dk, expected.dk), tolerance(expected.dk)) << mechanism.name;
    EXPECT_LE(MaxDifference(got.dv, expected.dv), tolerance(expected.dv)) << mechanism.name;
  }
}

// The native bf16 kernel: widths it takes, documents around its tiles of 64 queries and 128 keys,
// one and several query heads per key head.
TEST(Flash, EqualsTheReference) {
  struct Heads {
    int64_t query, kv, dim;
  };
  for (const Heads& heads : {Heads{4, 2, 64}, Heads{3, 3, 32}, Heads{4, 1, 96}}) {
    for (const Mechanism& mechanism : kMechanisms) {
      for (const std::vector<int32_t>& lengths : std::vector<std::vector<int32_t>>{
               {1, 0, 31, 32, 33, 64, 65, 97}, {127, 128, 129, 300}, {513}}) {
        const std::vector<int32_t> cu = Cumulative(lengths);
        const auto tensor = [&](int64_t count, double phase) {
          at::Tensor t = at::empty({cu.back(), count, heads.dim}, at::kDouble);
          const std::vector<double> values = Gen(t.numel(), phase);
          std::copy(values.begin(), values.end(), t.data_ptr<double>());
          return t.to(at::kBFloat16);
        };
        const at::Tensor q = tensor(heads.query, 0.3);
        const at::Tensor k = tensor(heads.kv, 1.1);
        const at::Tensor v = tensor(heads.kv, 2.0);
        const at::Tensor dout = tensor(heads.query, 0.9);
        const double scale = 1.0 / std::sqrt(static_cast<double>(heads.dim));
        const auto core = mechanism.window == 0
                              ? MakeDense(scale)
                              : MakeSlidingWindow(scale, {mechanism.window, mechanism.sinks});
        const at::Tensor out = at::empty_like(q);
        const at::Tensor dq = at::empty_like(q);
        const at::Tensor dk = at::empty_like(k);
        const at::Tensor dv = at::empty_like(v);
        Saved saved;
        core->Begin(cu);
        core->Forward(q, k, v, out, &saved);
        core->Backward(q, k, v, out, saved, dout, dq, dk, dv);

        Shape shape{heads.query,
                    heads.kv,
                    heads.dim,
                    heads.dim,
                    static_cast<int64_t>(cu.size()) - 1,
                    cu.data(),
                    scale,
                    mechanism.window,
                    mechanism.sinks};
        const auto Q = ToVector(q), K = ToVector(k), V = ToVector(v), G = ToVector(dout);
        std::vector<double> o(Q.size()), a(Q.size()), b(K.size()), c(V.size());
        std::vector<double> lse(static_cast<size_t>(cu.back() * heads.query));
        ReferenceForward(shape, Q.data(), K.data(), V.data(), o.data(), lse.data());
        ReferenceBackward(shape, Q.data(), K.data(), V.data(), o.data(), lse.data(), G.data(),
                          a.data(), b.data(), c.data());
        const auto check = [&](const at::Tensor& got, const std::vector<double>& expected,
                               const char* what) {
          double largest = 1e-3;
          for (const double x : expected) largest = std::max(largest, std::abs(x));
          EXPECT_LE(MaxDifference(ToVector(got), expected), 2e-2 * largest)
              << what << ' ' << mechanism.name << " D " << heads.dim << " N " << cu.back();
        };
        check(out, o, "out");
        check(dq, a, "dq");
        check(dk, b, "dk");
        check(dv, c, "dv");
      }
    }
  }
}

// Units are documents, so packing, order and neighbours change no bit, and runs repeat.
TEST(Flash, C2PackedEqualsAloneBitForBit) {
  const std::vector<int32_t> lengths = {70, 1, 200, 33};
  const std::vector<int32_t> cu = Cumulative(lengths);
  const auto tensor = [&](int64_t heads, double phase) {
    at::Tensor t = at::empty({cu.back(), heads, 64}, at::kDouble);
    const std::vector<double> values = Gen(t.numel(), phase);
    std::copy(values.begin(), values.end(), t.data_ptr<double>());
    return t.to(at::kBFloat16);
  };
  const at::Tensor q = tensor(4, 0.3), k = tensor(2, 1.1), v = tensor(2, 2.0), g = tensor(4, 0.9);
  const auto run = [&](int64_t first, int64_t rows, const std::vector<int32_t>& documents) {
    const auto core = MakeSlidingWindow(0.125, {50, 3});
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, rows).contiguous(); };
    const at::Tensor pq = part(q), pk = part(k), pv = part(v);
    std::vector<at::Tensor> out = {at::empty_like(pq), at::empty_like(pq), at::empty_like(pk),
                                   at::empty_like(pv)};
    Saved saved;
    core->Begin(documents);
    core->Forward(pq, pk, pv, out[0], &saved);
    core->Backward(pq, pk, pv, out[0], saved, part(g), out[1], out[2], out[3]);
    return out;
  };
  const std::vector<at::Tensor> packed = run(0, cu.back(), cu);
  for (size_t b = 0; b < lengths.size(); ++b) {
    const std::vector<at::Tensor> alone = run(cu[b], lengths[b], {0, lengths[b]});
    for (size_t i = 0; i < alone.size(); ++i) {
      EXPECT_EQ(ToVector(packed[i].narrow(0, cu[b], lengths[b])), ToVector(alone[i]))
          << "document " << b << " tensor " << i;
    }
  }
}

// C1 and C7: the future of a query changes nothing, bit for bit.
TEST(Attention, C7DoesNotSeeTheFuture) {
  const std::vector<int32_t> cu = {0, 300};
  for (const Mechanism& mechanism : kMechanisms) {
    const auto core = Make(mechanism);
    Inputs in = RandomInputs(300);
    const Outputs before = RunCore(core.get(), cu, in, at::kFloat);
    for (size_t i = 200 * kKvHeads * kDim; i < in.k.size(); ++i) {
      in.k[i] += 1.0;
      in.v[i] -= 2.0;
    }
    const Outputs after = RunCore(core.get(), cu, in, at::kFloat);
    for (size_t i = 0; i < 200 * kHeads * kDim; ++i) {
      ASSERT_EQ(before.out[i], after.out[i]) << mechanism.name << " element " << i;
    }
    EXPECT_NE(before.out.back(), after.out.back());
  }
}

// C4, C5.
TEST(Attention, C5RepeatsItselfBitwise) {
  const std::vector<int32_t> cu = Cumulative({300, 40, 3, 90});
  const Inputs in = RandomInputs(cu.back());
  for (const Mechanism& mechanism : kMechanisms) {
    const auto core = Make(mechanism);
    const Outputs first = RunCore(core.get(), cu, in, at::kBFloat16);
    const Outputs second = RunCore(core.get(), cu, in, at::kBFloat16);
    EXPECT_EQ(first.out, second.out);
    EXPECT_EQ(first.dq, second.dq);
    EXPECT_EQ(first.dk, second.dk);
    EXPECT_EQ(first.dv, second.dv);
  }
}

// With A = 0 token t - W influences nothing at t, and sinks influence every later token.
TEST(SlidingWindow, S4S5SeesExactlyWindowAndSinks) {
  constexpr int64_t kRows = 90;
  const std::vector<int32_t> cu = {0, kRows};
  const auto changed_rows = [&](const Mechanism& mechanism, int64_t key) {
    const auto core = Make(mechanism);
    Inputs in = RandomInputs(kRows);
    const Outputs before = RunCore(core.get(), cu, in, at::kDouble);
    for (int64_t i = 0; i < kKvHeads * kDim; ++i) in.v[key * kKvHeads * kDim + i] += 1.0;
    const Outputs after = RunCore(core.get(), cu, in, at::kDouble);
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < kRows; ++t) {
      if (before.out[t * kHeads * kDim] != after.out[t * kHeads * kDim]) rows.push_back(t);
    }
    return rows;
  };
  EXPECT_EQ(changed_rows({"", 6, 0}, 20), (std::vector<int64_t>{20, 21, 22, 23, 24, 25}));
  EXPECT_EQ(changed_rows({"", 6, 2}, 1).size(), static_cast<size_t>(kRows - 1));
  EXPECT_EQ(changed_rows({"", 6, 2}, 2), (std::vector<int64_t>{2, 3, 4, 5, 6, 7}));
}

TEST(SlidingWindow, S1IsDenseWhenTheDocumentFits) {
  const std::vector<int32_t> cu = Cumulative({68, 30, 64});
  const Inputs in = RandomInputs(cu.back());
  const auto swa = Make({"", 64, 4});
  const auto dense = Make({"", 0, 0});
  EXPECT_EQ(RunCore(swa.get(), cu, in, at::kBFloat16).out,
            RunCore(dense.get(), cu, in, at::kBFloat16).out);
}

// Keys that row t of a document sees (section 4).
std::vector<int64_t> VisibleKeys(const Mechanism& mechanism, int64_t t) {
  std::vector<int64_t> keys;
  for (int64_t s = 0; s <= t; ++s) {
    if (t - s < mechanism.window || s < mechanism.sinks) keys.push_back(s);
  }
  return keys;
}

// With queries of zero the output is the mean of the visible values: values without symmetry show
// which keys a row sees, and that there are min(t + 1, W + min(A, max(0, t + 1 - W))) of them.
TEST(SlidingWindow, S2RowsHaveTheSizesOfTheFormula) {
  constexpr int64_t kRows = 150;
  const std::vector<int32_t> cu = {0, kRows};
  for (const Mechanism& mechanism : kMechanisms) {
    if (mechanism.window == 0) continue;
    const auto core = Make(mechanism);
    Inputs in = RandomInputs(kRows);
    std::fill(in.q.begin(), in.q.end(), 0.0);
    const Outputs got = RunCore(core.get(), cu, in, at::kDouble);
    for (int64_t t = 0; t < kRows; ++t) {
      const std::vector<int64_t> keys = VisibleKeys(mechanism, t);
      const int64_t outside = std::max<int64_t>(0, t + 1 - mechanism.window);
      ASSERT_EQ(static_cast<int64_t>(keys.size()),
                std::min(t + 1, mechanism.window + std::min(mechanism.sinks, outside)));
      for (int64_t h = 0; h < kHeads; ++h) {
        double mean = 0;
        for (const int64_t s : keys) {
          mean += in.v[static_cast<size_t>((s * kKvHeads + h * kKvHeads / kHeads) * kDim)] /
                  static_cast<double>(keys.size());
        }
        ASSERT_NEAR(got.out[static_cast<size_t>((t * kHeads + h) * kDim)], mean, 1e-12)
            << mechanism.name << " row " << t;
      }
    }
  }
}

// Softmax over given rows of k and v [rows, J, D] for one query row and head; lse -inf and zeros
// for no row.
struct Part {
  std::vector<double> out = std::vector<double>(kDim, 0.0);
  double lse = -std::numeric_limits<double>::infinity();
};
Part Attend(const double* q, const std::vector<double>& k, const std::vector<double>& v, int64_t h,
            const std::vector<int64_t>& rows) {
  Part part;
  if (rows.empty()) return part;
  const int64_t j = h * kKvHeads / kHeads;
  std::vector<double> scores;
  for (const int64_t s : rows) {
    double dot = 0;
    for (int64_t i = 0; i < kDim; ++i) {
      dot += q[i] * k[static_cast<size_t>((s * kKvHeads + j) * kDim + i)];
    }
    scores.push_back(kScale * dot);
  }
  const double maximum = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - maximum);
  part.lse = maximum + std::log(sum);
  for (size_t n = 0; n < rows.size(); ++n) {
    for (int64_t i = 0; i < kDim; ++i) {
      part.out[static_cast<size_t>(i)] +=
          std::exp(scores[n] - part.lse) *
          v[static_cast<size_t>((rows[n] * kKvHeads + j) * kDim + i)];
    }
  }
  return part;
}

// After position t was stored, the rows of the ring and the pinned sinks are exactly what t sees,
// also when the ring has wrapped around many times.
TEST(SlidingWindow, S3RingDecodeEqualsPrefill) {
  constexpr int64_t kRows = 60;
  const std::vector<int32_t> cu = {0, kRows};
  const Inputs in = RandomInputs(kRows);
  for (const Mechanism& mechanism : kMechanisms) {
    if (mechanism.window == 0) continue;
    const Outputs prefill = RunCore(Make(mechanism).get(), cu, in, at::kDouble);
    inference::KvCache cache({kKvHeads, kDim, kDim, mechanism.window, mechanism.sinks}, at::kDouble,
                             {});
    const at::Tensor k = ToTensor(in.k, kKvHeads, at::kDouble);
    const at::Tensor v = ToTensor(in.v, kKvHeads, at::kDouble);
    for (int64_t t = 0; t < kRows; ++t) {
      cache.Append(k.narrow(0, t, 1), v.narrow(0, t, 1));
      std::vector<int64_t> rows(static_cast<size_t>(cache.rows()));
      std::iota(rows.begin(), rows.end(), 0);
      const std::vector<double> keys = ToVector(cache.keys().View(cache.rows()));
      const std::vector<double> values = ToVector(cache.values().View(cache.rows()));
      for (int64_t h = 0; h < kHeads; ++h) {
        const int64_t at = (t * kHeads + h) * kDim;
        const Part step = Attend(in.q.data() + at, keys, values, h, rows);
        for (int64_t i = 0; i < kDim; ++i) {
          ASSERT_NEAR(step.out[static_cast<size_t>(i)], prefill.out[static_cast<size_t>(at + i)],
                      1e-12)
              << mechanism.name << " row " << t;
        }
      }
    }
  }
}

// The merge of two attentions over disjoint sets (section 1) gives the attention over their union.
TEST(SlidingWindow, S6MergedSinksAndWindowEqualTheMaskedSet) {
  constexpr int64_t kRows = 60;
  const std::vector<int32_t> cu = {0, kRows};
  const Inputs in = RandomInputs(kRows);
  for (const Mechanism& mechanism : kMechanisms) {
    if (mechanism.window == 0) continue;
    const Outputs masked = RunCore(Make(mechanism).get(), cu, in, at::kDouble);
    for (int64_t t = 0; t < kRows; ++t) {
      std::vector<int64_t> window, sinks;
      for (const int64_t s : VisibleKeys(mechanism, t)) {
        (t - s < mechanism.window ? window : sinks).push_back(s);
      }
      for (int64_t h = 0; h < kHeads; ++h) {
        const double* q = in.q.data() + (t * kHeads + h) * kDim;
        const Part a = Attend(q, in.k, in.v, h, sinks);
        const Part b = Attend(q, in.k, in.v, h, window);
        const double m = std::max(a.lse, b.lse);
        const double wa = std::exp(a.lse - m), wb = std::exp(b.lse - m);
        for (size_t i = 0; i < kDim; ++i) {
          const size_t at = static_cast<size_t>((t * kHeads + h) * kDim) + i;
          ASSERT_NEAR((wa * a.out[i] + wb * b.out[i]) / (wa + wb), masked.out[at], 1e-12)
              << mechanism.name << " row " << t;
        }
      }
    }
  }
}

// ---- Golden values, attention-and-moe.md section 14 ---------------------------------------------

constexpr int64_t kT = 40;

layers::RopeTables* Tables(bool interleaved) {
  heddle::v1::ModelConfig config;
  if (interleaved) {
    config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  }
  auto* tables = new layers::RopeTables(layers::RopeFrequenciesOf(config, kDim), /*fp64=*/true);
  tables->Ensure(kT);
  return tables;
}

std::vector<double> Rotate(const std::vector<double>& rows, int64_t heads, bool interleaved,
                           bool inverse = false) {
  const std::unique_ptr<layers::RopeTables> tables(Tables(interleaved));
  at::Tensor t = ToTensor(rows, heads, at::kDouble);
  std::vector<int32_t> positions(static_cast<size_t>(t.size(0)));
  std::iota(positions.begin(), positions.end(), 0);
  layers::ApplyRope(*tables, {heads, kDim, inverse, positions}, t.view({t.size(0), heads * kDim}));
  return ToVector(t);
}

void ExpectSummary(const Summary& got, const Summary& golden) {
  EXPECT_NEAR(got.sum, golden.sum, 1e-10);
  EXPECT_NEAR(got.sum_of_squares, golden.sum_of_squares, 1e-9);
  EXPECT_NEAR(got.first, golden.first, 1e-12);
  EXPECT_NEAR(got.last, golden.last, 1e-12);
}

TEST(Golden, RotatesBothLayouts) {
  const std::vector<double> x = SwapHeads(Gen(2 * 5 * 8, 0.1), 2, 5, 8);
  ExpectSummary(Summarize(SwapHeads(Rotate(x, 2, false), 5, 2, 8)),
                {2.921037894876, 39.45902135291, 0.09983341664683, -0.8685747696467});
  ExpectSummary(Summarize(SwapHeads(Rotate(x, 2, true), 5, 2, 8)),
                {3.104025798391, 39.45902135291, 0.09983341664683, -0.8727543687277});
}

struct GoldenCase {
  Mechanism mechanism;
  Summary out;
  double dq, dk, dv;
};

TEST(Golden, DenseAndSlidingWindowForwardAndGradients) {
  const std::vector<GoldenCase> cases = {
      {{"dense", 0, 0},
       {12.53717221377, 140.1326490337, 0.9092974268257, 0.05648261347214},
       129.7265735052,
       321.9395259202,
       320.2341594478},
      {{"swa", 6, 2},
       {1.840114062791, 178.5001610738, 0.9092974268257, -0.1684122286128},
       137.9456724656,
       347.5196022181,
       333.8408373132}};
  Inputs in;
  in.q = Rotate(SwapHeads(Gen(4 * kT * 8, 0.3), 4, kT, 8), kHeads, false);
  in.k = Rotate(SwapHeads(Gen(2 * kT * 8, 1.1), 2, kT, 8), kKvHeads, false);
  in.v = SwapHeads(Gen(2 * kT * 8, 2.0), 2, kT, 8);
  in.dout = SwapHeads(Gen(4 * kT * 8, 0.9), 4, kT, 8);
  for (const GoldenCase& c : cases) {
    const auto core = Make(c.mechanism);
    for (const bool reference : {true, false}) {
      const Outputs got = reference ? Reference(c.mechanism, {0, kT}, in)
                                    : RunCore(core.get(), {0, kT}, in, at::kDouble);
      ExpectSummary(Summarize(SwapHeads(got.out, kT, 4, 8)), c.out);
      // Rotation keeps norms, so the gradients of the unrotated q and k have the same sums.
      EXPECT_NEAR(Summarize(Rotate(got.dq, 4, false, true)).sum_of_squares, c.dq, 1e-8);
      EXPECT_NEAR(Summarize(Rotate(got.dk, 2, false, true)).sum_of_squares, c.dk, 1e-8);
      EXPECT_NEAR(Summarize(got.dv).sum_of_squares, c.dv, 1e-8);
    }
  }
}

}  // namespace
}  // namespace heddle::attention
