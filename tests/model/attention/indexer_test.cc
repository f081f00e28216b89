#include "model/attention/indexer.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "model/attention/key_sets.h"
#include "model/attention/sparse_attention.h"
#include "tests/model/attention/indexer_example.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using kernels::indexer::Activation;
using kernels::indexer::TieBreak;
using model_test::AllSizes;
using model_test::Batch;
using model_test::Example;
using model_test::ExpectNear;
using model_test::Gen;
using model_test::kLengths;
using model_test::Row;
using model_test::SameBits;
using model_test::Sizes;
using model_test::Summarize;
using model_test::Summary;
using model_test::SwapHeads;
using model_test::ToTensor;
using model_test::ToVector;

// ---- Golden values, attention-and-moe.md section 14 ---------------------------------------------

constexpr int64_t kT = 40;
constexpr int64_t kHI = 3;
constexpr int64_t kDI = 4;
constexpr int64_t kModel = 12;

// a [rows, inner] b [inner, columns].
std::vector<double> Multiply(const std::vector<double>& a, const std::vector<double>& b,
                             int64_t inner, bool transpose_a = false) {
  const int64_t rows = static_cast<int64_t>(a.size()) / inner;
  const int64_t columns = static_cast<int64_t>(b.size()) / inner;
  std::vector<double> c(static_cast<size_t>(rows * columns), 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t m = 0; m < inner; ++m) {
        const double left = transpose_a ? a[m * rows + i] : a[i * inner + m];
        c[i * columns + j] += left * b[m * columns + j];
      }
    }
  }
  return c;
}

// LayerNorm without affine over rows of kDI, and its backward.
struct LayerNorm {
  std::vector<double> y;
  std::vector<double> rstd;

  explicit LayerNorm(const std::vector<double>& x) : y(x.size()) {
    for (size_t r = 0; r < x.size() / kDI; ++r) {
      double mean = 0;
      double square = 0;
      for (size_t i = 0; i < kDI; ++i) mean += x[r * kDI + i] / kDI;
      for (size_t i = 0; i < kDI; ++i) square += std::pow(x[r * kDI + i] - mean, 2) / kDI;
      rstd.push_back(1 / std::sqrt(square + 1e-6));
      for (size_t i = 0; i < kDI; ++i) y[r * kDI + i] = (x[r * kDI + i] - mean) * rstd.back();
    }
  }
  std::vector<double> Backward(const std::vector<double>& dy) const {
    std::vector<double> dx(dy.size());
    for (size_t r = 0; r < rstd.size(); ++r) {
      double mean = 0;
      double along = 0;
      for (size_t i = 0; i < kDI; ++i) mean += dy[r * kDI + i] / kDI;
      for (size_t i = 0; i < kDI; ++i) along += dy[r * kDI + i] * y[r * kDI + i] / kDI;
      for (size_t i = 0; i < kDI; ++i) {
        dx[r * kDI + i] = rstd[r] * (dy[r * kDI + i] - mean - y[r * kDI + i] * along);
      }
    }
    return dx;
  }
};

// Half layout, theta 1e4, of [kT, heads, 8].
std::vector<double> Rotate(const std::vector<double>& rows, int64_t heads) {
  std::vector<double> out(rows.size());
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < 4; ++i) {
        const double angle = t * std::pow(1e4, -2.0 * i / 8);
        const int64_t at = (t * heads + h) * 8 + i;
        out[at] = rows[at] * std::cos(angle) - rows[at + 4] * std::sin(angle);
        out[at + 4] = rows[at + 4] * std::cos(angle) + rows[at] * std::sin(angle);
      }
    }
  }
  return out;
}

const double kW32 = 1 / std::sqrt(static_cast<double>(kHI * kDI));

struct GoldenIndexer {
  Batch batch{{kT}};
  std::vector<double> h = Gen(kT * kModel, 0.7);
  std::vector<double> q = Multiply(h, Gen(kModel* kHI* kDI, 0.4, 0.3), kModel);
  std::vector<double> k = Multiply(h, Gen(kModel* kDI, 1.3, 0.3), kModel);
  std::vector<double> w = Multiply(h, Gen(kModel* kHI, 2.2, 0.3), kModel);
  LayerNorm norm{k};
  at::Tensor q_NHD = ToTensor(Rotate(SwapHeads(Gen(4 * kT * 8, 0.3), 4, kT, 8), 4), {kT, 4, 8});
  at::Tensor k_NJD = ToTensor(Rotate(SwapHeads(Gen(2 * kT * 8, 1.1), 2, kT, 8), 2), {kT, 2, 8});
  at::Tensor v_NJD = ToTensor(SwapHeads(Gen(2 * kT * 8, 2.0), 2, kT, 8), {kT, 2, 8});

  IndexerInputs Make(const std::vector<double>& keys, const std::vector<double>& weights) const {
    IndexerInputs in;
    in.q_NHI = ToTensor(q, {kT, kHI, kDI});
    in.k_NI = ToTensor(keys, {kT, kDI});
    in.w_NH = ToTensor(weights, {kT, kHI});
    return in;
  }
  IndexerInputs Seed() const { return Make(k, w); }
  IndexerInputs V32() const {
    std::vector<double> scaled = w;
    for (double& x : scaled) x *= kW32;
    return Make(norm.y, scaled);
  }
  IndexerInputs Gsa() const {
    std::vector<double> gate = w;
    const std::vector<double> cw = Gen(kHI, 0.6, 0.1);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = 1 / (1 + std::exp(-(gate[i] + cw[i % kHI])));
    IndexerInputs in = Make(k, gate);
    in.head_bias_H = ToTensor(Gen(kHI, 0.2, 0.1), {kHI});
    in.activation = Activation::kSigmoid;
    in.score_scale = 0.5;
    return in;
  }
  // Hidden entries become 0, as the golden sums want them.
  Summary Causal(const IndexerInputs& in) const {
    std::vector<double> scores = ToVector(ScoreMatrix(in, batch.documents(), 0));
    for (double& x : scores) x = std::isinf(x) ? 0 : x;
    return Summarize(scores);
  }
  KeySets Top6() const {
    return SelectKeys(V32(), batch.documents(), std::vector<int32_t>(kT, 6), TieBreak::kOldest);
  }
  at::Tensor Attend(const KeySets& sets, const at::Tensor& lse_NH) const {
    const at::Tensor out_NHD = at::empty({kT, 4, 8}, at::kDouble);
    SparseAttention(1 / std::sqrt(8.0), sets, q_NHD, k_NJD, v_NJD, out_NHD, lse_NH);
    return out_NHD;
  }
};

void ExpectSummary(const Summary& got, const Summary& golden) {
  EXPECT_NEAR(got.sum, golden.sum, 1e-9);
  EXPECT_NEAR(got.sum_of_squares, golden.sum_of_squares, 1e-9);
  EXPECT_NEAR(got.first, golden.first, 1e-12);
  EXPECT_NEAR(got.last, golden.last, 1e-12);
}

TEST(Golden, IndexerScoresOfSeedV32AndGsa) {
  const GoldenIndexer golden;
  ExpectSummary(golden.Causal(golden.Seed()),
                {-0.05944204226991, 0.3637940506157, -0.003965192583627, 0.005358733822948});
  ExpectSummary(golden.Causal(golden.V32()),
                {-0.3500469591280, 0.2945829548915, -0.01116188429732, 0.0003849666025438});
  ExpectSummary(golden.Causal(golden.Gsa()),
                {656.8146424351, 536.0651255475, 0.6406233183206, 0.9370905966429});
}

TEST(Golden, IndexerSelectsTheSixBest) {
  const GoldenIndexer golden;
  const KeySets sets = golden.Top6();
  EXPECT_EQ(Row(sets, 10), (std::vector<int32_t>{0, 3, 6, 7, 9, 10}));
  EXPECT_EQ(Row(sets, 20), (std::vector<int32_t>{2, 5, 8, 12, 15, 19}));
  EXPECT_EQ(Row(sets, 39), (std::vector<int32_t>{6, 13, 16, 23, 30, 33}));
  const KeySets gated = SelectKeys(golden.Gsa(), golden.batch.documents(),
                                   std::vector<int32_t>(kT, 6), TieBreak::kOldest);
  EXPECT_EQ(Row(gated, 39), (std::vector<int32_t>{0, 3, 10, 17, 27, 34}));
  const at::Tensor out = golden.Attend(sets, at::empty({kT, 4}, at::kDouble));
  ExpectSummary(Summarize(SwapHeads(ToVector(out), kT, 4, 8)),
                {18.27182783435, 175.7331420025, 0.9092974268257, 0.1915158737005});
}

TEST(Golden, IndexerKlOfBothStagesAndItsGradient) {
  const GoldenIndexer golden;
  const layers::Documents documents = golden.batch.documents();
  const IndexerInputs in = golden.V32();
  const KeySets sets = golden.Top6();
  const at::Tensor lse = at::empty({kT, 4}, at::kDouble);
  golden.Attend(CausalSets(documents), lse);
  const double scale = 1 / std::sqrt(8.0);
  const KlTarget dense{golden.q_NHD, golden.k_NJD, lse.clone(), scale, nullptr};
  EXPECT_NEAR(IndexerKl(in, documents, dense, 1, 0, nullptr) / kT, 0.1258681289903, 1e-12);
  golden.Attend(sets, lse);
  const KlTarget sparse{golden.q_NHD, golden.k_NJD, lse, scale, &sets};
  IndexerGradients gradients;
  EXPECT_NEAR(IndexerKl(in, documents, sparse, 1, 1.0 / kT, &gradients) / kT, 0.1203683115346,
              1e-12);
  const auto sum_of_squares = [&](const std::vector<double>& d) {
    return Summarize(Multiply(golden.h, d, kT, /*transpose_a=*/true)).sum_of_squares;
  };
  std::vector<double> dw = ToVector(gradients.dw_NH);
  for (double& x : dw) x *= kW32;
  EXPECT_NEAR(sum_of_squares(ToVector(gradients.dq_NHI)), 5.350559207e-05, 1e-14);
  EXPECT_NEAR(sum_of_squares(golden.norm.Backward(ToVector(gradients.dk_NI))), 3.116860841e-04,
              1e-13);
  EXPECT_NEAR(sum_of_squares(dw), 1.754011332e-06, 1e-15);
}

// ---- Selection ----------------------------------------------------------------------------------

TEST(Indexer, D2SetsAreCausalOfTheDocumentAndHoldMinKVisible) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const Example example(kLengths, {}, type);
    for (const int32_t k : {0, 1, 40, 41, 1000}) {
      const KeySets sets = example.Select(k);
      ASSERT_EQ(static_cast<int64_t>(sets.offsets.size()), example.batch.rows() + 1);
      EXPECT_EQ(sets.set_heads, 1);
      EXPECT_EQ(sets.width, 1);
      for (int64_t row = 0; row < example.batch.rows(); ++row) {
        const int32_t t = example.batch.positions[static_cast<size_t>(row)];
        const std::vector<int32_t> keys = Row(sets, row);
        ASSERT_EQ(static_cast<int32_t>(keys.size()), std::min(k, t + 1));
        EXPECT_EQ(sets.end[static_cast<size_t>(row)], row + 1);
        for (size_t i = 0; i < keys.size(); ++i) {
          ASSERT_GE(keys[i], row - t);
          ASSERT_LE(keys[i], row);
          ASSERT_LT(i > 0 ? keys[i - 1] : -1, keys[i]);
        }
      }
    }
  }
}

TEST(Indexer, CountsMayDifferByRow) {
  const Example example({60}, {}, at::kFloat);
  std::vector<int32_t> counts;
  for (int32_t t = 0; t < 60; ++t) counts.push_back(t % 7);
  const KeySets sets = SelectKeys(example.in, example.documents(), counts, TieBreak::kOldest);
  const KeySets seven = example.Select(7);
  for (int64_t t = 0; t < 60; ++t) {
    const std::vector<int32_t> keys = Row(sets, t);
    const std::vector<int32_t> all = Row(seven, t);
    EXPECT_EQ(static_cast<int64_t>(keys.size()), std::min<int64_t>(t % 7, t + 1));
    EXPECT_TRUE(std::includes(all.begin(), all.end(), keys.begin(), keys.end()));
  }
}

TEST(Indexer, D6ScalingTheHeadWeightsKeepsTheSets) {
  const Example example(kLengths, {}, at::kDouble);
  const KeySets sets = example.Select(12);
  for (const double factor : {0.001, 0.5, 3.7, 1e6}) {
    Example scaled = example;
    scaled.in.w_NH = example.in.w_NH.mul(factor);
    EXPECT_EQ(scaled.Select(12).first, sets.first) << factor;
  }
}

// In place over the last dimension, a power of two: orthogonal.
at::Tensor Hadamard(const at::Tensor& t) {
  std::vector<double> x = ToVector(t);
  const size_t width = static_cast<size_t>(t.size(-1));
  for (size_t row = 0; row < x.size(); row += width) {
    for (size_t half = 1; half < width; half *= 2) {
      for (size_t i = 0; i < width; ++i) {
        if ((i & half) != 0) continue;
        const double a = x[row + i];
        const double b = x[row + i + half];
        x[row + i] = (a + b) / std::sqrt(2.0);
        x[row + i + half] = (a - b) / std::sqrt(2.0);
      }
    }
  }
  return ToTensor(x, t.sizes());
}

TEST(Indexer, D7HadamardOnQueriesAndKeysLeavesScoresUnchanged) {
  Sizes sizes;
  sizes.index_width = 32;
  for (const bool gsa : {false, true}) {
    sizes.gsa = gsa;
    const Example example({70}, sizes, at::kDouble);
    IndexerInputs rotated = example.in;
    rotated.q_NHI = Hadamard(example.in.q_NHI);
    rotated.k_NI = Hadamard(example.in.k_NI);
    EXPECT_FALSE(SameBits(rotated.k_NI, example.in.k_NI));
    std::vector<double> a = ToVector(ScoreMatrix(example.in, example.documents(), 0));
    std::vector<double> b = ToVector(ScoreMatrix(rotated, example.documents(), 0));
    for (std::vector<double>* m : {&a, &b}) {
      for (double& x : *m) x = std::isinf(x) ? -1e9 : x;
    }
    ExpectNear(a, b, 1e-11, "scores");
  }
}

TEST(Indexer, StatisticsAreThoseOfTheVisibleScores) {
  const Example example({0, 3, 50}, {}, at::kDouble);
  const ScoreStatistics got = MeasureScores(example.in, example.documents());
  const std::vector<double> scores = ToVector(ScoreMatrix(example.in, example.documents(), 2));
  for (int64_t t = 0; t < 50; ++t) {
    const std::vector<double> x(scores.begin() + t * 50, scores.begin() + t * 50 + t + 1);
    const double n = static_cast<double>(t + 1);
    const double mean = std::accumulate(x.begin(), x.end(), 0.0) / n;
    double variance = 0;
    double sum = 0;
    double entropy = 0;
    for (const double v : x) {
      variance += (v - mean) * (v - mean) / n;
      sum += std::exp(v);
    }
    for (const double v : x) entropy -= std::exp(v) / sum * (v - std::log(sum));
    EXPECT_NEAR(got.mean_N[t + 3].item<double>(), mean, 1e-12);
    EXPECT_NEAR(got.variance_N[t + 3].item<double>(), variance, 1e-11);
    EXPECT_NEAR(got.maximum_N[t + 3].item<double>(), *std::max_element(x.begin(), x.end()), 0);
    EXPECT_NEAR(got.entropy_N[t + 3].item<double>(), entropy, 1e-12);
    EXPECT_TRUE(std::isinf(scores[static_cast<size_t>(t * 50 + 49)]) || t == 49);
  }
}

// ---- Laws of packing, threads, the future -------------------------------------------------------

struct Results {
  KeySets oldest, newest;
  ScoreStatistics statistics;
  double dense_loss = 0, sparse_loss = 0;
  IndexerGradients dense, sparse;

  explicit Results(const Example& e) {
    oldest = e.Select(40);
    newest = e.Select(40, TieBreak::kNewest);
    statistics = MeasureScores(e.in, e.documents());
    dense_loss = IndexerKl(e.in, e.documents(), e.Target(nullptr), 0.5, 0.1, &dense);
    sparse_loss = IndexerKl(e.in, e.documents(), e.Target(&oldest), 0.5, 0.1, &sparse);
  }
  // Tensors with one row for each token.
  std::vector<at::Tensor> RowTensors() const {
    return {statistics.mean_N, statistics.variance_N, statistics.maximum_N, statistics.entropy_N,
            dense.dq_NHI,      dense.dk_NI,           dense.dw_NH,          sparse.dq_NHI,
            sparse.dk_NI,      sparse.dw_NH};
  }
};

TEST(Indexer, C5ThreadsAndRunsGiveTheSameBits) {
  const int threads = at::get_num_threads();
  for (const Sizes& sizes : AllSizes()) {
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
      const Example example(kLengths, sizes, type);
      at::set_num_threads(1);
      const Results one(example);
      for (const int many : {2, 3, 2}) {
        at::set_num_threads(many);
        const Results got(example);
        EXPECT_EQ(got.oldest.first, one.oldest.first);
        EXPECT_EQ(got.newest.first, one.newest.first);
        EXPECT_EQ(got.dense_loss, one.dense_loss);
        EXPECT_EQ(got.sparse_loss, one.sparse_loss);
        for (size_t i = 0; i < one.RowTensors().size(); ++i) {
          EXPECT_TRUE(SameBits(got.RowTensors()[i], one.RowTensors()[i])) << "tensor " << i;
        }
        if (!sizes.gsa) continue;
        EXPECT_TRUE(SameBits(got.dense.dhead_bias_H, one.dense.dhead_bias_H));
        EXPECT_TRUE(SameBits(got.sparse.dhead_bias_H, one.sparse.dhead_bias_H));
      }
    }
  }
  at::set_num_threads(threads);
}

// The document b alone.
Example Alone(const Example& all, size_t b) {
  const int64_t start = all.batch.cu[b];
  const int64_t length = all.batch.cu[b + 1] - start;
  Example one = all;
  one.batch = Batch({static_cast<int32_t>(length)});
  for (at::Tensor* t : {&one.in.q_NHI, &one.in.k_NI, &one.in.w_NH, &one.q_NHD, &one.k_NJD}) {
    *t = t->narrow(0, start, length).contiguous();
  }
  return one;
}

TEST(Indexer, C2PackedEqualsAloneBitForBit) {
  for (const Sizes& sizes : AllSizes()) {
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
      const Example example(kLengths, sizes, type);
      const Results packed(example);
      double dense_loss = 0;
      double sparse_loss = 0;
      for (size_t b = 0; b < kLengths.size(); ++b) {
        const int32_t start = example.batch.cu[b];
        const Results alone(Alone(example, b));
        dense_loss += alone.dense_loss;
        sparse_loss += alone.sparse_loss;
        for (int64_t t = 0; t < kLengths[b]; ++t) {
          std::vector<int32_t> keys = Row(alone.oldest, t);
          for (int32_t& key : keys) key += start;
          ASSERT_EQ(Row(packed.oldest, start + t), keys);
          keys = Row(alone.newest, t);
          for (int32_t& key : keys) key += start;
          ASSERT_EQ(Row(packed.newest, start + t), keys);
        }
        for (size_t i = 0; i < packed.RowTensors().size(); ++i) {
          EXPECT_TRUE(
              SameBits(packed.RowTensors()[i].narrow(0, start, kLengths[b]), alone.RowTensors()[i]))
              << "document " << b << " tensor " << i;
        }
      }
      EXPECT_NEAR(packed.dense_loss, dense_loss, 1e-9 * std::abs(dense_loss));
      EXPECT_NEAR(packed.sparse_loss, sparse_loss, 1e-9 * std::abs(sparse_loss));
    }
  }
}

// C7 and C1: a later token changes nothing of the rows before it, bit for bit.
TEST(Indexer, C7LaterTokensChangeNothingBefore) {
  const int64_t from = 70;
  for (const Sizes& sizes : AllSizes()) {
    const Example example({100}, sizes, at::kFloat);
    Example changed = example;
    for (at::Tensor* t :
         {&changed.in.q_NHI, &changed.in.k_NI, &changed.in.w_NH, &changed.q_NHD, &changed.k_NJD}) {
      *t = t->clone();
      t->narrow(0, from, 100 - from).mul_(-1.5);
    }
    const Results before(example);
    const Results after(changed);
    for (int64_t t = 0; t < from; ++t) {
      ASSERT_EQ(Row(before.oldest, t), Row(after.oldest, t));
      ASSERT_EQ(Row(before.newest, t), Row(after.newest, t));
    }
    const std::vector<at::Tensor> a = before.RowTensors();
    const std::vector<at::Tensor> b = after.RowTensors();
    for (size_t i = 0; i < a.size(); ++i) {
      if (i == 5 || i == 8) continue;  // dk gathers from later rows
      EXPECT_TRUE(SameBits(a[i].narrow(0, 0, from), b[i].narrow(0, 0, from))) << "tensor " << i;
      EXPECT_FALSE(SameBits(a[i], b[i])) << "tensor " << i;
    }
  }
}

TEST(Indexer, C9EmptyBatchesHaveNoRowsAndNoLoss) {
  for (const std::vector<int32_t>& lengths : {std::vector<int32_t>{}, {0}, {0, 0}}) {
    const Example example(lengths, {}, at::kFloat);
    const KeySets sets = example.Select(8);
    EXPECT_EQ(sets.offsets, (std::vector<int64_t>{0}));
    EXPECT_EQ(MeasureScores(example.in, example.documents()).mean_N.numel(), 0);
    IndexerGradients gradients;
    EXPECT_EQ(IndexerKl(example.in, example.documents(), example.Target(&sets), 1, 1, &gradients),
              0.0);
    EXPECT_EQ(gradients.dk_NI.numel(), 0);
  }
}

TEST(IndexerDeathTest, RefusesScoresInBf16AndSetsPerHead) {
  const Example e({9}, {}, at::kFloat);
  Example half = e;
  for (at::Tensor* t : {&half.in.q_NHI, &half.in.k_NI, &half.in.w_NH}) *t = t->to(at::kBFloat16);
  EXPECT_DEATH(half.Select(3), "fp32 or fp64");
  KeySets sets = e.Select(3);
  const KlTarget target = e.Target(&sets);
  sets.set_heads = 2;
  EXPECT_DEATH(IndexerKl(e.in, e.documents(), target, 1, 1, nullptr), "shared by all heads");
}

}  // namespace
}  // namespace heddle::attention
