#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/indexer/reference.h"
#include "model/attention/indexer.h"
#include "tests/model/attention/allocation_meter.h"
#include "tests/model/attention/indexer_example.h"

namespace heddle::attention {
namespace {

namespace ki = kernels::indexer;
using model_test::AllocationMeter;
using model_test::AllSizes;
using model_test::Example;
using model_test::ExpectNear;
using model_test::kLengths;
using model_test::SameBits;
using model_test::Sizes;
using model_test::ToTensor;
using model_test::ToVector;

// ---- KL -----------------------------------------------------------------------------------------

// Scores that are free parameters: one head, k[s] = e_s, w = 1, so I[t,s] = q[t,s] > 0 and
// dL/dI = dq.
struct FreeScores {
  static constexpr int64_t kRows = 24;
  Example example;
  std::vector<double> target;  // [t, s] p

  explicit FreeScores(uint64_t seed) : example({kRows}, MakeSizes(), at::kDouble, seed) {
    std::vector<double> q = ToVector(example.in.q_NHI);
    for (double& x : q) x = 0.1 + std::abs(x);
    example.in.q_NHI = ToTensor(q, {kRows, 1, kRows});
    std::vector<double> k(kRows * kRows, 0.0);
    for (size_t s = 0; s < kRows; ++s) k[s * kRows + s] = 1;
    example.in.k_NI = ToTensor(k, {kRows, kRows});
    example.in.w_NH = ToTensor(std::vector<double>(kRows, 1.0), {kRows, 1});
    FillTarget();
  }
  static Sizes MakeSizes() {
    Sizes sizes;
    sizes.index_heads = 1;
    sizes.index_width = kRows;
    return sizes;
  }
  void FillTarget() {
    const Sizes& s = example.sizes;
    const std::vector<double> q = ToVector(example.q_NHD);
    const std::vector<double> k = ToVector(example.k_NJD);
    target.assign(kRows * kRows, 0.0);
    for (int64_t t = 0; t < kRows; ++t) {
      for (int64_t h = 0; h < s.heads; ++h) {
        std::vector<double> p;
        for (int64_t key = 0; key <= t; ++key) {
          double dot = 0;
          for (int64_t i = 0; i < s.key_dim; ++i) {
            dot += q[(t * s.heads + h) * s.key_dim + i] * k[(key * 2 + h / 2) * s.key_dim + i];
          }
          p.push_back(std::exp(example.scale() * dot));
        }
        const double sum = std::accumulate(p.begin(), p.end(), 0.0);
        for (int64_t key = 0; key <= t; ++key) target[t * kRows + key] += p[key] / sum / s.heads;
      }
    }
  }
};

TEST(Indexer, D3GradientOfTheScoresIsSoftmaxMinusTarget) {
  const FreeScores free(3);
  constexpr int64_t kRows = FreeScores::kRows;
  const std::vector<double> scores = ToVector(free.example.in.q_NHI);
  for (const double temperature : {1.0, 0.125}) {
    IndexerGradients gradients;
    const double loss = IndexerKl(free.example.in, free.example.documents(),
                                  free.example.Target(nullptr), temperature, 0.7, &gradients);
    const std::vector<double> got = ToVector(gradients.dq_NHI);
    double expected_loss = 0;
    for (int64_t t = 0; t < kRows; ++t) {
      double sum = 0;
      for (int64_t s = 0; s <= t; ++s) sum += std::exp(scores[t * kRows + s] / temperature);
      double row_loss = 0;
      double row_gradient = 0;
      for (int64_t s = 0; s < kRows; ++s) {
        const double q = std::exp(scores[t * kRows + s] / temperature) / sum;
        const double p = free.target[t * kRows + s];
        const double d = s <= t ? 0.7 / temperature * (q - p) : 0;
        ASSERT_NEAR(got[t * kRows + s], d, 1e-12);
        row_gradient += got[t * kRows + s];
        if (s <= t) row_loss += p * std::log(p / q);
      }
      EXPECT_NEAR(row_gradient, 0, 1e-12);
      EXPECT_GE(row_loss, -1e-15);
      expected_loss += row_loss;
    }
    EXPECT_NEAR(loss, expected_loss, 1e-12);
    EXPECT_GT(loss, 0.1);
  }
}

TEST(Indexer, D3KlIsZeroExactlyWhenTheDistributionsAreEqual) {
  FreeScores free(4);
  constexpr int64_t kRows = FreeScores::kRows;
  const double temperature = 0.25;
  std::vector<double> scores = ToVector(free.example.in.q_NHI);
  for (int64_t t = 0; t < kRows; ++t) {
    for (int64_t s = 0; s <= t; ++s) {
      scores[t * kRows + s] = temperature * (std::log(free.target[t * kRows + s]) + 12.0 + t);
    }
  }
  free.example.in.q_NHI = ToTensor(scores, {kRows, 1, kRows});
  const auto run = [&](IndexerGradients* gradients) {
    return IndexerKl(free.example.in, free.example.documents(), free.example.Target(nullptr),
                     temperature, 1.0, gradients);
  };
  IndexerGradients gradients;
  EXPECT_NEAR(run(&gradients), 0, 1e-12);
  for (const double d : ToVector(gradients.dq_NHI)) EXPECT_NEAR(d, 0, 1e-11);
  scores[(kRows - 1) * kRows + 3] += 0.05;
  free.example.in.q_NHI = ToTensor(scores, {kRows, 1, kRows});
  EXPECT_GT(run(nullptr), 1e-6);
}

// The oracle of an example, in double.
double ReferenceLoss(const Example& e, const KeySets* sets, double temperature, double row_weight,
                     IndexerGradients* gradients) {
  const int64_t rows = e.batch.rows();
  const int64_t heads = e.sizes.index_heads;
  const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble).contiguous(); };
  const at::Tensor q = wide(e.in.q_NHI), k = wide(e.in.k_NI), w = wide(e.in.w_NH);
  const at::Tensor aq = wide(e.q_NHD), ak = wide(e.k_NJD);
  const at::Tensor bias = e.sizes.gsa ? wide(e.in.head_bias_H) : at::Tensor();
  std::vector<int32_t> first;
  for (int64_t row = 0; row < rows; ++row) {
    first.push_back(static_cast<int32_t>(row) - e.batch.positions[static_cast<size_t>(row)]);
  }
  Example exact = e;
  exact.in.q_NHI = q;
  exact.q_NHD = aq;
  exact.k_NJD = ak;
  const at::Tensor lse = exact.Lse(sets);
  const at::Tensor loss = at::empty({rows}, at::kDouble);
  const at::Tensor dbias = at::empty({rows, heads}, at::kDouble);
  *gradients = {at::empty_like(q), at::empty_like(k), at::empty_like(w), at::Tensor()};
  ki::Kl<double> p;
  p.scores = {heads,
              e.sizes.index_width,
              e.in.activation,
              e.in.score_scale,
              q.data_ptr<double>(),
              k.data_ptr<double>(),
              w.data_ptr<double>(),
              e.sizes.gsa ? bias.data_ptr<double>() : nullptr,
              first.data(),
              nullptr};
  p.offsets = sets != nullptr ? sets->offsets.data() : nullptr;
  p.selected = sets != nullptr ? sets->first.data() : nullptr;
  p.temperature = temperature;
  p.attention_heads = e.sizes.heads;
  p.kv_heads = e.sizes.kv_heads;
  p.key_dim = e.sizes.key_dim;
  p.attention_scale = e.scale();
  p.attention_q = aq.data_ptr<double>();
  p.attention_k = ak.data_ptr<double>();
  p.q_stride = aq.stride(0);
  p.k_stride = ak.stride(0);
  p.lse = lse.data_ptr<double>();
  p.loss = loss.data_ptr<double>();
  p.row_weight = row_weight;
  p.dq = gradients->dq_NHI.data_ptr<double>();
  p.dk = gradients->dk_NI.data_ptr<double>();
  p.dw = gradients->dw_NH.data_ptr<double>();
  p.dhead_bias = dbias.data_ptr<double>();
  ki::ReferenceKl(p, rows);
  gradients->dhead_bias_H = dbias.sum(0);
  return loss.sum().item<double>();
}

TEST(Indexer, D9TiledKlEqualsTheMaterialisedOne) {
  for (Sizes sizes : AllSizes()) {
    sizes.levels = 0;  // ReLU has no gradient at the kink
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
      const Example e(kLengths, sizes, type);
      const KeySets top = e.Select(40);
      const double tolerance = type == at::kFloat ? 2e-5 : 1e-11;
      for (const KeySets* sets : {static_cast<const KeySets*>(nullptr), &top}) {
        IndexerGradients expected;
        IndexerGradients got;
        const double loss = ReferenceLoss(e, sets, 0.5, 0.3, &expected);
        EXPECT_NEAR(IndexerKl(e.in, e.documents(), e.Target(sets), 0.5, 0.3, &got), loss,
                    tolerance * loss);
        EXPECT_NEAR(IndexerKl(e.in, e.documents(), e.Target(sets), 0.5, 0.3, nullptr), loss,
                    tolerance * loss);
        ExpectNear(ToVector(got.dq_NHI), ToVector(expected.dq_NHI), tolerance, "dq");
        ExpectNear(ToVector(got.dk_NI), ToVector(expected.dk_NI), tolerance, "dk");
        ExpectNear(ToVector(got.dw_NH), ToVector(expected.dw_NH), tolerance, "dw");
        EXPECT_EQ(got.dhead_bias_H.defined(), sizes.gsa);
        if (!sizes.gsa) continue;
        ExpectNear(ToVector(got.dhead_bias_H), ToVector(expected.dhead_bias_H), 10 * tolerance,
                   "dhead_bias");
      }
    }
  }
}

// Attention in bf16, and rows of it that lie apart: the target is formed in fp32 all the same.
TEST(Indexer, TakesStridedBf16Attention) {
  const Example e({50, 9}, {}, at::kFloat);
  const int64_t rows = e.batch.rows();
  const at::Tensor wide = at::empty({rows, 3, 4, 8}, at::kBFloat16);
  wide.select(1, 1).copy_(e.q_NHD);
  Example rounded = e;
  rounded.q_NHD = wide.select(1, 1).to(at::kFloat);
  rounded.k_NJD = e.k_NJD.to(at::kBFloat16).to(at::kFloat);
  KlTarget target = rounded.Target(nullptr);
  IndexerGradients expected;
  const double loss = IndexerKl(e.in, e.documents(), target, 1, 1, &expected);
  target.q_NHD = wide.select(1, 1);
  target.k_NJD = e.k_NJD.to(at::kBFloat16);
  IndexerGradients got;
  EXPECT_EQ(IndexerKl(e.in, e.documents(), target, 1, 1, &got), loss);
  EXPECT_TRUE(SameBits(got.dk_NI, expected.dk_NI));
  const at::Tensor apart = at::empty({rows, 3, 4, 8}, at::kFloat);
  apart.select(1, 2).copy_(rounded.q_NHD);
  target.q_NHD = apart.select(1, 2);
  EXPECT_EQ(IndexerKl(e.in, e.documents(), target, 1, 1, &got), loss);
  EXPECT_TRUE(SameBits(got.dk_NI, expected.dk_NI));
}

// C8: central differences of row_weight KL by every input, both stages and both activations.
TEST(Indexer, C8GradientsAreThoseOfTheLoss) {
  constexpr double kWeight = 0.4;
  constexpr double kTemperature = 0.5;
  constexpr double kStep = 1e-6;
  for (Sizes sizes : AllSizes()) {
    sizes.levels = 0;
    const Example e({1, 0, 45}, sizes, at::kDouble, 5);
    const KeySets top = e.Select(9);
    for (const KeySets* sets : {static_cast<const KeySets*>(nullptr), &top}) {
      const KlTarget target = e.Target(sets);
      IndexerGradients g;
      IndexerKl(e.in, e.documents(), target, kTemperature, kWeight, &g);
      const auto check = [&](const at::Tensor& input, const at::Tensor& gradient,
                             const std::string& what) {
        double* x = input.data_ptr<double>();
        const double* d = gradient.data_ptr<double>();
        for (int64_t i = 0; i < input.numel(); i += 1 + input.numel() / 40) {
          const double before = x[i];
          const auto loss = [&](double value) {
            x[i] = value;
            return kWeight * IndexerKl(e.in, e.documents(), target, kTemperature, 0, nullptr);
          };
          const double slope = (loss(before + kStep) - loss(before - kStep)) / (2 * kStep);
          x[i] = before;
          ASSERT_NEAR(d[i], slope, 1e-7) << what << " element " << i;
        }
      };
      check(e.in.q_NHI, g.dq_NHI, "q");
      check(e.in.k_NI, g.dk_NI, "k");
      check(e.in.w_NH, g.dw_NH, "w");
      if (sizes.gsa) check(e.in.head_bias_H, g.dhead_bias_H, "head bias");
    }
  }
}

// D11 for the kernel: no tensor of the indexer is left without a gradient.
TEST(Indexer, D11EveryInputGetsAGradientInBothStages) {
  for (Sizes sizes : AllSizes()) {
    const Example e({45}, sizes, at::kFloat);
    const KeySets top = e.Select(9);
    for (const KeySets* sets : {static_cast<const KeySets*>(nullptr), &top}) {
      IndexerGradients g;
      IndexerKl(e.in, e.documents(), e.Target(sets), 1, 1, &g);
      for (const at::Tensor& t : {g.dq_NHI, g.dk_NI, g.dw_NH}) {
        EXPECT_GT(t.abs().sum().item<double>(), 1e-3);
        EXPECT_EQ(t.isfinite().all().item<bool>(), true);
      }
      if (!sizes.gsa) continue;
      EXPECT_GT(g.dhead_bias_H.abs().sum().item<double>(), 1e-6);
    }
  }
}

TEST(Indexer, GradientsGoIntoTensorsTheCallerProvides) {
  const Example e({45}, AllSizes()[2], at::kFloat);
  IndexerGradients made;
  IndexerKl(e.in, e.documents(), e.Target(nullptr), 1, 1, &made);
  IndexerGradients given{at::empty_like(made.dq_NHI), at::empty_like(made.dk_NI),
                         at::empty_like(made.dw_NH), at::empty_like(made.dhead_bias_H)};
  for (const at::Tensor& t : {given.dq_NHI, given.dk_NI, given.dw_NH, given.dhead_bias_H}) {
    t.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  const IndexerGradients views = given;
  IndexerKl(e.in, e.documents(), e.Target(nullptr), 1, 1, &given);
  EXPECT_TRUE(SameBits(views.dq_NHI, made.dq_NHI));
  EXPECT_TRUE(SameBits(views.dk_NI, made.dk_NI));
  EXPECT_TRUE(SameBits(views.dw_NH, made.dw_NH));
  EXPECT_TRUE(SameBits(views.dhead_bias_H, made.dhead_bias_H));
}

// ---- K5: memory ---------------------------------------------------------------------------------

// Peak bytes of one call at L rows, inputs not counted.
template <typename Run>
int64_t PeakBytes(int32_t length, const Run& run) {
  Sizes sizes;
  sizes.index_heads = 1;
  sizes.index_width = 8;
  sizes.heads = 2;
  sizes.kv_heads = 1;
  const Example example({length}, sizes, at::kFloat);
  return run(example);
}

void ExpectLinear(int64_t few, int64_t many, int32_t length, const char* what) {
  EXPECT_GT(few, 0) << what;
  EXPECT_LE(many, 4.4 * static_cast<double>(few)) << what << ": " << few << " -> " << many;
  // One byte per pair would already be more.
  EXPECT_LT(many, static_cast<int64_t>(length) * length / 4) << what;
  std::printf("%s: %lld bytes at L = %d\n", what, static_cast<long long>(many), length);
}

// With one thread: others have buffers of their own, and whether they get a piece of a short
// example is a matter of luck.
TEST(Indexer, K5PeakMemoryIsLinearInLength) {
  constexpr int32_t kLong = 16384;
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto select = [](const Example& e) {
    const AllocationMeter meter;
    const KeySets sets = e.Select(64);
    EXPECT_GE(meter.peak(), static_cast<int64_t>(sets.first.size() * sizeof(int32_t)));
    return meter.peak();
  };
  ExpectLinear(PeakBytes(kLong / 4, select), PeakBytes(kLong, select), kLong, "select");
  const auto measure = [](const Example& e) {
    const AllocationMeter meter;
    MeasureScores(e.in, e.documents());
    return meter.peak();
  };
  ExpectLinear(PeakBytes(kLong / 8, measure), PeakBytes(kLong / 2, measure), kLong / 2,
               "statistics");
  const auto sparse = [](const Example& e) {
    const KeySets sets = e.Select(64);
    const KlTarget target = e.Target(&sets);
    const AllocationMeter meter;
    IndexerGradients gradients;
    IndexerKl(e.in, e.documents(), target, 1, 1, &gradients);
    return meter.peak();
  };
  ExpectLinear(PeakBytes(kLong / 4, sparse), PeakBytes(kLong, sparse), kLong, "kl selected");
  const auto dense = [](const Example& e) {
    const KlTarget target = e.Target(nullptr);
    const AllocationMeter meter;
    IndexerGradients gradients;
    IndexerKl(e.in, e.documents(), target, 1, 1, &gradients);
    return meter.peak();
  };
  ExpectLinear(PeakBytes(kLong / 16, dense), PeakBytes(kLong / 4, dense), kLong / 4, "kl all");
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace heddle::attention
