#include "model/attention/sparse_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/attention/key_sets.h"
#include "tests/model/attention/sets_harness.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using model_test::Gen;
using model_test::Summarize;
using model_test::Summary;
using model_test::SwapHeads;
// NOLINTNEXTLINE: all of them
using namespace sets_test;

Outputs Compute(double scale, const KeySets& sets, const KeyDocuments& documents,
                const Inputs& in) {
  const at::ScalarType type = in.q.scalar_type();
  const Outputs o = {
      Blank(in.dout.sizes(), type),
      Blank({in.q.size(0), in.q.size(1)}, type == at::kDouble ? at::kDouble : at::kFloat),
      Blank(in.q.sizes(), type), Blank(in.k.sizes(), type), Blank(in.v.sizes(), type)};
  SparseAttention(scale, sets, in.q, in.k, in.v, o.out, o.lse);
  SparseAttentionBackward(scale, sets, documents, in.q, in.k, in.v, o.out, o.lse, in.dout, o.dq,
                          o.dk, o.dv);
  return o;
}

// ---- Against the reference ---------------------------------------------------------------------

TEST(SparseAttention, EqualsTheReferenceOnPackedDocumentsInEveryType) {
  ForCases([](const Batch& batch, const Widths& w, std::mt19937* random) {
    const KeyDocuments documents = SameRows(batch.documents());
    // Values that bf16 holds, so that only arithmetic differs.
    const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kBFloat16, random);
    for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, random)) {
      const Outputs expected = Reference(w.scale(), sets, in);
      for (const auto& [type, tolerance] :
           {std::pair(at::kDouble, 1e-12), {at::kFloat, 1e-5}, {at::kBFloat16, 2e-2}}) {
        const Inputs typed = {in.q.to(type), in.k.to(type), in.v.to(type), in.dout.to(type)};
        ExpectClose(Compute(w.scale(), sets, documents, typed), expected, tolerance, name);
      }
    }
  });
}

// Keys of another count than the queries, cut at other rows: compressed keys.
TEST(SparseAttention, KeysMayHaveOtherDocumentsThanQueries) {
  std::mt19937 random(5);
  const Widths w;
  // Windows of 4 tokens every 2; the third document is too short to have one.
  const Batch batch({21, 0, 3, 40});
  std::vector<int32_t> key_rows = {0};
  KeySets sets;
  sets.width = INT32_MAX;
  sets.offsets = {0};
  for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
    const int32_t length = batch.cu[b + 1] - batch.cu[b];
    const int32_t start = key_rows.back();
    for (int32_t t = 0; t < length; ++t) {
      const int32_t visible = t < 3 ? 0 : (t - 3) / 2 + 1;
      if (visible > 0) sets.first.push_back(start);
      sets.offsets.push_back(static_cast<int64_t>(sets.first.size()));
      sets.end.push_back(start + visible);
    }
    key_rows.push_back(start + (length < 4 ? 0 : (length - 4) / 2 + 1));
  }
  const int64_t keys = key_rows.back();
  const KeyDocuments documents = RowsOf(batch.cu, key_rows);
  ASSERT_EQ(keys, 9 + 19);
  for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
    const Inputs in = RandomInputs(w, batch.rows(), keys, type, &random);
    const Outputs got = Compute(w.scale(), sets, documents, in);
    ExpectClose(got, Reference(w.scale(), sets, in), type == at::kDouble ? 1e-12 : 1e-5, "");
    EXPECT_EQ(ToVector(got.lse)[0], -kInfinity);
  }
}

TEST(SparseAttention, NoQueriesGiveTheKeysZeroGradients) {
  std::mt19937 random(6);
  const Widths w;
  KeySets sets;
  sets.offsets = {0};
  const Inputs in = RandomInputs(w, 0, 5, at::kBFloat16, &random);
  const Outputs got = Compute(w.scale(), sets, {{{{0, 0}, {0, 5}}}}, in);
  EXPECT_EQ(ToVector(got.dk), std::vector<double>(5 * 2 * 8, 0.0));
  EXPECT_EQ(ToVector(got.dv), std::vector<double>(5 * 2 * 8, 0.0));
}

// Queries, keys and values as slices of one projection buffer, gradients likewise.
TEST(SparseAttention, K4StridedRowsGiveTheBitsOfContiguousOnes) {
  std::mt19937 random(8);
  const Widths w;
  const Batch batch({50, 20});
  const KeySets sets = RandomTokens(batch, 1, 9, &random);
  const KeyDocuments documents = SameRows(batch.documents());
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto split = [&](const at::Tensor& joined) {
      const auto part = [&](int64_t first, int64_t heads) {
        return joined.narrow(1, first * 8, heads * 8).view({batch.rows(), heads, 8});
      };
      return std::array{part(0, 4), part(4, 2), part(6, 2)};
    };
    const at::Tensor joined =
        ToTensor(Normal(batch.rows() * 64, &random), 1, 64, type).view({-1, 64});
    const at::Tensor gradients = Blank({batch.rows(), 64}, type);
    const auto [q, k, v] = split(joined);
    const auto [dq, dk, dv] = split(gradients);
    const Inputs in = {q.contiguous(), k.contiguous(), v.contiguous(),
                       ToTensor(Normal(batch.rows() * 32, &random), 4, 8, type)};
    const Outputs packed = Compute(w.scale(), sets, documents, in);
    const at::Tensor out = Blank({batch.rows(), 6, 8}, type).narrow(1, 1, 4);
    const at::Tensor lse = Blank(packed.lse.sizes(), packed.lse.scalar_type());
    SparseAttention(w.scale(), sets, q, k, v, out, lse);
    SparseAttentionBackward(w.scale(), sets, documents, q, k, v, out, lse, in.dout, dq, dk, dv);
    ExpectSameBits({out, lse, dq, dk, dv}, packed, "strided");
  }
}

// C8: central differences of a scalar loss in fp64, every element of q, k and v.
TEST(SparseAttention, C8GradientsAreThoseOfTheForward) {
  std::mt19937 random(9);
  const Widths w{4, 2, 6, 5};
  const Batch batch({9, 0, 4});
  for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, &random)) {
    const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kDouble, &random);
    const Outputs got = Compute(w.scale(), sets, SameRows(batch.documents()), in);
    const at::Tensor out = Blank(in.dout.sizes(), at::kDouble);
    const at::Tensor lse = Blank(got.lse.sizes(), at::kDouble);
    const auto loss = [&] {
      SparseAttention(w.scale(), sets, in.q, in.k, in.v, out, lse);
      const double* o = out.data_ptr<double>();
      const double* g = in.dout.data_ptr<double>();
      return std::inner_product(o, o + out.numel(), g, 0.0);
    };
    const std::vector<std::pair<at::Tensor, at::Tensor>> pairs = {
        {in.q, got.dq}, {in.k, got.dk}, {in.v, got.dv}};
    for (const auto& [input, gradient] : pairs) {
      for (int64_t i = 0; i < input.numel(); ++i) {
        double& x = input.data_ptr<double>()[i];
        const double kept = x;
        constexpr double kStep = 1e-5;
        x = kept + kStep;
        const double above = loss();
        x = kept - kStep;
        const double below = loss();
        x = kept;
        ASSERT_NEAR(gradient.data_ptr<double>()[i], (above - below) / (2 * kStep), 1e-8)
            << name << " element " << i;
      }
    }
  }
}

// ---- Laws --------------------------------------------------------------------------------------

TEST(SparseAttention, C2PackedEqualsAloneBitForBit) {
  std::mt19937 random(10);
  const Widths w{6, 2, 24, 40};
  const Batch batch({70, 1, 0, 130, 33});
  for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, &random)) {
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), type, &random);
      const Outputs packed = Compute(w.scale(), sets, SameRows(batch.documents()), in);
      for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
        const int64_t first = batch.cu[b];
        const int64_t count = batch.cu[b + 1] - first;
        const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, count); };
        const Outputs alone =
            Compute(w.scale(), Slice(sets, first, count),
                    {{{{0, static_cast<int32_t>(count)}, {0, static_cast<int32_t>(count)}}}},
                    {part(in.q), part(in.k), part(in.v), part(in.dout)});
        ExpectSameBits(
            {part(packed.out), part(packed.lse), part(packed.dq), part(packed.dk), part(packed.dv)},
            alone, name + " document " + std::to_string(b));
      }
    }
  }
}

TEST(SparseAttention, C5AnyNumberOfThreadsGivesTheSameBits) {
  std::mt19937 random(11);
  const Widths w{4, 2, 16, 16};
  const Batch batch({300, 40, 700, 3});
  const int threads = at::get_num_threads();
  for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, &random)) {
    const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kFloat, &random);
    const KeyDocuments documents = SameRows(batch.documents());
    at::set_num_threads(1);
    const Outputs one = Compute(w.scale(), sets, documents, in);
    for (const int count : {2, 3, 5}) {
      at::set_num_threads(count);
      for (int run = 0; run < 2; ++run) {
        ExpectSameBits(Compute(w.scale(), sets, documents, in), one,
                       name + " threads " + std::to_string(count));
      }
    }
    at::set_num_threads(threads);
  }
}

TEST(SparseAttention, C1PrefixesHaveTheSameBits) {
  std::mt19937 random(12);
  const Widths w;
  const Batch batch({90});
  for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, &random)) {
    const Inputs in = RandomInputs(w, 90, 90, at::kFloat, &random);
    const Outputs whole = Compute(w.scale(), sets, SameRows(batch.documents()), in);
    for (const int32_t t : {1, 17, 64, 89}) {
      const auto part = [&](const at::Tensor& x) { return x.narrow(0, 0, t); };
      const Outputs prefix = Compute(w.scale(), Slice(sets, 0, t), {{{{0, t}, {0, t}}}},
                                     {part(in.q), part(in.k), part(in.v), part(in.dout)});
      EXPECT_TRUE(SameBits(part(whole.out), prefix.out)) << name << " t " << t;
      EXPECT_TRUE(SameBits(part(whole.dq), prefix.dq)) << name << " t " << t;
    }
  }
}

TEST(SparseAttention, C7AKeyReachesExactlyTheRowsThatHoldIt) {
  std::mt19937 random(13);
  const Widths w;
  const Batch batch({50, 30});
  constexpr int32_t kKey = 20;
  for (const auto& [name, sets] : SetsOf(batch, 1, &random)) {
    const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kDouble, &random);
    const KeyDocuments documents = SameRows(batch.documents());
    const Outputs before = Compute(w.scale(), sets, documents, in);
    in.k[kKey].add_(1.0);
    in.v[kKey].sub_(2.0);
    const Outputs after = Compute(w.scale(), sets, documents, in);
    for (int64_t row = 0; row < batch.rows(); ++row) {
      const bool holds = kernels::sparse_attention::InSet(sets.view(), row, 0, kKey);
      EXPECT_EQ(SameBits(before.out[row], after.out[row]), !holds) << name << " row " << row;
      if (row < kKey || row >= 50) {
        EXPECT_FALSE(holds) << name << " row " << row;
      }
    }
  }
}

// ---- Key sets ----------------------------------------------------------------------------------

std::vector<int64_t> KeysOfRow(const KeySets& sets, int64_t row, int64_t set_head, int64_t keys) {
  std::vector<int64_t> list;
  for (int64_t key = 0; key < keys; ++key) {
    if (kernels::sparse_attention::InSet(sets.view(), row, set_head, key)) list.push_back(key);
  }
  return list;
}

TEST(KeySets, S2WindowSetsHoldTheWindowAndTheSinks) {
  const Batch batch({90, 0, 1, 30});
  for (const int64_t window : {1, 5, 6, 16, 64, 200}) {
    for (const int64_t sinks : {0, 1, 2, 4, 7, 20, 100}) {
      const KeySets sets = WindowSets(batch.documents(), {window, sinks});
      int64_t pairs = 0;
      for (int64_t row = 0; row < batch.rows(); ++row) {
        const int64_t t = batch.positions[static_cast<size_t>(row)];
        std::vector<int64_t> expected;
        for (int64_t s = 0; s <= t; ++s) {
          if (t - s < window || s < sinks) expected.push_back(row - t + s);
        }
        ASSERT_EQ(KeysOfRow(sets, row, 0, batch.rows()), expected)
            << "W " << window << " A " << sinks << " row " << row;
        const int64_t size =
            std::min(t + 1, window + std::min(sinks, std::max<int64_t>(0, t + 1 - window)));
        ASSERT_EQ(static_cast<int64_t>(expected.size()), size);
        pairs += size;
      }
      EXPECT_EQ(sets.pairs(), pairs) << "X4";
    }
  }
}

TEST(KeySets, SpansAscendAndDoNotOverlap) {
  std::mt19937 random(14);
  const Batch batch({90, 0, 1, 30});
  for (const auto& [name, sets] : SetsOf(batch, 2, &random)) {
    for (size_t list = 0; list + 1 < sets.offsets.size(); ++list) {
      for (int64_t i = sets.offsets[list] + 1; i < sets.offsets[list + 1]; ++i) {
        ASSERT_GE(sets.first[static_cast<size_t>(i)],
                  int64_t{sets.first[static_cast<size_t>(i - 1)]} + sets.width)
            << name;
      }
    }
  }
}

TEST(KeySets, X4PairsAreWhatTheFormulasCount) {
  std::mt19937 random(15);
  const Batch batch({100, 0, 37});
  EXPECT_EQ(CausalSets(batch.documents()).pairs(), 100 * 101 / 2 + 37 * 38 / 2);
  // k = 16 of t + 1 per set head.
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> selected;
  for (int32_t row = 0; row < batch.rows(); ++row) {
    const int32_t t = batch.positions[static_cast<size_t>(row)];
    for (int g = 0; g < 2; ++g) {
      for (int32_t s = std::max(0, t - 15); s <= t; ++s) selected.push_back(row - t + s);
      offsets.push_back(static_cast<int64_t>(selected.size()));
    }
  }
  const KeySets tokens = TokenSets(batch.documents(), offsets, selected);
  EXPECT_EQ(tokens.set_heads, 2);
  EXPECT_EQ(tokens.pairs(), 2 * ((100 * 16 - 120) + (37 * 16 - 120)));
  int64_t counted = 0;
  const KeySets blocks = RandomBlocks(batch, 2, 8, &random);
  for (int64_t row = 0; row < batch.rows(); ++row) {
    for (int64_t g = 0; g < 2; ++g) counted += KeysOfRow(blocks, row, g, batch.rows()).size();
  }
  EXPECT_EQ(blocks.pairs(), counted);
}

TEST(KeySets, TokenSetsHideTheFuture) {
  const Batch batch({4});
  const KeySets sets = TokenSets(batch.documents(), {0, 2, 4, 6, 8}, {0, 3, 0, 3, 0, 3, 0, 3});
  EXPECT_EQ(KeysOfRow(sets, 1, 0, 4), (std::vector<int64_t>{0}));
  EXPECT_EQ(KeysOfRow(sets, 3, 0, 4), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(sets.pairs(), 5);
}

TEST(KeySetsDeathTest, RefusesSelectionsOutOfOrder) {
  const Batch batch({2});
  EXPECT_DEATH(TokenSets(batch.documents(), {0, 0, 2}, {1, 0}), "must ascend");
}

TEST(SparseAttentionDeathTest, RefusesKeysThatDoNotExist) {
  const Batch batch({3});
  std::mt19937 random(16);
  const Widths w;
  const Inputs in = RandomInputs(w, 3, 2, at::kFloat, &random);
  const at::Tensor out = Blank({3, 4, 8}, at::kFloat);
  const at::Tensor lse = Blank({3, 4}, at::kFloat);
  EXPECT_DEATH(SparseAttention(1.0, CausalSets(batch.documents()), in.q, in.k, in.v, out, lse),
               "ends 0 .. 3 of 2");
}

// S1: a window that holds the document, and sinks that do, are dense; the form changes no bit.
TEST(SparseAttention, S1WindowsThatHoldTheDocumentAreDense) {
  std::mt19937 random(17);
  const Widths w;
  const Batch batch({68, 30, 64});
  const KeyDocuments documents = SameRows(batch.documents());
  const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kFloat, &random);
  const Outputs dense = Compute(w.scale(), CausalSets(batch.documents()), documents, in);
  for (const model::Window window : {model::Window{68, 0}, {64, 4}, {1, 67}, {5, 90}}) {
    ExpectSameBits(Compute(w.scale(), WindowSets(batch.documents(), window), documents, in), dense,
                   "W " + std::to_string(window.keys));
  }
}

// S6: sinks and window apart, merged by their lse.
TEST(SparseAttention, S6MergedSinksAndWindowEqualTheMaskedSet) {
  std::mt19937 random(18);
  const Widths w;
  const Batch batch({60, 20});
  constexpr int64_t kWindow = 6;
  constexpr int64_t kSinks = 2;
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> selected;
  for (int32_t row = 0; row < batch.rows(); ++row) {
    const int32_t t = batch.positions[static_cast<size_t>(row)];
    for (int32_t s = 0; s < std::min<int64_t>(kSinks, t + 1 - kWindow); ++s) {
      selected.push_back(row - t + s);
    }
    offsets.push_back(static_cast<int64_t>(selected.size()));
  }
  const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kDouble, &random);
  const auto forward = [&](const KeySets& sets) {
    const Outputs o = {Blank(in.dout.sizes(), at::kDouble),
                       Blank({batch.rows(), w.heads}, at::kDouble),
                       {},
                       {},
                       {}};
    SparseAttention(w.scale(), sets, in.q, in.k, in.v, o.out, o.lse);
    return std::pair(ToVector(o.out), ToVector(o.lse));
  };
  const auto [a, a_lse] = forward(TokenSets(batch.documents(), offsets, selected));
  const auto [b, b_lse] = forward(WindowSets(batch.documents(), {kWindow, 0}));
  const auto [expected, lse] = forward(WindowSets(batch.documents(), {kWindow, kSinks}));
  for (size_t at = 0; at < lse.size(); ++at) {
    const double maximum = std::max(a_lse[at], b_lse[at]);
    const double x = std::exp(a_lse[at] - maximum);
    const double y = std::exp(b_lse[at] - maximum);
    ASSERT_NEAR(maximum + std::log(x + y), lse[at], 1e-12);
    for (size_t i = 8 * at; i < 8 * at + 8; ++i) {
      ASSERT_NEAR((x * a[i] + y * b[i]) / (x + y), expected[i], 1e-12);
    }
  }
}

// ---- Golden values, attention-and-moe.md section 14
// ----------------------------------------------

constexpr int64_t kT = 40;

// Half rotary embedding, theta 1e4, D 8.
std::vector<double> Rotate(std::vector<double> rows, int64_t heads) {
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      double* x = rows.data() + (t * heads + h) * 8;
      for (int i = 0; i < 4; ++i) {
        const double angle = static_cast<double>(t) * std::pow(1e4, -i / 4.0);
        const double a = x[i], b = x[i + 4];
        x[i] = a * std::cos(angle) - b * std::sin(angle);
        x[i + 4] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }
  return rows;
}

std::vector<double> Product(const std::vector<double>& a, const std::vector<double>& b,
                            int64_t inner, int64_t columns) {
  std::vector<double> out(a.size() / static_cast<size_t>(inner) * static_cast<size_t>(columns));
  for (size_t row = 0; row < a.size() / static_cast<size_t>(inner); ++row) {
    for (int64_t i = 0; i < inner; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        out[row * columns + c] += a[row * inner + i] * b[i * columns + c];
      }
    }
  }
  return out;
}

// Scores [T, T] of the lightning indexer with the scaling of V3.2 and a LayerNorm on its keys,
// without rotation; 0 in the future. HI 3, dI 4.
std::vector<double> IndexerScores() {
  const std::vector<double> h = Gen(kT * 12, 0.7);
  const std::vector<double> q = Product(h, Gen(12 * 12, 0.4, 0.3), 12, 12);
  std::vector<double> k = Product(h, Gen(12 * 4, 1.3, 0.3), 12, 4);
  const std::vector<double> w = Product(h, Gen(12 * 3, 2.2, 0.3), 12, 3);
  for (int64_t s = 0; s < kT; ++s) {
    double* x = k.data() + s * 4;
    const double mean = (x[0] + x[1] + x[2] + x[3]) / 4;
    double variance = 0;
    for (int i = 0; i < 4; ++i) variance += (x[i] - mean) * (x[i] - mean) / 4;
    for (int i = 0; i < 4; ++i) x[i] = (x[i] - mean) / std::sqrt(variance + 1e-6);
  }
  std::vector<double> scores(kT * kT);
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t s = 0; s <= t; ++s) {
      for (int64_t j = 0; j < 3; ++j) {
        const double dot = std::inner_product(&k[s * 4], &k[s * 4] + 4, &q[t * 12 + j * 4], 0.0);
        scores[t * kT + s] += w[t * 3 + j] / std::sqrt(12.0) * std::max(0.0, dot);
      }
    }
  }
  return scores;
}

// The six largest visible scores of each row, ties to the lowest index.
KeySets TopSix(const Batch& batch, const std::vector<double>& scores) {
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> selected;
  for (int32_t t = 0; t < kT; ++t) {
    std::vector<int32_t> order(static_cast<size_t>(t) + 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return scores[t * kT + a] > scores[t * kT + b]; });
    order.resize(std::min<size_t>(6, order.size()));
    std::sort(order.begin(), order.end());
    selected.insert(selected.end(), order.begin(), order.end());
    offsets.push_back(static_cast<int64_t>(selected.size()));
  }
  return TokenSets(batch.documents(), offsets, selected);
}

void ExpectSummary(const Summary& got, const Summary& golden) {
  EXPECT_NEAR(got.sum, golden.sum, 1e-10);
  EXPECT_NEAR(got.sum_of_squares, golden.sum_of_squares, 1e-9);
  EXPECT_NEAR(got.first, golden.first, 1e-12);
  EXPECT_NEAR(got.last, golden.last, 1e-12);
}

struct GoldenCase {
  std::string name;
  KeySets sets;
  Summary out;
  double dq, dk, dv;
};

TEST(Golden, SparseAttentionForwardAndGradients) {
  const Batch batch({static_cast<int32_t>(kT)});
  const std::vector<double> scores = IndexerScores();
  ExpectSummary(Summarize(scores),
                {-0.3500469591280, 0.2945829548915, -0.01116188429732, 0.0003849666025438});
  const KeySets top_six = TopSix(batch, scores);
  EXPECT_EQ(KeysOfRow(top_six, 10, 0, kT), (std::vector<int64_t>{0, 3, 6, 7, 9, 10}));
  EXPECT_EQ(KeysOfRow(top_six, 20, 0, kT), (std::vector<int64_t>{2, 5, 8, 12, 15, 19}));
  EXPECT_EQ(KeysOfRow(top_six, 39, 0, kT), (std::vector<int64_t>{6, 13, 16, 23, 30, 33}));
  const std::vector<GoldenCase> cases = {
      {"dense",
       CausalSets(batch.documents()),
       {12.53717221377, 140.1326490337, 0.9092974268257, 0.05648261347214},
       129.7265735052,
       321.9395259202,
       320.2341594478},
      {"swa",
       WindowSets(batch.documents(), {6, 2}),
       {1.840114062791, 178.5001610738, 0.9092974268257, -0.1684122286128},
       137.9456724656,
       347.5196022181,
       333.8408373132},
      {"top-6",
       top_six,
       {18.27182783435, 175.7331420025, 0.9092974268257, 0.1915158737005},
       140.2906437508,
       344.3917438885,
       399.8158597680}};
  Inputs in;
  in.q = ToTensor(Rotate(SwapHeads(Gen(4 * kT * 8, 0.3), 4, kT, 8), 4), 4, 8, at::kDouble);
  in.k = ToTensor(Rotate(SwapHeads(Gen(2 * kT * 8, 1.1), 2, kT, 8), 2), 2, 8, at::kDouble);
  in.v = ToTensor(SwapHeads(Gen(2 * kT * 8, 2.0), 2, kT, 8), 2, 8, at::kDouble);
  in.dout = ToTensor(SwapHeads(Gen(4 * kT * 8, 0.9), 4, kT, 8), 4, 8, at::kDouble);
  const Widths w;
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    const Outputs got = Compute(w.scale(), c.sets, SameRows(batch.documents()), in);
    ExpectSummary(Summarize(SwapHeads(ToVector(got.out), kT, 4, 8)), c.out);
    // Rotation keeps norms, so the gradients of the unrotated q and k have the same sums.
    EXPECT_NEAR(Summarize(ToVector(got.dq)).sum_of_squares, c.dq, 1e-8);
    EXPECT_NEAR(Summarize(ToVector(got.dk)).sum_of_squares, c.dk, 1e-8);
    EXPECT_NEAR(Summarize(ToVector(got.dv)).sum_of_squares, c.dv, 1e-8);
  }
}

}  // namespace
}  // namespace heddle::attention
