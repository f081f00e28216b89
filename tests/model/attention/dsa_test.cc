// DSA layers: golden values of section 14 and the D points of section 13.
#include "model/attention/dsa_layer.h"

#include <ATen/ops/cat.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <numeric>

#include "model/attention/dsa_indexer.h"
#include "tests/model/attention/indexed_harness.h"
#include "tests/model/attention/injected_heads.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using heddle::v1::DsaConfig;
using model_test::AllZero;
using model_test::CacheRowsOf;
using model_test::FromVector;
using model_test::Gen;
using model_test::IndexedFixture;
using model_test::Infer;
using model_test::IsIndexer;
using model_test::LayerHarness;
using model_test::MakeIndexed;
using model_test::MaxDifference;
using model_test::RandomTensor;
using model_test::RunLayer;
using model_test::RunOptions;
using model_test::RunResult;
using model_test::SameBits;
using model_test::SelectedKeys;
using model_test::TestDocuments;
using model_test::ToVector;

constexpr int64_t kWidth = 10;
const DsaConfig::Profile kProfiles[] = {DsaConfig::PROFILE_SEED, DsaConfig::PROFILE_V32};

// ---- Golden values ------------------------------------------------------------------------------

// The golden layer: v32 scaling and LayerNorm without gain, bias and rotation, top 6.
struct GoldenDsa {
  GoldenDsa() {
    heddle::v1::ModelConfig config = model_test::InjectedConfig();
    config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
    DsaConfig* dsa = config.mutable_attention()->mutable_dsa();
    dsa->set_n_indexer_heads(3);
    dsa->set_d_indexer(4);
    dsa->set_topk(6);
    harness = std::make_unique<LayerHarness>(config, at::kDouble);
    IndexedLayer::Parts parts;
    parts.indexer = std::make_unique<DsaIndexer>(harness->config(), harness->storage(),
                                                 harness->ropes(), /*rotary_dims=*/0, nullptr);
    layer = std::make_unique<IndexedLayer>(harness->config(), harness->storage(), harness->ropes(),
                                           std::move(parts));
    model_test::InjectHeads(harness.get());
    model_test::InjectIndexer(harness.get());
    harness->Weight("self_attn.indexer.k_norm.weight").fill_(1.0);
  }
  std::unique_ptr<LayerHarness> harness;
  std::unique_ptr<IndexedLayer> layer;
};

TEST(Dsa, GoldenSelectionAndOutputOfTopSix) {
  GoldenDsa golden;
  const TestDocuments document({model_test::kInjectedRows});
  const at::Tensor h = model_test::InjectedInput();
  golden.harness->ZeroGradients();
  const RunResult r =
      RunLayer(golden.layer.get(), document, h, model_test::InjectedOutputGradient());
  const auto keys = SelectedKeys(*golden.layer->selection(), document);
  EXPECT_EQ(keys[10], (std::vector<int32_t>{0, 3, 6, 7, 9, 10}));
  EXPECT_EQ(keys[20], (std::vector<int32_t>{2, 5, 8, 12, 15, 19}));
  EXPECT_EQ(keys[39], (std::vector<int32_t>{6, 13, 16, 23, 30, 33}));
  model_test::ExpectSummary(model_test::InjectedOutput(r.out),
                            {18.27182783435, 175.7331420025, 0.9092974268257, 0.1915158737005});
  // On the one-hot rows the projections' gradients are those of the unrotated q, k and v.
  const auto squares = [&](const char* name) {
    const at::Tensor gradient = golden.harness->Gradient(name).narrow(
        1, model_test::kInjectedHidden, model_test::kInjectedRows);
    return model_test::Summarize(ToVector(gradient)).sum_of_squares;
  };
  EXPECT_NEAR(squares("self_attn.q_proj.weight"), 140.2906437508, 1e-8);
  EXPECT_NEAR(squares("self_attn.k_proj.weight"), 344.3917438885, 1e-8);
  EXPECT_NEAR(squares("self_attn.v_proj.weight"), 399.8158597680, 1e-8);
}

TEST(Dsa, GoldenScoresKlAndIndexerGradients) {
  GoldenDsa golden;
  const TestDocuments document({model_test::kInjectedRows});
  const at::Tensor h = model_test::InjectedInput();
  layers::BufferPool pool;
  const IndexRows rows = golden.layer->indexer().Project(document.positions(), h, h, &pool);
  const layers::Documents view = document.view();
  std::vector<double> scores = ToVector(ScoreMatrix(rows.inputs, view, 0));
  for (double& score : scores) score = std::isinf(score) ? 0 : score;
  model_test::ExpectSummary(
      scores, {-0.3500469591280, 0.2945829548915, -0.01116188429732, 0.0003849666025438});

  RunOptions options;
  options.step.row_scale = 1.0 / model_test::kInjectedRows;
  const at::Tensor none = at::zeros(h.sizes(), h.options());
  EXPECT_NEAR(RunLayer(golden.layer.get(), document, h, none, options).losses.indexer,
              0.1203683115346, 1e-12);
  const auto squares = [&](const char* name) {
    const at::Tensor gradient = golden.harness->Gradient(name);
    return model_test::Summarize(ToVector(gradient.narrow(1, 0, 12))).sum_of_squares;
  };
  EXPECT_NEAR(squares("self_attn.indexer.q_proj.weight"), 5.350559207e-05, 1e-13);
  EXPECT_NEAR(squares("self_attn.indexer.k_proj.weight"), 3.116860841e-04, 1e-12);
  EXPECT_NEAR(squares("self_attn.indexer.weights_proj.weight"), 1.754011332e-06, 1e-14);
  options.step.indexer_warmup = true;
  EXPECT_NEAR(RunLayer(golden.layer.get(), document, h, none, options).losses.indexer,
              0.1258681289903, 1e-12);
}

// ---- Section 13 ---------------------------------------------------------------------------------

// Dense attention on the same weights.
std::unique_ptr<layers::Sublayer> DenseOn(IndexedFixture* f, std::unique_ptr<AttentionCore>* core,
                                          const TestDocuments& documents) {
  *core = MakeDense(f->layer->scale());
  (*core)->Begin(documents.cu());
  return MakeGqa(f->harness->config(), f->harness->storage(), f->harness->ropes(), core->get());
}

TEST(Dsa, D1X1EverythingVisibleFitsIntoTheSelectionIsDense) {
  for (const DsaConfig::Profile profile : kProfiles) {
    IndexedFixture f = MakeIndexed(model_test::DsaConfig(profile, 30));
    const TestDocuments documents({30, 0, 12});
    std::unique_ptr<AttentionCore> core;
    const auto dense = DenseOn(&f, &core, documents);
    const at::Tensor h = RandomTensor({42, kWidth}, 61);
    const at::Tensor dout = RandomTensor({42, kWidth}, 62);
    std::vector<at::Tensor> gradients;
    std::vector<RunResult> runs;
    for (layers::Sublayer* layer : {dense.get(), static_cast<layers::Sublayer*>(f.layer.get())}) {
      f.harness->ZeroGradients();
      runs.push_back(RunLayer(layer, documents, h, dout));
      gradients.push_back(f.harness->gradients().clone());
    }
    EXPECT_TRUE(f.layer->selection()->dense);
    EXPECT_LE(MaxDifference(runs[0].out, runs[1].out), 1e-12);
    EXPECT_LE(MaxDifference(runs[0].dh, runs[1].dh), 1e-12);
    EXPECT_LE(MaxDifference(gradients[0], gradients[1]), 1e-11);
  }
}

// With one key too few the last row must differ from dense, else the selection is not applied.
TEST(Dsa, D1OneKeyShortOfDenseChangesTheLastRowOnly) {
  IndexedFixture f = MakeIndexed(model_test::DsaConfig(DsaConfig::PROFILE_V32, 29));
  const TestDocuments documents({30});
  std::unique_ptr<AttentionCore> core;
  const auto dense = DenseOn(&f, &core, documents);
  const at::Tensor h = RandomTensor({30, kWidth}, 63);
  const at::Tensor expected = Infer(dense.get(), documents, h);
  const at::Tensor got = Infer(f.layer.get(), documents, h);
  EXPECT_LE(MaxDifference(got.narrow(0, 0, 29), expected.narrow(0, 0, 29)), 1e-12);
  EXPECT_GT(MaxDifference(got.narrow(0, 29, 1), expected.narrow(0, 29, 1)), 1e-6);
}

TEST(Dsa, D2SelectionsHaveMinOfKAndVisibleKeysAndNoFutureOrForeignOne) {
  for (const DsaConfig::Profile profile : kProfiles) {
    const IndexedFixture f = MakeIndexed(model_test::DsaConfig(profile, 7));
    const TestDocuments documents({25, 0, 1, 7, 8, 40});
    const at::Tensor h = RandomTensor({documents.rows(), kWidth}, 64);
    RunLayer(f.layer.get(), documents, h, h);
    const KeySets& sets = f.layer->selection()->sets;
    EXPECT_FALSE(f.layer->selection()->dense);
    EXPECT_EQ(sets.width, 1);
    EXPECT_EQ(sets.set_heads, 1);
    for (int64_t t = 0; t < documents.rows(); ++t) {
      const size_t i = static_cast<size_t>(t);
      const int32_t position = documents.positions()[i];
      const std::vector<int32_t> keys(sets.first.begin() + sets.offsets[i],
                                      sets.first.begin() + sets.offsets[i + 1]);
      EXPECT_EQ(static_cast<int32_t>(keys.size()), std::min(7, position + 1));
      EXPECT_EQ(std::ranges::adjacent_find(keys, std::ranges::greater_equal{}), keys.end());
      EXPECT_GE(keys.front(), t - position);
      EXPECT_LE(keys.back(), t);
    }
  }
}

TEST(Dsa, EqualScoresAreBrokenTowardsTheOldestOrTheNewestKey) {
  for (const bool newest : {false, true}) {
    heddle::v1::ModelConfig config = model_test::DsaConfig(DsaConfig::PROFILE_SEED, 4);
    if (newest) {
      config.mutable_attention()->mutable_dsa()->set_tie_break(DsaConfig::TIE_BREAK_NEWEST);
    }
    const IndexedFixture f = MakeIndexed(config);
    f.harness->Weight("self_attn.indexer.weights_proj.weight").zero_();
    const TestDocuments documents({12, 9});
    const at::Tensor h = RandomTensor({21, kWidth}, 65);
    RunLayer(f.layer.get(), documents, h, h);
    const auto keys = SelectedKeys(*f.layer->selection(), documents);
    EXPECT_EQ(keys[11],
              newest ? (std::vector<int32_t>{8, 9, 10, 11}) : (std::vector<int32_t>{0, 1, 2, 3}));
    EXPECT_EQ(keys[12 + 6],
              newest ? (std::vector<int32_t>{3, 4, 5, 6}) : (std::vector<int32_t>{0, 1, 2, 3}));
  }
}

TEST(Dsa, D6ScalingAllHeadWeightsKeepsTheSelection) {
  for (const DsaConfig::Profile profile : kProfiles) {
    const IndexedFixture f = MakeIndexed(model_test::DsaConfig(profile, 5));
    const TestDocuments documents({40});
    const at::Tensor h = RandomTensor({40, kWidth}, 66);
    RunLayer(f.layer.get(), documents, h, h);
    const auto before = SelectedKeys(*f.layer->selection(), documents);
    f.harness->Weight("self_attn.indexer.weights_proj.weight").mul_(7.5);
    RunLayer(f.layer.get(), documents, h, h);
    EXPECT_EQ(SelectedKeys(*f.layer->selection(), documents), before);
    f.harness->Weight("self_attn.indexer.weights_proj.weight").mul_(-1);
    RunLayer(f.layer.get(), documents, h, h);
    EXPECT_NE(SelectedKeys(*f.layer->selection(), documents), before);
  }
}

// LayerNorm and rotation by plain loops: pairs (i, i + dr/2) of the first dr = dI/2 dims, at the
// position within the document.
std::vector<double> ExpectedIndexKey(LayerHarness* harness, const at::Tensor& row, int position) {
  const at::Tensor raw = row.matmul(harness->Weight("self_attn.indexer.k_proj.weight").t());
  std::vector<double> x = ToVector(raw);
  const std::vector<double> gain = ToVector(harness->Weight("self_attn.indexer.k_norm.weight"));
  const std::vector<double> bias = ToVector(harness->Weight("self_attn.indexer.k_norm.bias"));
  const double width = static_cast<double>(x.size());
  const double mean = std::accumulate(x.begin(), x.end(), 0.0) / width;
  double variance = 0;
  for (const double v : x) variance += (v - mean) * (v - mean) / width;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = (x[i] - mean) / std::sqrt(variance + 1e-6) * gain[i] + bias[i];
  }
  const size_t half = x.size() / 4;
  for (size_t i = 0; i < half; ++i) {
    const double angle =
        position * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
    const double a = x[i], b = x[i + half];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + half] = b * std::cos(angle) + a * std::sin(angle);
  }
  return x;
}

TEST(Dsa, D12V32RotatesTheFirstHalfOfTheDimsInHalfLayout) {
  heddle::v1::ModelConfig config = model_test::DsaConfig(DsaConfig::PROFILE_V32, 5);
  for (const bool interleaved : {false, true}) {
    // The indexer's layout is half whatever the model's is.
    if (interleaved) {
      config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
    }
    const IndexedFixture f = MakeIndexed(config);
    const TestDocuments documents({5, 20});
    const at::Tensor h = RandomTensor({25, kWidth}, 67);
    const layers::CacheRows rows = CacheRowsOf(f.layer.get(), documents, h);
    for (const int64_t t : {0, 3, 6, 24}) {
      const std::vector<double> expected = ExpectedIndexKey(
          f.harness.get(), h.narrow(0, t, 1), documents.positions()[static_cast<size_t>(t)]);
      EXPECT_LE(
          MaxDifference(rows.index_k.narrow(0, t, 1).reshape({-1}), FromVector(expected, {8})),
          1e-12);
    }
  }
}

// Shifting a document in time changes no score: queries and keys are rotated alike.
TEST(Dsa, D12ScoresDependOnDistancesOnly) {
  const IndexedFixture f = MakeIndexed(model_test::DsaConfig(DsaConfig::PROFILE_V32, 5));
  const at::Tensor h = RandomTensor({8, kWidth}, 68);
  layers::BufferPool pool;
  const std::vector<int32_t> early = {0, 1, 2, 3, 4, 5, 6, 7};
  const std::vector<int32_t> late = {30, 31, 32, 33, 34, 35, 36, 37};
  const std::vector<int32_t> stretched = {0, 3, 6, 9, 12, 15, 18, 21};
  const auto scores = [&](const std::vector<int32_t>& positions) {
    const IndexRows rows = f.layer->indexer().Project(positions, h, h, &pool);
    return f.layer->indexer().ScoreCached(rows, 7, {rows.key_NI}).clone();
  };
  EXPECT_LE(MaxDifference(scores(early), scores(late)), 1e-12);
  EXPECT_GT(MaxDifference(scores(early), scores(stretched)), 1e-3);
}

TEST(Dsa, LayersThatShareASelectionFollowTheOneThatMadeIt) {
  heddle::v1::ModelConfig config = model_test::DsaConfig(DsaConfig::PROFILE_V32, 5);
  config.set_n_layers(2);
  config.mutable_attention()->mutable_dsa()->set_index_share_every(2);
  IndexedFixture full = MakeIndexed(config);
  LayerHarness without(config, at::kDouble, /*layer=*/1);
  without.Randomize(90);
  const auto sharing =
      MakeDsa(without.config(), without.storage(), without.ropes(), full.shared.get());
  EXPECT_FALSE(sharing->indexer().has_weights());
  const TestDocuments documents({20, 9});
  const at::Tensor h = RandomTensor({29, kWidth}, 69);
  RunOptions options;
  options.step.row_scale = 0.1;
  RunLayer(full.layer.get(), documents, h, h, options);
  const RunResult once = RunLayer(sharing.get(), documents, h, h, options);
  EXPECT_EQ(once.losses.indexer, 0);
  EXPECT_EQ(full.layer->selection(), sharing->selection());

  // Recomputed after another batch went through the first layer: its own selection is kept.
  RunLayer(full.layer.get(), documents, h, h, options);
  options.recompute = true;
  options.between = [&] {
    const TestDocuments other({29});
    RunLayer(full.layer.get(), other, h.flip(0), h);
  };
  const RunResult again = RunLayer(sharing.get(), documents, h, h, options);
  EXPECT_TRUE(SameBits(once.out, again.out));
  EXPECT_TRUE(SameBits(once.dh, again.dh));
}

// ---- D8 -----------------------------------------------------------------------------------------

// Adam on the tensors of an indexer.
class IndexerAdam {
 public:
  IndexerAdam(LayerHarness* harness, double rate) : harness_(harness), rate_(rate) {
    for (const std::string& name : harness->names()) {
      if (!IsIndexer(name)) continue;
      const at::Tensor weight = harness->Weight(name);
      states_.push_back({name, at::zeros(weight.sizes(), weight.options()),
                         at::zeros(weight.sizes(), weight.options())});
    }
  }
  void Step() {
    ++step_;
    const double first = 1 - std::pow(0.9, step_), second = 1 - std::pow(0.99, step_);
    for (State& s : states_) {
      const at::Tensor g = harness_->Gradient(s.name);
      s.mean.mul_(0.9).add_(g, 0.1);
      s.square.mul_(0.99).add_(g.mul(g), 0.01);
      harness_->Weight(s.name).addcdiv_(s.mean.div(first), s.square.div(second).sqrt_().add_(1e-10),
                                        -rate_);
    }
  }

 private:
  struct State {
    std::string name;
    at::Tensor mean;
    at::Tensor square;
  };
  LayerHarness* harness_;
  double rate_;
  int step_ = 0;
  std::vector<State> states_;
};

constexpr int32_t kPlantedLength = 256;
constexpr int32_t kPlantedKeys = kPlantedLength / 16;
constexpr int64_t kPlantedWidth = 24;

// A layer whose attention looks for tokens of the query's own topic: x = topic + noise, and q and k
// are the same sharp projection of x.
IndexedFixture PlantedLayer(DsaConfig::Profile profile, uint64_t seed) {
  heddle::v1::ModelConfig config = model_test::DsaConfig(profile, kPlantedKeys, kPlantedWidth);
  config.set_head_dim(kPlantedWidth);
  config.set_n_heads(2);
  config.set_n_kv_heads(1);
  config.mutable_rope()->set_theta(1e12);  // only the first three pairs move
  config.mutable_attention()->mutable_dsa()->set_d_indexer(32);
  IndexedFixture f = MakeIndexed(config, at::kFloat, seed);
  for (const std::string& name : f.harness->names()) {
    if (!IsIndexer(name)) continue;
    const at::Tensor weight = f.harness->Weight(name);
    weight.copy_(RandomTensor(weight.sizes().vec(), ++seed,
                              1.0 / std::sqrt(static_cast<double>(kPlantedWidth))));
  }
  if (profile == DsaConfig::PROFILE_V32) {
    f.harness->Weight("self_attn.indexer.k_norm.weight").fill_(1);
  }
  at::Tensor sharp = at::zeros({2 * kPlantedWidth, kPlantedWidth}, at::kFloat);
  for (int64_t i = 0; i < 2 * kPlantedWidth; ++i) {
    // Pairs (i, i + D/2) that turn within a document are left out: content alone decides.
    if (i % (kPlantedWidth / 2) >= 3) sharp[i][i % kPlantedWidth] = 1.7;
  }
  f.harness->Set("self_attn.q_proj.weight", sharp);
  f.harness->Set("self_attn.k_proj.weight", sharp.narrow(0, 0, kPlantedWidth));
  f.harness->ropes()->Ensure(kPlantedLength);
  return f;
}

// Rows of one document: 32 topics of random signs, so that a query has about 8 keys of its own
// topic at the end of the document.
at::Tensor PlantedDocument(uint64_t seed) {
  constexpr uint64_t kTopics = 32;
  const Rng topics(17, "test.topics"), draw(seed, "test.planted");
  at::Tensor x = RandomTensor({kPlantedLength, kPlantedWidth}, seed, 0.15);
  double* data = x.data_ptr<double>();
  for (int64_t t = 0; t < kPlantedLength; ++t) {
    const uint64_t topic = draw.BelowAt(static_cast<uint64_t>(t), kTopics);
    for (int64_t i = 0; i < kPlantedWidth; ++i) {
      data[t * kPlantedWidth + i] +=
          topics.At(topic * kPlantedWidth + static_cast<uint64_t>(i)) % 2 == 0 ? 1.0 : -1.0;
    }
  }
  return x.to(at::kFloat);
}

// Mean over the rows that must choose of the attention mass on the selected keys, and of k / t.
struct Recall {
  double mass = 0;
  double random = 0;
};
Recall MeasureRecall(IndexedLayer* layer, const at::Tensor& h) {
  const TestDocuments document({kPlantedLength});
  layers::BufferPool pool;
  const IndexedRows rows = layer->Project(document.positions(), h, &pool);
  RunLayer(layer, document, h, h);
  const auto keys = SelectedKeys(*layer->selection(), document);
  const std::vector<double> q = ToVector(rows.q_NHD), k = ToVector(rows.k_NJD);
  Recall recall;
  int64_t counted = 0;
  for (int32_t t = kPlantedKeys; t < kPlantedLength; ++t) {
    for (int64_t head = 0; head < 2; ++head) {
      double total = 0, selected = 0;
      for (int32_t s = 0; s <= t; ++s) {
        double dot = 0;
        for (int64_t i = 0; i < kPlantedWidth; ++i) {
          dot += q[static_cast<size_t>((t * 2 + head) * kPlantedWidth + i)] *
                 k[static_cast<size_t>(s * kPlantedWidth + i)];
        }
        const double weight = std::exp(layer->scale() * dot);
        total += weight;
        if (std::ranges::binary_search(keys[static_cast<size_t>(t)], s)) selected += weight;
      }
      recall.mass += selected / total;
      recall.random += static_cast<double>(kPlantedKeys) / (t + 1);
      ++counted;
    }
  }
  recall.mass /= static_cast<double>(counted);
  recall.random /= static_cast<double>(counted);
  return recall;
}

TEST(Dsa, D8WarmupTeachesTheIndexerToFindThePlantedKeys) {
  for (const DsaConfig::Profile profile : kProfiles) {
    const IndexedFixture f = PlantedLayer(profile, 3);
    const at::Tensor held_out = PlantedDocument(999);
    const Recall before = MeasureRecall(f.layer.get(), held_out);
    const at::Tensor main = f.harness->Weight("self_attn.q_proj.weight").clone();
    IndexerAdam adam(f.harness.get(), 1e-2);
    double first_loss = 0, last_loss = 0;
    constexpr int kSteps = 150;
    for (int step = 0; step < kSteps; ++step) {
      const at::Tensor h = PlantedDocument(static_cast<uint64_t>(step) + 1);
      RunOptions options;
      options.step.row_scale = 1.0 / kPlantedLength;
      options.step.indexer_warmup = true;
      f.harness->ZeroGradients();
      last_loss = RunLayer(f.layer.get(), TestDocuments({kPlantedLength}), h,
                           at::zeros(h.sizes(), h.options()), options)
                      .losses.indexer;
      if (step == 0) first_loss = last_loss;
      adam.Step();
    }
    const Recall after = MeasureRecall(f.layer.get(), held_out);
    std::printf(
        "%s: recall %.3f before, %.3f after %d steps, random %.3f: factor %.1f; KL %.3f -> "
        "%.3f\n",
        profile == DsaConfig::PROFILE_V32 ? "v32" : "seed", before.mass, after.mass, kSteps,
        after.random, after.mass / after.random, first_loss, last_loss);
    EXPECT_TRUE(SameBits(main, f.harness->Weight("self_attn.q_proj.weight")));
    EXPECT_LT(last_loss, 0.5 * first_loss);
    EXPECT_GT(after.mass, 0.9);
    EXPECT_GT(after.mass, 4 * after.random);
    EXPECT_LT(before.mass, 0.7 * after.mass);
  }
}

}  // namespace
}  // namespace heddle::attention
