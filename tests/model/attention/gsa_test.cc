// GSA layers: golden values of section 14, the G points of section 13, key counts and their buffer.
#include "model/attention/gsa_layer.h"

#include <ATen/ops/cat.h>
#include <gtest/gtest.h>

#include <numeric>

#include "model/attention/adaptive_k.h"
#include "model/attention/gsa_indexer.h"
#include "tests/model/attention/indexed_harness.h"
#include "tests/model/attention/injected_heads.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using heddle::v1::GsaConfig;
using model_test::AllZero;
using model_test::DecodeAll;
using model_test::FixedGsaConfig;
using model_test::FromVector;
using model_test::Gen;
using model_test::IndexedFixture;
using model_test::Infer;
using model_test::LayerHarness;
using model_test::MakeIndexed;
using model_test::MaxDifference;
using model_test::RandomTensor;
using model_test::RunLayer;
using model_test::RunOptions;
using model_test::RunResult;
using model_test::SelectedKeys;
using model_test::TestDocuments;
using model_test::ToVector;

constexpr int64_t kWidth = 10;
constexpr double kSigmoidOfHalf = 0.6224593312018546;

GsaConfig* Gsa(heddle::v1::ModelConfig* config) {
  return config->mutable_attention()->mutable_gsa();
}

// Dense attention on the same projections, without gates.
at::Tensor DenseOutput(const IndexedFixture& f, const TestDocuments& documents,
                       const at::Tensor& h) {
  const std::unique_ptr<AttentionCore> core = MakeDense(f.layer->scale());
  core->Begin(documents.cu());
  const auto dense =
      MakeGqa(f.harness->config(), f.harness->storage(), f.harness->ropes(), core.get());
  return Infer(dense.get(), documents, h);
}

void SetGate(LayerHarness* harness, const std::string& name, double bias) {
  harness->Weight("self_attn." + name + ".weight").zero_();
  harness->Weight("self_attn." + name + ".bias").fill_(bias);
}

std::vector<int32_t> CountsOf(const Selection& selection) {
  std::vector<int32_t> counts;
  for (size_t t = 0; t + 1 < selection.sets.offsets.size(); ++t) {
    counts.push_back(
        static_cast<int32_t>(selection.sets.offsets[t + 1] - selection.sets.offsets[t]));
  }
  return counts;
}

// ---- Golden values ------------------------------------------------------------------------------

TEST(Gsa, GoldenScoresAndGatedOutputOfTopSix) {
  heddle::v1::ModelConfig config = model_test::InjectedConfig();
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_GSA);
  Gsa(&config)->set_n_indexer_heads(3);
  Gsa(&config)->set_d_indexer(4);
  Gsa(&config)->set_use_adaptive_k(false);
  Gsa(&config)->set_k_base(6);
  LayerHarness harness(config, at::kDouble);
  model_test::InjectHeads(&harness);
  model_test::InjectIndexer(&harness);
  harness.Set("self_attn.indexer.bias", FromVector(Gen(3, 0.2, 0.1), {3}));
  harness.Set("self_attn.indexer.weights_proj.bias", FromVector(Gen(3, 0.6, 0.1), {3}));
  harness.Set("self_attn.value_gate.weight", model_test::InjectedMatrix(16, 0.5));
  harness.Set("self_attn.output_gate.weight", model_test::InjectedMatrix(32, 1.9));
  harness.Weight("self_attn.value_gate.bias").fill_(0.5);
  harness.Weight("self_attn.output_gate.bias").fill_(0.5);
  const auto layer = MakeGsa(harness.config(), harness.storage(), harness.ropes());

  const TestDocuments document({model_test::kInjectedRows});
  const at::Tensor h = model_test::InjectedInput();
  layers::BufferPool pool;
  const IndexRows rows = layer->indexer().Project(document.positions(), h, h, &pool);
  std::vector<double> scores = ToVector(ScoreMatrix(rows.inputs, document.view(), 0));
  for (double& score : scores) score = std::isinf(score) ? 0 : score;
  model_test::ExpectSummary(scores,
                            {656.8146424351, 536.0651255475, 0.6406233183206, 0.9370905966429});
  const RunResult r = RunLayer(layer.get(), document, h, h);
  EXPECT_EQ(SelectedKeys(*layer->selection(), document)[39],
            (std::vector<int32_t>{0, 3, 10, 17, 27, 34}));
  model_test::ExpectSummary(model_test::InjectedOutput(r.out),
                            {1.769410020158, 23.90896877837, 0.2306653353583, 0.002448054296637});
}

// ---- Section 13 ---------------------------------------------------------------------------------

TEST(Gsa, G1HalfOpenGatesScaleDenseAttentionByTheirSquare) {
  const IndexedFixture f = MakeIndexed(FixedGsaConfig(40));
  SetGate(f.harness.get(), "value_gate", 0.5);
  SetGate(f.harness.get(), "output_gate", 0.5);
  const TestDocuments documents({25, 0, 40});
  const at::Tensor h = RandomTensor({65, kWidth}, 71);
  const at::Tensor dense = DenseOutput(f, documents, h);
  EXPECT_NEAR(kSigmoidOfHalf * kSigmoidOfHalf, 0.3874556190002601, 1e-15);
  EXPECT_LE(MaxDifference(Infer(f.layer.get(), documents, h), dense.mul(0.3874556190002601)),
            1e-12);
}

TEST(Gsa, G2OpenGatesAreDense) {
  for (const GsaConfig::GateForm form :
       {GsaConfig::GATE_FORM_ELEMENTWISE, GsaConfig::GATE_FORM_PER_HEAD}) {
    for (const GsaConfig::GateActivation activation :
         {GsaConfig::GATE_ACTIVATION_SIGMOID, GsaConfig::GATE_ACTIVATION_TANH}) {
      heddle::v1::ModelConfig config = FixedGsaConfig(40);
      Gsa(&config)->set_gate_form(form);
      Gsa(&config)->set_gate_activation(activation);
      const IndexedFixture f = MakeIndexed(config);
      SetGate(f.harness.get(), "value_gate", 40);
      SetGate(f.harness.get(), "output_gate", 40);
      const TestDocuments documents({30});
      const at::Tensor h = RandomTensor({30, kWidth}, 72);
      EXPECT_LE(MaxDifference(Infer(f.layer.get(), documents, h), DenseOutput(f, documents, h)),
                1e-12);
    }
  }
}

TEST(Gsa, G3AShutValueGateGivesZero) {
  const IndexedFixture f = MakeIndexed(FixedGsaConfig(5));
  SetGate(f.harness.get(), "value_gate", -40);
  const at::Tensor h = RandomTensor({30, kWidth}, 73);
  const at::Tensor out = Infer(f.layer.get(), TestDocuments({30}), h);
  EXPECT_LE(MaxDifference(out, at::zeros(out.sizes(), out.options())), 1e-15);
}

TEST(Gsa, SiluGatesMultiplyByTheirLogit) {
  heddle::v1::ModelConfig config = FixedGsaConfig(40);
  Gsa(&config)->set_gate_activation(GsaConfig::GATE_ACTIVATION_SILU);
  const IndexedFixture f = MakeIndexed(config);
  SetGate(f.harness.get(), "value_gate", 0.5);
  SetGate(f.harness.get(), "output_gate", -1.5);
  const double factor = 0.5 * kSigmoidOfHalf * -1.5 / (1 + std::exp(1.5));
  const TestDocuments documents({30});
  const at::Tensor h = RandomTensor({30, kWidth}, 74);
  EXPECT_LE(
      MaxDifference(Infer(f.layer.get(), documents, h), DenseOutput(f, documents, h).mul(factor)),
      1e-12);
}

TEST(Gsa, G4KeyCountsAreCausalAndDoNotDependOnTheBatch) {
  for (const GsaConfig::AdaptiveK kind :
       {GsaConfig::ADAPTIVE_K_VARIANCE_CAUSAL, GsaConfig::ADAPTIVE_K_ENTROPY,
        GsaConfig::ADAPTIVE_K_LEARNED}) {
    heddle::v1::ModelConfig config = model_test::GsaConfig();
    Gsa(&config)->set_adaptive_k(kind);
    Gsa(&config)->set_k_base(20);
    Gsa(&config)->set_k_min(2);
    Gsa(&config)->set_k_max(30);
    const IndexedFixture f = MakeIndexed(config);
    *f.vref() = 3e-2f;
    // Sharp scores: their entropy differs from row to row.
    f.harness->Weight("self_attn.indexer.q_proj.weight").mul_(8);
    const at::Tensor h = RandomTensor({40, kWidth}, 75);
    const auto counts = [&](const std::vector<int32_t>& lengths, const at::Tensor& rows) {
      RunLayer(f.layer.get(), TestDocuments(lengths), rows, rows);
      return CountsOf(*f.layer->selection());
    };
    const std::vector<int32_t> whole = counts({40}, h);
    const auto [low, high] = std::minmax_element(whole.begin() + 20, whole.end());
    EXPECT_LT(*low, *high) << "k must vary";
    std::vector<int32_t> prefix = counts({30}, h.narrow(0, 0, 30));
    EXPECT_TRUE(std::equal(prefix.begin(), prefix.end(), whole.begin()));
    const at::Tensor future = h.clone();
    future.narrow(0, 30, 10).mul_(-2);
    std::vector<int32_t> changed = counts({40}, future);
    EXPECT_TRUE(std::equal(changed.begin(), changed.begin() + 30, whole.begin()));
    const at::Tensor other = RandomTensor({25, kWidth}, 76, 3.0);
    const std::vector<int32_t> batch = counts({25, 40}, at::cat({other, h}));
    EXPECT_TRUE(std::equal(batch.begin() + 25, batch.end(), whole.begin()));
  }
}

TEST(Gsa, G5KeyCountsLieBetweenKMinAndKMaxOrAreTheVisibleKeys) {
  for (const float vref : {0.0f, 1e-9f, 3e-3f, 1e9f}) {
    const IndexedFixture f = MakeIndexed(model_test::GsaConfig());
    *f.vref() = vref;
    const TestDocuments documents({40, 2, 9});
    const at::Tensor h = RandomTensor({51, kWidth}, 77);
    RunLayer(f.layer.get(), documents, h, h);
    const std::vector<int32_t> counts = CountsOf(*f.layer->selection());
    for (size_t t = 0; t < counts.size(); ++t) {
      const int32_t visible = documents.positions()[t] + 1;
      EXPECT_GE(counts[t], std::min(3, visible));
      EXPECT_LE(counts[t], std::min(7, visible));
      // Little spread against the reference: k_max; much: 0.5 k_base, here below k_min.
      if (vref == 1e9f) {
        EXPECT_EQ(counts[t], std::min(7, visible));
      } else if (vref == 1e-9f && visible > 2) {
        EXPECT_EQ(counts[t], std::min(3, visible));
      } else if (vref == 0.0f) {
        EXPECT_EQ(counts[t], std::min(5, visible));
      }
    }
  }
}

TEST(Gsa, G6SigmoidScoresLieBetweenZeroAndTheNumberOfHeads) {
  const IndexedFixture f = MakeIndexed(model_test::GsaConfig());
  const at::Tensor h = RandomTensor({40, kWidth}, 78, 5.0);
  const TestDocuments document({40});
  layers::BufferPool pool;
  const IndexRows rows = f.layer->indexer().Project(document.positions(), h, h, &pool);
  const std::vector<double> scores = ToVector(ScoreMatrix(rows.inputs, document.view(), 0));
  for (int64_t t = 0; t < 40; ++t) {
    for (int64_t s = 0; s <= t; ++s) {
      EXPECT_GT(scores[static_cast<size_t>(t * 40 + s)], 0);
      EXPECT_LT(scores[static_cast<size_t>(t * 40 + s)], 3);
    }
  }
}

// Saturated head weights are 1: with a relu, no bias and DSA weights of 1 both rank alike.
TEST(Gsa, G7ReluWithSaturatedWeightsSelectsWhatDsaSelects) {
  heddle::v1::ModelConfig config = FixedGsaConfig(5);
  Gsa(&config)->set_indexer_activation(GsaConfig::INDEXER_ACTIVATION_RELU);
  const IndexedFixture gsa = MakeIndexed(config);
  const IndexedFixture dsa =
      MakeIndexed(model_test::DsaConfig(heddle::v1::DsaConfig::PROFILE_SEED, 5));
  dsa.harness->CopyFrom(gsa.harness.get());
  gsa.harness->Weight("self_attn.indexer.weights_proj.weight").zero_();
  gsa.harness->Weight("self_attn.indexer.weights_proj.bias").fill_(60);
  gsa.harness->Weight("self_attn.indexer.bias").zero_();
  // The first column of every row is 1.
  const at::Tensor h = RandomTensor({40, kWidth}, 79);
  h.narrow(1, 0, 1).fill_(1);
  const at::Tensor w = dsa.harness->Weight("self_attn.indexer.weights_proj.weight");
  w.zero_();
  w.narrow(1, 0, 1).fill_(1);
  const TestDocuments document({40});
  RunLayer(gsa.layer.get(), document, h, h);
  RunLayer(dsa.layer.get(), document, h, h);
  EXPECT_EQ(SelectedKeys(*gsa.layer->selection(), document),
            SelectedKeys(*dsa.layer->selection(), document));
}

TEST(Gsa, G8DecodingScoresEveryCachedKeyLikePrefill) {
  const IndexedFixture f = MakeIndexed(model_test::GsaConfig());
  *f.vref() = 3e-3f;
  const at::Tensor h = RandomTensor({30, kWidth}, 80);
  const TestDocuments document({30});
  layers::BufferPool pool;
  const IndexRows rows = f.layer->indexer().Project(document.positions(), h, h, &pool);
  const at::Tensor matrix = ScoreMatrix(rows.inputs, document.view(), 0);
  for (int64_t t = 0; t < 30; ++t) {
    const at::Tensor cached =
        f.layer->indexer().ScoreCached(rows, t, {rows.key_NI.narrow(0, 0, t + 1)});
    EXPECT_TRUE(model_test::SameBits(cached, matrix[t].narrow(0, 0, t + 1))) << t;
  }
  EXPECT_LE(MaxDifference(DecodeAll(f.layer.get(), h), Infer(f.layer.get(), document, h)), 1e-12);
}

TEST(Gsa, G9DenseShareOfOneIsGatedDense) {
  heddle::v1::ModelConfig config = model_test::GsaConfig();
  Gsa(&config)->set_dense_residual_alpha(1);
  heddle::v1::ModelConfig all = FixedGsaConfig(40);
  const IndexedFixture f = MakeIndexed(config), gated = MakeIndexed(all);
  gated.harness->CopyFrom(f.harness.get());
  const TestDocuments documents({30, 8});
  const at::Tensor h = RandomTensor({38, kWidth}, 81);
  for (const double row_scale : {0.0, 0.1}) {
    RunOptions options;
    options.step.row_scale = row_scale;
    const RunResult a = RunLayer(f.layer.get(), documents, h, h, options);
    const RunResult b = RunLayer(gated.layer.get(), documents, h, h);
    EXPECT_LE(MaxDifference(a.out, b.out), 1e-12);
    EXPECT_LE(MaxDifference(a.dh, b.dh), 1e-11);
    EXPECT_EQ(a.losses.indexer > 0, row_scale > 0);
  }
}

TEST(Gsa, DenseShareBlendsLinearly) {
  std::vector<at::Tensor> outs;
  for (const double share : {0.0, 0.25, 1.0}) {
    heddle::v1::ModelConfig config = FixedGsaConfig(4);
    Gsa(&config)->set_use_output_gate(false);
    Gsa(&config)->set_dense_residual_alpha(share);
    const IndexedFixture f = MakeIndexed(config);
    const at::Tensor h = RandomTensor({30, kWidth}, 82);
    outs.push_back(Infer(f.layer.get(), TestDocuments({30}), h));
  }
  EXPECT_LE(MaxDifference(outs[1], outs[0].mul(0.75).add(outs[2], 0.25)), 1e-12);
  EXPECT_GT(MaxDifference(outs[0], outs[2]), 1e-3);
}

// ---- Adaptive k ---------------------------------------------------------------------------------

GsaConfig AdaptiveConfig(GsaConfig::AdaptiveK kind) {
  GsaConfig config;
  config.set_adaptive_k(kind);
  config.set_k_base(100);
  config.set_k_min(60);
  config.set_k_max(140);
  return config;
}

TEST(AdaptiveK, VarianceAtTheReferenceGivesKBase) {
  AdaptiveK adaptive(AdaptiveConfig(GsaConfig::ADAPTIVE_K_VARIANCE_CAUSAL));
  const auto count = [&](double variance, double reference, int64_t visible = 1000) {
    return adaptive.Count({.variance = variance, .visible = visible}, reference);
  };
  EXPECT_EQ(count(1.0, 1.0), 100);
  EXPECT_EQ(count(0.0, 1.0), 140);   // 150 before the clamp
  EXPECT_EQ(count(3.0, 1.0), 75);    // 0.5 + 1/4
  EXPECT_EQ(count(100.0, 1.0), 60);  // 50.99 before the clamp
  EXPECT_EQ(count(0.5, 1.0), 116);   // 116.67: floor
  EXPECT_EQ(count(0.5, 1.0, 70), 70);
  EXPECT_EQ(count(0.5, 0.0), 100);  // no reference yet
  EXPECT_EQ(count(std::nan(""), 1.0), 60);
}

TEST(AdaptiveK, TemperatureScalesTheSpread) {
  GsaConfig config = AdaptiveConfig(GsaConfig::ADAPTIVE_K_VARIANCE_CAUSAL);
  config.set_adaptive_k_temperature(3);
  EXPECT_EQ(AdaptiveK(config).Count({.variance = 1.0, .visible = 1000}, 1.0), 75);
  // Without a reference the row lies at it: 0.5 + 1 / (1 + tau).
  EXPECT_EQ(AdaptiveK(config).Count({.variance = 9.0, .visible = 1000}, 0.0), 75);
}

TEST(AdaptiveK, EntropyOfUniformScoresGivesTheMostKeys) {
  AdaptiveK adaptive(AdaptiveConfig(GsaConfig::ADAPTIVE_K_ENTROPY));
  const double uniform = std::log(500.0);
  EXPECT_EQ(adaptive.Count({.entropy = uniform, .visible = 500}, 0), 140);
  EXPECT_EQ(adaptive.Count({.entropy = 0.5 * std::log(501.0), .visible = 500}, 0), 100);
  EXPECT_EQ(adaptive.Count({.entropy = 0, .visible = 500}, 0), 60);
  EXPECT_EQ(adaptive.Count({.entropy = 0, .visible = 1}, 0), 1);
}

TEST(AdaptiveK, PublishedVarianceCountsHiddenColumnsAsZero) {
  AdaptiveK adaptive(AdaptiveConfig(GsaConfig::ADAPTIVE_K_VARIANCE));
  // Scores 1, 3 visible of 5 columns: unbiased variance of {1, 3, 0, 0, 0} is 1.7.
  const ScoreSpread row{.mean = 2, .variance = 1, .visible = 2, .columns = 5};
  EXPECT_NEAR(adaptive.Spread(row), 1.7, 1e-12);
  EXPECT_EQ(adaptive.Spread({.mean = 2, .columns = 1}), 0);
}

TEST(AdaptiveK, LearnedCountFollowsTheMlp) {
  AdaptiveK adaptive(AdaptiveConfig(GsaConfig::ADAPTIVE_K_LEARNED));
  AdaptiveK::Mlp mlp;
  mlp.first.assign(96, 0.0);
  mlp.first_bias.assign(32, 0.0);
  mlp.second.assign(32, 0.0);
  // Hidden 4 = relu(2 mean - std + 3 max + 1), hidden 5 = relu(-mean): both reach the output.
  mlp.first[12] = 2;
  mlp.first[13] = -1;
  mlp.first[14] = 3;
  mlp.first_bias[4] = 1;
  mlp.second[4] = 0.25;
  mlp.first[15] = -1;
  mlp.second[5] = 100;
  mlp.second_bias = -1;
  adaptive.set_mlp(mlp);
  // 2 * 0.5 - 2 + 3 * 1 + 1 = 3; 0.75 - 1 = -0.25; 60 + 80 sigmoid(-0.25) = 95.03.
  EXPECT_EQ(adaptive.Count({.mean = 0.5, .variance = 4, .maximum = 1, .visible = 1000}, 0), 95);
}

TEST(Gsa, FixedCountIsKBaseOrTheVisibleKeys) {
  const IndexedFixture f = MakeIndexed(FixedGsaConfig(6));
  const TestDocuments documents({9, 3});
  const at::Tensor h = RandomTensor({12, kWidth}, 83);
  RunLayer(f.layer.get(), documents, h, h);
  EXPECT_EQ(CountsOf(*f.layer->selection()),
            (std::vector<int32_t>{1, 2, 3, 4, 5, 6, 6, 6, 6, 1, 2, 3}));
  EXPECT_TRUE(f.layer->statistics().empty());
}

// The published form compares with the batch: another document changes the counts of this one.
TEST(Gsa, PublishedVarianceDependsOnTheBatch) {
  heddle::v1::ModelConfig config = model_test::GsaConfig();
  Gsa(&config)->set_adaptive_k(GsaConfig::ADAPTIVE_K_VARIANCE);
  Gsa(&config)->set_k_base(12);
  Gsa(&config)->set_k_min(2);
  Gsa(&config)->set_k_max(20);
  const IndexedFixture f = MakeIndexed(config);
  const at::Tensor h = RandomTensor({40, kWidth}, 84);
  RunLayer(f.layer.get(), TestDocuments({40}), h, h);
  const std::vector<int32_t> alone = CountsOf(*f.layer->selection());
  const at::Tensor both = at::cat({h, RandomTensor({20, kWidth}, 88, 3.0)});
  RunLayer(f.layer.get(), TestDocuments({40, 20}), both, both);
  const std::vector<int32_t> together = CountsOf(*f.layer->selection());
  EXPECT_FALSE(std::equal(alone.begin(), alone.end(), together.begin()));
}

// ---- vref ---------------------------------------------------------------------------------------

// Mean over rows with at least two visible keys of the population variance of their scores.
double MeanVariance(const IndexedFixture& f, const TestDocuments& documents, const at::Tensor& h) {
  layers::BufferPool pool;
  const IndexRows rows = f.layer->indexer().Project(documents.positions(), h, h, &pool);
  double sum = 0;
  int64_t count = 0;
  for (int64_t t = 0; t < documents.rows(); ++t) {
    const int64_t visible = documents.positions()[static_cast<size_t>(t)] + 1;
    if (visible < 2) continue;
    const std::vector<double> scores = ToVector(
        f.layer->indexer().ScoreCached(rows, t, {rows.key_NI.narrow(0, t + 1 - visible, visible)}));
    const double mean =
        std::accumulate(scores.begin(), scores.end(), 0.0) / static_cast<double>(visible);
    double variance = 0;
    for (const double s : scores) variance += (s - mean) * (s - mean);
    sum += variance / static_cast<double>(visible);
    ++count;
  }
  return sum / static_cast<double>(count);
}

TEST(Gsa, VrefStartsAtTheFirstStepsMeanAndThenMovesByOnePercent) {
  const IndexedFixture f = MakeIndexed(model_test::GsaConfig());
  const TestDocuments documents({20, 1, 0, 11});
  for (const bool warmup : {true, false}) {
    *f.vref() = 0;
    std::ranges::fill(f.layer->statistics(), 0.0);
    RunOptions options;
    options.step.row_scale = 0.1;
    options.step.indexer_warmup = warmup;
    const at::Tensor first = RandomTensor({32, kWidth}, 85),
                     second = RandomTensor({32, kWidth}, 86);
    RunLayer(f.layer.get(), documents, first, first, options);
    EXPECT_EQ(*f.vref(), 0) << "frozen within a step";
    EXPECT_EQ(f.layer->statistics()[1], 19 + 10);
    f.layer->UpdateBuffers();
    const double mean = MeanVariance(f, documents, first);
    EXPECT_NEAR(*f.vref(), mean, 1e-6 * mean);

    std::ranges::fill(f.layer->statistics(), 0.0);
    options.recompute = true;
    RunLayer(f.layer.get(), documents, second, second, options);
    EXPECT_EQ(f.layer->statistics()[1], 19 + 10) << "a recomputation does not count";
    const double old = *f.vref();
    f.layer->UpdateBuffers();
    const double expected = 0.99 * old + 0.01 * MeanVariance(f, documents, second);
    EXPECT_NEAR(*f.vref(), expected, 1e-6 * expected);

    std::ranges::fill(f.layer->statistics(), 0.0);
    const float kept = *f.vref();
    Infer(f.layer.get(), documents, second);
    EXPECT_EQ(f.layer->statistics()[1], 0) << "an inference does not count";
    f.layer->UpdateBuffers();
    EXPECT_EQ(*f.vref(), kept) << "no rows, no change";
  }
}

// Two micro-batches, or two ranks whose sums are added, give the vref of one batch.
TEST(Gsa, VrefDoesNotDependOnHowAStepIsSplit) {
  const IndexedFixture f = MakeIndexed(model_test::GsaConfig());
  const at::Tensor h = RandomTensor({40, kWidth}, 87);
  const auto step = [&](bool split) {
    *f.vref() = 0;
    std::ranges::fill(f.layer->statistics(), 0.0);
    if (split) {
      RunLayer(f.layer.get(), TestDocuments({25}), h.narrow(0, 0, 25), h.narrow(0, 0, 25));
      const std::vector<int32_t> first = CountsOf(*f.layer->selection());
      EXPECT_EQ(first[24], 5);
      RunLayer(f.layer.get(), TestDocuments({15}), h.narrow(0, 25, 15), h.narrow(0, 25, 15));
      EXPECT_EQ(CountsOf(*f.layer->selection())[14], 5)
          << "the first step's k is k_base everywhere";
    } else {
      RunLayer(f.layer.get(), TestDocuments({25, 15}), h, h);
    }
    f.layer->UpdateBuffers();
    return *f.vref();
  };
  const float whole = step(false);
  EXPECT_GT(whole, 0);
  EXPECT_NEAR(step(true), whole, 1e-6 * whole);
}

}  // namespace
}  // namespace heddle::attention
