#include "model/language_model.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "model/optim/gradient_norm.h"
#include "model/optim/optimizer.h"
#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using model_test::BatchData;
using model_test::Build;
using model_test::Built;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

const std::vector<int32_t> kLengths = {13, 1, 0, 9, 5};

std::span<double> Doubles(void* data, const ParameterStore& store) {
  return {static_cast<double*>(data), static_cast<size_t>(store.plan().flat_elements)};
}

// The arithmetic of the model is checked against central differences in fp64: every tensor, several
// elements of each, over all kinds of layer and both forms of head.
void CheckGradients(Kind kind, bool tied) {
  const heddle::v1::ModelConfig config = TinyConfig(kind, tied);
  Built built = Build(config, Precision::kFp64);
  const BatchData batch = RandomBatch(kLengths, config.vocab_size(), 3);
  const std::span<double> weights = Doubles(built.store->master_data(), *built.store);
  // Larger weights than at the start, so that every path carries a gradient worth measuring.
  for (const TensorSpec& tensor : built.store->plan().tensors) {
    if (tensor.init == InitKind::kOnes) continue;
    for (int64_t i = 0; i < tensor.elements; ++i) {
      weights[static_cast<size_t>(tensor.offset + i)] *= 15.0;
    }
  }
  const double scale = 1.0 / 25.0;
  built.store->ZeroGradients();
  ASSERT_TRUE(built.model->ForwardBackward(batch.view(), {.loss_scale = scale}).ok());
  const std::span<double> gradients = Doubles(built.store->gradient_data(), *built.store);
  const auto loss = [&] { return built.model->Evaluate(batch.view())->loss * scale; };
  for (const TensorSpec& tensor : built.store->plan().tensors) {
    double norm = 0;
    for (int64_t i = 0; i < tensor.elements; ++i) {
      norm += std::abs(gradients[static_cast<size_t>(tensor.offset + i)]);
    }
    EXPECT_GT(norm, 1e-6) << tensor.name << " has no gradient";
    const int64_t stride = std::max<int64_t>(1, tensor.elements / 5);
    for (int64_t i = 0; i < tensor.elements; i += stride) {
      double& weight = weights[static_cast<size_t>(tensor.offset + i)];
      const double before = weight;
      const double h = 1e-5;
      weight = before + h;
      const double above = loss();
      weight = before - h;
      const double below = loss();
      weight = before;
      const double expected = (above - below) / (2 * h);
      EXPECT_NEAR(gradients[static_cast<size_t>(tensor.offset + i)], expected,
                  1e-8 + 1e-6 * std::abs(expected))
          << tensor.name << "[" << i << "]";
    }
  }
}

TEST(LanguageModel, C8GradientsEqualFiniteDifferencesDenseTied) {
  CheckGradients(Kind::kDense, true);
}
TEST(LanguageModel, C8GradientsEqualFiniteDifferencesWindowUntied) {
  CheckGradients(Kind::kSwa, false);
}
TEST(LanguageModel, C8GradientsEqualFiniteDifferencesHybrid) {
  CheckGradients(Kind::kHybrid, true);
}

// The packed law and C11: loss, label count, logits and gradients are sums over documents alone.
TEST(LanguageModel, C2C11PackedEqualsDocumentsAlone) {
  for (const Kind kind : {Kind::kDense, Kind::kSwa, Kind::kHybrid}) {
    const heddle::v1::ModelConfig config = TinyConfig(kind, false);
    Built packed = Build(config, Precision::kFp64);
    Built alone = Build(config, Precision::kFp64);
    const BatchData batch = RandomBatch(kLengths, config.vocab_size(), 5);
    packed.store->ZeroGradients();
    alone.store->ZeroGradients();
    const LossSum whole = *packed.model->ForwardBackward(batch.view(), {.loss_scale = 0.1});
    const at::Tensor logits = *packed.model->Logits(batch.view());
    LossSum sum;
    for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
      BatchData one;
      one.ids.assign(batch.ids.begin() + batch.cu[b], batch.ids.begin() + batch.cu[b + 1]);
      one.labels.assign(batch.labels.begin() + batch.cu[b], batch.labels.begin() + batch.cu[b + 1]);
      one.cu = {0, batch.cu[b + 1] - batch.cu[b]};
      const LossSum part = *alone.model->ForwardBackward(one.view(), {.loss_scale = 0.1});
      sum.loss += part.loss;
      sum.tokens += part.tokens;
      const at::Tensor part_logits = *alone.model->Logits(one.view());
      const at::Tensor rows = logits.narrow(0, batch.cu[b], one.cu[1]).contiguous();
      for (int64_t i = 0; i < part_logits.numel(); ++i) {
        ASSERT_NEAR(rows.data_ptr<double>()[i], part_logits.data_ptr<double>()[i], 1e-10);
      }
    }
    EXPECT_EQ(whole.tokens, sum.tokens);
    EXPECT_EQ(whole.tokens, 13 + 1 + 9 + 5 - 4);
    EXPECT_NEAR(whole.loss, sum.loss, 1e-10);
    const std::span<double> a = Doubles(packed.store->gradient_data(), *packed.store);
    const std::span<double> b = Doubles(alone.store->gradient_data(), *alone.store);
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-10);
  }
}

TEST(LanguageModel, UniformLossAtInitialisationAndNoLossWithoutLabels) {
  heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, false);
  Built built = Build(config, Precision::kFp32);
  BatchData batch = RandomBatch({400}, config.vocab_size(), 1);
  const LossSum sum = *built.model->Evaluate(batch.view());
  EXPECT_NEAR(sum.loss / static_cast<double>(sum.tokens), std::log(37.0), 0.05);
  built.store->ZeroGradients();
  std::fill(batch.labels.begin(), batch.labels.end(), kIgnoredLabel);
  const LossSum none = *built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0});
  EXPECT_EQ(none.tokens, 0);
  EXPECT_EQ(none.loss, 0.0);
  for (const float g : built.store->gradients()) ASSERT_EQ(g, 0.0f);
  EXPECT_TRUE(
      built.model->ForwardBackward({{}, {}, std::vector<int32_t>{0}}, {.loss_scale = 1.0}).ok());
}

TEST(LanguageModel, ChunksOfLogitsDoNotChangeTheLoss) {
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  const BatchData batch = RandomBatch({300, 50}, config.vocab_size(), 2);
  LanguageModelOptions small;
  small.logits_chunk_bytes = 37 * 8 * 16;
  Built one = Build(config, Precision::kFp64);
  Built many = Build(config, Precision::kFp64, small);
  EXPECT_NEAR(one.model->Evaluate(batch.view())->loss, many.model->Evaluate(batch.view())->loss,
              1e-9);
}

// One training run: losses of `steps` steps on one batch.
std::vector<double> Train(const heddle::v1::ModelConfig& config, Precision precision, int steps,
                          ParameterStore** out = nullptr) {
  static std::vector<Built> keep;
  Built built = Build(config, precision);
  const BatchData batch = RandomBatch({40, 25}, config.vocab_size(), 11);
  optim::Hyperparameters hyper;
  hyper.weight_decay = 0.01;
  const auto groups = optim::GroupsOf(built.store->plan(), hyper);
  const size_t size = static_cast<size_t>(built.store->plan().flat_elements);
  std::vector<float> m(size), v(size);
  std::vector<double> losses;
  for (int step = 0; step < steps; ++step) {
    built.store->ZeroGradients();
    const LossSum sum = *built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0 / 63.0});
    losses.push_back(sum.loss / static_cast<double>(sum.tokens));
    const optim::GradientStats stats = optim::MeasureGradients(built.store->gradients());
    optim::StepArgs args;
    args.update = step + 1;
    args.learning_rate = 0.01;
    args.grad_scale = optim::ClipDivisor(std::sqrt(stats.sum_of_squares), 1.0);
    optim::OptimizerStep(
        hyper, groups, args,
        {0, built.store->master(), m, v, built.store->gradients(), built.store->compute_bf16()});
  }
  if (out != nullptr) *out = built.store.get();
  keep.push_back(std::move(built));
  return losses;
}

TEST(LanguageModel, LearnsABatchByHeart) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
    const std::vector<double> losses = Train(TinyConfig(Kind::kHybrid, true), precision, 120);
    EXPECT_GT(losses.front(), 3.4);
    EXPECT_LT(losses.back(), 0.3) << "precision " << static_cast<int>(precision);
  }
}

TEST(LanguageModel, Bf16FollowsFp32) {
  const std::vector<double> wide = Train(TinyConfig(Kind::kDense, false), Precision::kFp32, 20);
  const std::vector<double> narrow = Train(TinyConfig(Kind::kDense, false), Precision::kBf16, 20);
  // Step by step the two drift apart, either way, by an amount that depends on the processor's
  // products; a bias would show in the mean.
  double mean = 0;
  for (size_t i = 0; i < wide.size(); ++i) {
    EXPECT_NEAR(narrow[i] / wide[i], 1.0, 0.05) << i;
    mean += narrow[i] / wide[i] / static_cast<double>(wide.size());
  }
  EXPECT_NEAR(mean, 1.0, 0.01);
}

TEST(LanguageModel, C5RepeatsARunBitForBit) {
  ParameterStore* a = nullptr;
  ParameterStore* b = nullptr;
  EXPECT_EQ(Train(TinyConfig(Kind::kHybrid, true), Precision::kBf16, 10, &a),
            Train(TinyConfig(Kind::kHybrid, true), Precision::kBf16, 10, &b));
  ASSERT_TRUE(std::equal(a->master().begin(), a->master().end(), b->master().begin()));
}

TEST(LanguageModel, CallsHooksInTheOrderOfTheUnitsAndStopsAtAnError) {
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  const BatchData batch = RandomBatch({8}, config.vocab_size(), 1);
  std::string calls;
  UnitHooks hooks;
  hooks.before_forward = [&](int unit) {
    calls += Str("f", unit, " ");
    return OkStatus();
  };
  hooks.after_backward = [&](int unit) {
    calls += Str("b", unit, " ");
    return OkStatus();
  };
  ASSERT_TRUE(built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0}, hooks).ok());
  EXPECT_EQ(calls, "f0 f1 f2 f3 f4 b4 b3 b2 b1 b0 ");
  hooks.before_backward = [](int unit) {
    return unit == 2 ? Unavailable("gather failed") : OkStatus();
  };
  EXPECT_EQ(built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0}, hooks).status().code(),
            StatusCode::kUnavailable);
}

TEST(LanguageModel, NamesTheBadFieldOfABatch) {
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  const auto error = [&](BatchData batch) {
    return Message(built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0}).status());
  };
  BatchData good = RandomBatch({8, 4}, config.vocab_size(), 1);
  BatchData bad = good;
  bad.ids[3] = 37;
  EXPECT_NE(error(bad).find("input_ids[3]"), std::string::npos) << error(bad);
  bad = good;
  bad.labels[2] = -7;
  EXPECT_NE(error(bad).find("labels[2]"), std::string::npos);
  bad = good;
  bad.cu = {0, 8, 11};
  EXPECT_NE(error(bad).find("cu_seqlens"), std::string::npos);
  bad.cu = {0, 13, 12};
  EXPECT_NE(error(bad).find("cu_seqlens"), std::string::npos);
  bad = good;
  bad.labels.pop_back();
  EXPECT_NE(error(bad).find("labels"), std::string::npos);
}

// 13.1: every value is a function of (seed, name, element).
TEST(InitParameters, DependsOnSeedNameAndElementOnly) {
  const auto values = [](const heddle::v1::ModelConfig& config, uint64_t seed, const char* name) {
    Built built = Build(config, Precision::kFp32, {}, seed);
    const auto span = built.store->master(*built.store->plan().Find(name));
    return std::vector<float>(span.begin(), span.end());
  };
  const char* name = "model.layers.1.mlp.up_proj.weight";
  const auto base = values(TinyConfig(Kind::kDense, true), 7, name);
  EXPECT_EQ(base, values(TinyConfig(Kind::kSwa, false), 7, name));
  EXPECT_NE(base, values(TinyConfig(Kind::kDense, true), 8, name));
  EXPECT_NE(base, values(TinyConfig(Kind::kDense, true), 7, "model.layers.2.mlp.up_proj.weight"));
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  EXPECT_EQ(base, values(TinyConfig(Kind::kDense, true), 7, name));
  at::set_num_threads(threads);
  double squares = 0;
  for (const float value : base) squares += value * value;
  EXPECT_NEAR(std::sqrt(squares / static_cast<double>(base.size())), 0.02, 0.002);
}

// A token whose embedding is NaN: every row that sees it and must choose is counted once a layer,
// with and without recomputation.
TEST(LanguageModel, CountsRowsWhoseSelectionMeetsANan) {
  for (const auto kind : {heddle::v1::ATTENTION_KIND_NSA, heddle::v1::ATTENTION_KIND_DSA,
                          heddle::v1::ATTENTION_KIND_GSA}) {
    heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
    config.set_n_layers(1);
    heddle::v1::AttentionConfig* attention = config.mutable_attention();
    attention->set_kind(kind);
    heddle::v1::NsaConfig* nsa = attention->mutable_nsa();
    nsa->set_kernel_size(2);
    nsa->set_kernel_stride(2);
    nsa->set_block_size(2);
    nsa->set_topk(4);
    nsa->set_window_size(2);
    attention->mutable_dsa()->set_d_indexer(8);
    attention->mutable_dsa()->set_topk(3);
    heddle::v1::GsaConfig* gsa = attention->mutable_gsa();
    gsa->set_d_indexer(8);
    gsa->set_use_adaptive_k(false);
    gsa->set_k_base(3);
    gsa->set_k_min(3);
    gsa->set_k_max(3);
    BatchData batch = RandomBatch({16, 16}, config.vocab_size() - 1, 3);
    batch.ids[5] = config.vocab_size() - 1;  // in the first document alone
    for (const Recompute recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
      Built built = Build(config, Precision::kFp32, {.recompute = recompute});
      const auto count = [&] {
        built.store->ZeroGradients();
        return built.model->ForwardBackward(batch.view(), {.loss_scale = 0.1})->counts.nan_rows;
      };
      EXPECT_EQ(count(), 0);
      const TensorSpec& embedding = *built.store->plan().Find("model.embed_tokens.weight");
      built.store->master(embedding).back() = std::nanf("");
      if (kind == heddle::v1::ATTENTION_KIND_NSA) {
        EXPECT_GT(count(), 0);
      } else {
        EXPECT_EQ(count(), 11);  // rows 5 to 15 of the first document
      }
    }
  }
}

}  // namespace
}  // namespace heddle::model
