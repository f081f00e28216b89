// What DSA and GSA layers have in common: section 13's C and K points for every variant of both.
#include "model/attention/indexed_layer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <map>

#include "tests/model/attention/allocation_meter.h"
#include "tests/model/attention/indexed_harness.h"

namespace heddle::attention {
namespace {

using heddle::v1::DsaConfig;
using heddle::v1::GsaConfig;
using model_test::AllZero;
using model_test::CacheRowsOf;
using model_test::DecodeAll;
using model_test::IndexedFixture;
using model_test::Infer;
using model_test::IsIndexer;
using model_test::IsTrainedByKl;
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

struct Variant {
  std::string name;
  heddle::v1::ModelConfig config;
  float vref = 0;
};

std::vector<Variant> Variants() {
  std::vector<Variant> variants;
  variants.push_back({"dsa seed", model_test::DsaConfig(DsaConfig::PROFILE_SEED, 5)});
  variants.push_back({"dsa v32", model_test::DsaConfig(DsaConfig::PROFILE_V32, 5)});
  variants.push_back({"gsa variance", model_test::GsaConfig(), 2e-3f});
  variants.push_back({"gsa fixed relu per head", model_test::FixedGsaConfig(4)});
  GsaConfig* fixed = variants.back().config.mutable_attention()->mutable_gsa();
  fixed->set_indexer_activation(GsaConfig::INDEXER_ACTIVATION_RELU);
  fixed->set_gate_form(GsaConfig::GATE_FORM_PER_HEAD);
  fixed->set_gate_activation(GsaConfig::GATE_ACTIVATION_TANH);
  variants.push_back({"gsa entropy silu blend", model_test::GsaConfig()});
  GsaConfig* entropy = variants.back().config.mutable_attention()->mutable_gsa();
  entropy->set_adaptive_k(GsaConfig::ADAPTIVE_K_ENTROPY);
  entropy->set_gate_activation(GsaConfig::GATE_ACTIVATION_SILU);
  entropy->set_dense_residual_alpha(0.3);
  variants.push_back({"gsa learned without gates", model_test::GsaConfig()});
  GsaConfig* learned = variants.back().config.mutable_attention()->mutable_gsa();
  learned->set_adaptive_k(GsaConfig::ADAPTIVE_K_LEARNED);
  learned->set_use_value_gate(false);
  learned->set_use_output_gate(false);
  return variants;
}

IndexedFixture Build(const Variant& variant, at::ScalarType type = at::kDouble) {
  IndexedFixture f = MakeIndexed(variant.config, type);
  if (f.vref() != nullptr) *f.vref() = variant.vref;
  return f;
}

constexpr int64_t kWidth = 10;

RunOptions Training(double row_scale, bool warmup = false, bool recompute = false) {
  RunOptions options;
  options.step.row_scale = row_scale;
  options.step.indexer_warmup = warmup;
  options.recompute = recompute;
  return options;
}

TEST(IndexedLayer, C1PrefixesGiveThePrefixOfTheOutput) {
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    const at::Tensor h = RandomTensor({20, kWidth}, 11);
    const at::Tensor whole = Infer(f.layer.get(), TestDocuments({20}), h);
    for (int32_t t = 1; t <= 20; ++t) {
      const at::Tensor part = Infer(f.layer.get(), TestDocuments({t}), h.narrow(0, 0, t));
      ASSERT_LE(MaxDifference(part, whole.narrow(0, 0, t)), 1e-12) << variant.name << " " << t;
    }
  }
}

TEST(IndexedLayer, C2C4C9PackedDocumentsOfAnyLengthEqualEachAlone) {
  const std::vector<int32_t> lengths = {0, 1, 4, 0, 5, 6, 23, 2, 3, 0};
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    for (const bool reversed : {false, true}) {
      std::vector<int32_t> order = lengths;
      if (reversed) std::reverse(order.begin(), order.end());
      const TestDocuments packed(order);
      std::vector<at::Tensor> hs, douts;
      for (const int32_t length : order) {
        hs.push_back(RandomTensor({length, kWidth}, 100 + static_cast<uint64_t>(length)));
        douts.push_back(RandomTensor({length, kWidth}, 200 + static_cast<uint64_t>(length)));
      }
      f.harness->ZeroGradients();
      const RunResult together = RunLayer(f.layer.get(), packed, at::cat(hs), at::cat(douts));
      const at::Tensor gradients = f.harness->gradients().clone();
      f.harness->ZeroGradients();
      for (size_t b = 0; b < order.size(); ++b) {
        const RunResult alone = RunLayer(f.layer.get(), TestDocuments({order[b]}), hs[b], douts[b]);
        const auto rows = [&](const at::Tensor& t) {
          return t.narrow(0, packed.cu()[b], order[b]);
        };
        EXPECT_LE(MaxDifference(alone.out, rows(together.out)), 1e-12) << variant.name;
        EXPECT_LE(MaxDifference(alone.dh, rows(together.dh)), 1e-12) << variant.name;
      }
      EXPECT_LE(MaxDifference(f.harness->gradients(), gradients), 1e-11) << variant.name;
    }
  }
}

TEST(IndexedLayer, C3DecodingTokenByTokenEqualsPrefill) {
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    const at::Tensor h = RandomTensor({24, kWidth}, 12);
    const TestDocuments document({24});
    RunOptions options;
    const RunResult prefill = RunLayer(f.layer.get(), document, h, h, options);
    const std::vector<std::vector<int32_t>> expected =
        SelectedKeys(*f.layer->selection(), document);
    std::vector<std::vector<int32_t>> selected;
    const at::Tensor decoded = DecodeAll(f.layer.get(), h, &selected);
    EXPECT_LE(MaxDifference(decoded, prefill.out), 1e-12) << variant.name;
    EXPECT_EQ(selected, expected) << variant.name;
  }
}

TEST(IndexedLayer, CacheRowsAreThoseOfDecoding) {
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    const at::Tensor h = RandomTensor({9, kWidth}, 12);
    const TestDocuments documents({6, 3});
    const layers::CacheRows cached = CacheRowsOf(f.layer.get(), documents, h);
    layers::BufferPool pool;
    const IndexedRows rows = f.layer->Project(documents.positions(), h, &pool);
    EXPECT_TRUE(SameBits(cached.k, rows.k_NJD)) << variant.name;
    EXPECT_TRUE(SameBits(cached.v, rows.v_NJD)) << variant.name;
    EXPECT_TRUE(SameBits(cached.index_k, rows.index.key_NI)) << variant.name;
  }
}

TEST(IndexedLayer, C5RunsRepeatBitForBitOnAnyNumberOfThreads) {
  const int threads = at::get_num_threads();
  for (const Variant& variant : Variants()) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      const IndexedFixture f = Build(variant, type);
      const TestDocuments documents({30, 1, 17, 60});
      const at::Tensor h = RandomTensor({108, kWidth}, 13, 1.0, type);
      const at::Tensor dout = RandomTensor({108, kWidth}, 14, 1.0, type);
      std::vector<at::Tensor> outs, dhs, gradients;
      std::vector<double> losses;
      for (const int count : {threads, threads, 1}) {
        at::set_num_threads(count);
        f.harness->ZeroGradients();
        const RunResult r = RunLayer(f.layer.get(), documents, h, dout, Training(1.0 / 108));
        outs.push_back(r.out);
        dhs.push_back(r.dh);
        gradients.push_back(f.harness->gradients().clone());
        losses.push_back(r.losses.indexer);
      }
      at::set_num_threads(threads);
      for (size_t i = 1; i < outs.size(); ++i) {
        EXPECT_TRUE(SameBits(outs[i], outs[0])) << variant.name;
        EXPECT_TRUE(SameBits(dhs[i], dhs[0])) << variant.name;
        EXPECT_EQ(losses[i], losses[0]) << variant.name;
      }
      EXPECT_TRUE(SameBits(gradients[1], gradients[0])) << variant.name;
      // LibTorch's product of a weight's gradient sums over the rows, which some processors' BLAS
      // cuts between its threads: with another number of threads it is equal to rounding.
      double largest = 0;
      for (const double g : ToVector(gradients[0])) largest = std::max(largest, std::abs(g));
      EXPECT_LE(MaxDifference(gradients[2], gradients[0]), 1e-6 * largest) << variant.name;
    }
  }
}

TEST(IndexedLayer, C7TheFutureChangesNoBit) {
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    const TestDocuments document({20});
    const at::Tensor h = RandomTensor({20, kWidth}, 15);
    const at::Tensor before = Infer(f.layer.get(), document, h);
    for (const int64_t s : {1, 7, 19}) {
      const at::Tensor changed = h.clone();
      changed.narrow(0, s, 1).add_(1.0);
      const at::Tensor after = Infer(f.layer.get(), document, changed);
      EXPECT_TRUE(SameBits(after.narrow(0, 0, s), before.narrow(0, 0, s))) << variant.name << s;
      EXPECT_FALSE(SameBits(after, before)) << variant.name;
    }
  }
}

// Smallest distance between a selected and an unselected score of a row, over all rows.
double SelectionMargin(IndexedLayer* layer, const TestDocuments& documents, const at::Tensor& h) {
  layers::BufferPool pool;
  const IndexRows rows = layer->indexer().Project(documents.positions(), h, h, &pool);
  const std::vector<std::vector<int32_t>> selected = SelectedKeys(*layer->selection(), documents);
  double margin = 1e9;
  for (size_t b = 0; b + 1 < documents.cu().size(); ++b) {
    const int64_t first = documents.cu()[b];
    const int64_t length = documents.cu()[b + 1] - first;
    for (int64_t t = 0; t < length; ++t) {
      const std::vector<double> scores = ToVector(
          layer->indexer().ScoreCached(rows, first + t, {rows.key_NI.narrow(0, first, t + 1)}));
      const std::vector<int32_t>& keys = selected[static_cast<size_t>(first + t)];
      double in = 1e9, out = -1e9;
      for (int32_t s = 0; s <= t; ++s) {
        const bool has = std::ranges::binary_search(keys, s);
        double& side = has ? in : out;
        side = has ? std::min(side, scores[static_cast<size_t>(s)])
                   : std::max(side, scores[static_cast<size_t>(s)]);
      }
      // A relu gives exact zeros, which stay equal when something moves a little.
      if (in != 0 || out != 0) margin = std::min(margin, in - out);
    }
  }
  return margin;
}

// d(loss)/d(weights) and d(loss)/d(h) by central differences against the gradients that one
// backward gave.
class GradientCheck {
 public:
  explicit GradientCheck(const Variant& variant)
      : name_(variant.name), f_(Build(variant)), documents_({7, 0, 1, 9}) {
    const int64_t rows = documents_.rows();
    h_ = RandomTensor({rows, kWidth}, 21);
    weights_of_out_ = RandomTensor({rows, kWidth}, 22);
  }

  // Main loss sum(out R) alone: reaches everything but the indexer.
  void CheckMainLoss(bool warmup) {
    const RunOptions options = Training(0, warmup);
    const RunResult r = Analytic(weights_of_out_, options);
    EXPECT_EQ(r.losses.indexer, 0);
    if (!warmup) {
      EXPECT_GT(SelectionMargin(f_.layer.get(), documents_, h_), 1e-4) << name_;
    }
    const auto loss = [&] { return MainLoss(options); };
    for (const std::string& tensor : f_.harness->names()) {
      if (IsIndexer(tensor)) {
        EXPECT_TRUE(AllZero(gradients_[tensor])) << name_ << " D4 " << tensor;
      }
      ExpectDifferences(tensor, f_.harness->Weight(tensor), gradients_[tensor], loss);
    }
    ExpectDifferences("h", h_, r.dh, loss);
  }

  // KL alone: reaches the indexer only, though its target depends on the other weights.
  void CheckIndexerLoss(bool warmup) {
    const RunOptions options = Training(0.05, warmup);
    const RunResult r = Analytic(at::zeros(h_.sizes(), h_.options()), options);
    EXPECT_GT(r.losses.indexer, 0) << name_;
    EXPECT_TRUE(AllZero(r.dh)) << name_ << " D4";
    const auto loss = [&] {
      return RunLayer(f_.layer.get(), documents_, h_, weights_of_out_, options).losses.indexer;
    };
    for (const std::string& tensor : f_.harness->names()) {
      const at::Tensor& gradient = gradients_[tensor];
      if (!IsIndexer(tensor)) {
        EXPECT_TRUE(AllZero(gradient)) << name_ << " D4 " << tensor;
        continue;
      }
      if (IsTrainedByKl(tensor)) {
        EXPECT_FALSE(AllZero(gradient)) << name_ << " D11 " << tensor;
      }
      ExpectDifferences(tensor, f_.harness->Weight(tensor), gradient, loss);
    }
  }

 private:
  // Fills gradients_, because the runs that follow add to the layer's own.
  RunResult Analytic(const at::Tensor& dout, const RunOptions& options) {
    f_.harness->ZeroGradients();
    RunResult result = RunLayer(f_.layer.get(), documents_, h_, dout, options);
    for (const std::string& tensor : f_.harness->names()) {
      gradients_[tensor] = f_.harness->Gradient(tensor).clone();
    }
    return result;
  }

  double MainLoss(RunOptions options) {
    options.backward = true;  // an inference has no stage 1
    const std::vector<double> out =
        ToVector(RunLayer(f_.layer.get(), documents_, h_, weights_of_out_, options).out);
    const std::vector<double> weights = ToVector(weights_of_out_);
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * weights[i];
    return sum;
  }

  void ExpectDifferences(const std::string& what, const at::Tensor& values,
                         const at::Tensor& gradient, const std::function<double()>& loss) {
    const std::vector<double> analytic = ToVector(gradient);
    double* data = values.data_ptr<double>();
    constexpr double kStep = 1e-6;
    // Every element of small tensors, a fixed selection of large ones.
    const int64_t stride = std::max<int64_t>(1, values.numel() / 24);
    for (int64_t i = 0; i < values.numel(); i += stride) {
      const double old = data[i];
      data[i] = old + kStep;
      const double up = loss();
      data[i] = old - kStep;
      const double down = loss();
      data[i] = old;
      const double numeric = (up - down) / (2 * kStep);
      const double expected = analytic[static_cast<size_t>(i)];
      ASSERT_NEAR(expected, numeric, 1e-7 + 1e-6 * std::abs(expected))
          << name_ << " " << what << "[" << i << "]";
    }
  }

  std::string name_;
  IndexedFixture f_;
  TestDocuments documents_;
  at::Tensor h_;
  at::Tensor weights_of_out_;
  std::map<std::string, at::Tensor> gradients_;
};

TEST(IndexedLayer, C8GradientsOfTheMainLossAreCentralDifferences) {
  for (const Variant& variant : Variants()) {
    GradientCheck check(variant);
    check.CheckMainLoss(/*warmup=*/false);
    check.CheckMainLoss(/*warmup=*/true);
  }
}

TEST(IndexedLayer, C8D11GradientsOfTheKlAreCentralDifferences) {
  for (const Variant& variant : Variants()) {
    GradientCheck check(variant);
    check.CheckIndexerLoss(/*warmup=*/false);
    check.CheckIndexerLoss(/*warmup=*/true);
  }
}

TEST(IndexedLayer, C10RecomputationChangesNoBit) {
  for (const Variant& variant : Variants()) {
    for (const bool warmup : {false, true}) {
      for (const at::ScalarType type : {at::kDouble, at::kBFloat16}) {
        const IndexedFixture f = Build(variant, type);
        const TestDocuments documents({20, 0, 3, 30});
        const at::Tensor h = RandomTensor({53, kWidth}, 31, 1.0, type);
        const at::Tensor dout = RandomTensor({53, kWidth}, 32, 1.0, type);
        f.harness->ZeroGradients();
        const RunResult once = RunLayer(f.layer.get(), documents, h, dout, Training(0.02, warmup));
        const at::Tensor gradients = f.harness->gradients().clone();
        const std::vector<double> counted(f.layer->statistics().begin(),
                                          f.layer->statistics().end());
        std::ranges::fill(f.layer->statistics(), 0.0);
        f.harness->ZeroGradients();
        const RunResult again =
            RunLayer(f.layer.get(), documents, h, dout, Training(0.02, warmup, /*recompute=*/true));
        EXPECT_TRUE(SameBits(once.out, again.out)) << variant.name;
        EXPECT_TRUE(SameBits(once.dh, again.dh)) << variant.name;
        EXPECT_TRUE(SameBits(gradients, f.harness->gradients())) << variant.name;
        EXPECT_EQ(once.losses.indexer, again.losses.indexer) << variant.name;
        EXPECT_TRUE(std::ranges::equal(counted, f.layer->statistics())) << variant.name;
      }
    }
  }
}

// Heads of 32 in bf16: of a long document the first rows run as tiles, more of them in the backward
// than in the forward, the others are gathered.
TEST(IndexedLayer, C2C10TilesAndGatheredRowsOfADocumentKeepTheLaws) {
  for (const bool gsa : {false, true}) {
    heddle::v1::ModelConfig config =
        gsa ? model_test::FixedGsaConfig(40) : model_test::DsaConfig(DsaConfig::PROFILE_V32, 40);
    config.set_head_dim(32);
    const IndexedFixture f = model_test::MakeIndexed(config, at::kBFloat16);
    f.harness->ropes()->Ensure(300);
    const auto train = [&](const std::vector<int32_t>& lengths, const at::Tensor& h,
                           const at::Tensor& dout, bool recompute) {
      f.harness->ZeroGradients();
      return RunLayer(f.layer.get(), TestDocuments(lengths), h, dout,
                      Training(0.02, /*warmup=*/false, recompute));
    };
    const at::Tensor h = RandomTensor({330, kWidth}, 51, 1.0, at::kBFloat16);
    const at::Tensor dout = RandomTensor({330, kWidth}, 52, 1.0, at::kBFloat16);
    const RunResult packed = train({300, 0, 30}, h, dout, false);
    const at::Tensor gradients = f.harness->gradients().clone();
    const RunResult again = train({300, 0, 30}, h, dout, true);
    EXPECT_TRUE(SameBits(packed.out, again.out));
    EXPECT_TRUE(SameBits(packed.dh, again.dh));
    EXPECT_TRUE(SameBits(gradients, f.harness->gradients()));
    const RunResult alone = train({30}, h.narrow(0, 300, 30), dout.narrow(0, 300, 30), false);
    EXPECT_TRUE(SameBits(packed.out.narrow(0, 300, 30).contiguous(), alone.out));
    const RunResult prefix = train({150}, h.narrow(0, 0, 150), dout.narrow(0, 0, 150), false);
    EXPECT_TRUE(SameBits(packed.out.narrow(0, 0, 150).contiguous(), prefix.out)) << "C1";
  }
}

TEST(IndexedLayer, D10RecomputationUsesTheSavedSelection) {
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    const TestDocuments documents({30});
    const at::Tensor h = RandomTensor({30, kWidth}, 33);
    const at::Tensor dout = RandomTensor({30, kWidth}, 34);
    const RunResult once = RunLayer(f.layer.get(), documents, h, dout, Training(0));
    const auto keys = SelectedKeys(*f.layer->selection(), documents);
    // Other indexer weights would select other keys: the recomputation must not look at them.
    RunOptions options = Training(0, false, /*recompute=*/true);
    options.between = [&] {
      for (const std::string& name : f.harness->names()) {
        if (IsIndexer(name)) f.harness->Weight(name).mul_(-1.5);
      }
    };
    const RunResult again = RunLayer(f.layer.get(), documents, h, dout, options);
    EXPECT_EQ(SelectedKeys(*f.layer->selection(), documents), keys) << variant.name;
    EXPECT_TRUE(SameBits(once.dh, again.dh)) << variant.name;
    Infer(f.layer.get(), documents, h);
    EXPECT_EQ(SelectedKeys(*f.layer->selection(), documents), keys) << "an inference keeps nothing";
  }
}

// Rows of stage 1 see everything; nothing but the indexer learns when the main loss is off (D5).
TEST(IndexedLayer, D5WarmupIsDenseAndTrainsNothingButTheIndexer) {
  for (const Variant& variant : Variants()) {
    const IndexedFixture f = Build(variant);
    const TestDocuments documents({30, 8});
    const at::Tensor h = RandomTensor({38, kWidth}, 35);
    f.harness->ZeroGradients();
    const RunResult r = RunLayer(f.layer.get(), documents, h, at::zeros(h.sizes(), h.options()),
                                 Training(0.1, true));
    EXPECT_TRUE(f.layer->selection()->dense);
    EXPECT_EQ(f.layer->selection()->sets.pairs(), 30 * 31 / 2 + 8 * 9 / 2);
    EXPECT_TRUE(AllZero(r.dh));
    for (const std::string& name : f.harness->names()) {
      EXPECT_EQ(AllZero(f.harness->Gradient(name)), !IsTrainedByKl(name)) << name;
    }
  }
}

TEST(IndexedLayer, TheKlLeavesTheMainGradientsAlone) {
  for (const Variant& variant : Variants()) {
    for (const bool warmup : {false, true}) {
      const IndexedFixture f = Build(variant);
      const TestDocuments documents({30});
      const at::Tensor h = RandomTensor({30, kWidth}, 36);
      const at::Tensor dout = RandomTensor({30, kWidth}, 37);
      std::vector<RunResult> runs;
      std::vector<std::vector<at::Tensor>> gradients;
      for (const double row_scale : {0.0, 0.4}) {
        f.harness->ZeroGradients();
        runs.push_back(RunLayer(f.layer.get(), documents, h, dout, Training(row_scale, warmup)));
        gradients.emplace_back();
        for (const std::string& name : f.harness->names()) {
          if (!IsIndexer(name)) gradients.back().push_back(f.harness->Gradient(name).clone());
        }
      }
      EXPECT_TRUE(SameBits(runs[0].out, runs[1].out));
      EXPECT_TRUE(SameBits(runs[0].dh, runs[1].dh)) << variant.name;
      for (size_t i = 0; i < gradients[0].size(); ++i) {
        EXPECT_TRUE(SameBits(gradients[0][i], gradients[1][i])) << variant.name;
      }
    }
  }
}

TEST(IndexedLayer, KlWeightAndRowScaleScaleLossAndGradients) {
  for (Variant variant : Variants()) {
    std::vector<double> losses;
    std::vector<at::Tensor> gradients;
    for (const double weight : {0.0, 1.0, 2.0}) {
      heddle::v1::AttentionConfig* attention = variant.config.mutable_attention();
      if (attention->has_dsa()) attention->mutable_dsa()->set_kl_weight(weight);
      if (attention->has_gsa()) attention->mutable_gsa()->set_kl_weight(weight);
      const IndexedFixture f = Build(variant);
      const at::Tensor h = RandomTensor({30, kWidth}, 38);
      losses.push_back(
          RunLayer(f.layer.get(), TestDocuments({30}), h, h, Training(0.5)).losses.indexer);
      gradients.push_back(f.harness->Gradient("self_attn.indexer.k_proj.weight").clone());
    }
    EXPECT_EQ(losses[0], 0);
    EXPECT_GT(losses[1], 0);
    EXPECT_NEAR(losses[2], 2 * losses[1], 1e-12);
    EXPECT_TRUE(AllZero(gradients[0]));
    EXPECT_LE(MaxDifference(gradients[2], gradients[1].mul(2)), 1e-12);
  }
}

TEST(IndexedLayer, Fp32AndBf16FollowFp64) {
  for (const Variant& variant : Variants()) {
    const TestDocuments documents({40, 3});
    // Stage 1: no selection, so that rounding cannot change the keys.
    const auto run = [&](at::ScalarType type) {
      const IndexedFixture f = Build(variant, type);
      for (const std::string& name : f.harness->names()) {
        const at::Tensor weight = f.harness->Weight(name);
        weight.copy_(weight.to(at::kBFloat16));
      }
      const auto rounded = [&](uint64_t seed) {
        return RandomTensor({43, kWidth}, seed).to(at::kBFloat16).to(type);
      };
      RunResult r =
          RunLayer(f.layer.get(), documents, rounded(41), rounded(42), Training(0.1, true));
      return std::tuple(r.out, r.dh, f.harness->gradients().clone(), r.losses.indexer);
    };
    const auto [out, dh, gradients, loss] = run(at::kDouble);
    for (const auto& [type, tolerance] :
         {std::pair(at::kFloat, 1e-5), std::pair(at::kBFloat16, 8e-2)}) {
      const auto [o, d, g, l] = run(type);
      const auto largest = [](const at::Tensor& t) {
        double most = 0;
        for (const double v : ToVector(t)) most = std::max(most, std::abs(v));
        return most;
      };
      EXPECT_LE(MaxDifference(o, out), tolerance * largest(out)) << variant.name;
      EXPECT_LE(MaxDifference(d, dh), tolerance * largest(dh)) << variant.name;
      EXPECT_LE(MaxDifference(g, gradients), tolerance * largest(gradients)) << variant.name;
      EXPECT_NEAR(l, loss, tolerance * loss) << variant.name;
    }
  }
}

TEST(IndexedLayer, K5MemoryGrowsLinearlyWithTheLength) {
  for (const bool gsa : {false, true}) {
    heddle::v1::ModelConfig config = gsa ? model_test::FixedGsaConfig(64, 32)
                                         : model_test::DsaConfig(DsaConfig::PROFILE_V32, 64, 32);
    const IndexedFixture f = MakeIndexed(config, at::kFloat);
    std::vector<int64_t> peaks;
    const auto measure = [&](int32_t length) {
      const at::Tensor h = RandomTensor({length, 32}, 51, 1.0, at::kFloat);
      const model_test::AllocationMeter meter;
      RunLayer(f.layer.get(), TestDocuments({length}), h, h, Training(1.0 / length));
      return meter.peak();
    };
    f.harness->ropes()->Ensure(8192);
    measure(8192);  // buffers that libraries keep are made once
    for (const int32_t length : {1024, 4096, 8192}) peaks.push_back(measure(length));
    std::printf("%s peak bytes at L 1024, 4096, 8192: %lld %lld %lld\n", gsa ? "gsa" : "dsa",
                static_cast<long long>(peaks[0]), static_cast<long long>(peaks[1]),
                static_cast<long long>(peaks[2]));
    // L x L floats would be 256 MiB.
    EXPECT_LT(peaks[2], int64_t{64} << 20);
    // Linear: the growth per row stays.
    const double early = static_cast<double>(peaks[1] - peaks[0]) / 3072;
    const double late = static_cast<double>(peaks[2] - peaks[1]) / 4096;
    EXPECT_LT(late, 1.2 * early);
    EXPECT_GT(early, 0);
  }
}

}  // namespace
}  // namespace heddle::attention
