// X1 and X2 (attention-and-moe.md section 13): a sparse model whose settings leave no key out is
// the dense model of the same weights, and stays it over a whole run of training.
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using model_test::BatchData;
using model_test::Build;
using model_test::Built;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

ModelConfig DenseConfig() { return TinyConfig(Kind::kDense, true); }

constexpr int32_t kLongest = 90;  // more than one tile of keys

struct DenseLimit {
  std::string name;
  friend void PrintTo(const DenseLimit& limit, std::ostream* out) { *out << limit.name; }
  std::function<void(heddle::v1::AttentionConfig*)> set;
};

std::vector<DenseLimit> DenseLimits() {
  return {
      {"swa",
       [](auto* attention) {
         attention->set_kind(heddle::v1::ATTENTION_KIND_SWA);
         attention->mutable_swa()->set_window(kLongest);
         attention->mutable_swa()->set_sink_size(0);
       }},
      {"swa with sinks",
       [](auto* attention) {
         attention->set_kind(heddle::v1::ATTENTION_KIND_SWA);
         attention->mutable_swa()->set_window(kLongest);
         attention->mutable_swa()->set_sink_size(3);
       }},
      {"dsa v32",
       [](auto* attention) {
         attention->set_kind(heddle::v1::ATTENTION_KIND_DSA);
         attention->mutable_dsa()->set_d_indexer(8);
         attention->mutable_dsa()->set_topk(kLongest);
       }},
      {"dsa seed",
       [](auto* attention) {
         attention->set_kind(heddle::v1::ATTENTION_KIND_DSA);
         attention->mutable_dsa()->set_profile(heddle::v1::DsaConfig::PROFILE_SEED);
         attention->mutable_dsa()->set_d_indexer(8);
         attention->mutable_dsa()->set_topk(kLongest);
       }},
      {"gsa without gates",
       [](auto* attention) {
         attention->set_kind(heddle::v1::ATTENTION_KIND_GSA);
         heddle::v1::GsaConfig* gsa = attention->mutable_gsa();
         gsa->set_d_indexer(8);
         gsa->set_k_min(kLongest);
         gsa->set_k_base(kLongest);
         gsa->set_k_max(kLongest);
         gsa->set_use_value_gate(false);
         gsa->set_use_output_gate(false);
       }},
      {"swa and dsa by turns",
       [](auto* attention) {
         attention->add_pattern(heddle::v1::ATTENTION_KIND_SWA);
         attention->add_pattern(heddle::v1::ATTENTION_KIND_DSA);
         attention->mutable_swa()->set_window(kLongest);
         attention->mutable_dsa()->set_d_indexer(8);
         attention->mutable_dsa()->set_topk(kLongest);
       }},
  };
}

// Gives the tensors of the dense model its own weights, six times as large as at the start, so that
// attention is far from uniform; kinds start some of them otherwise. What a kind adds stays.
void TakeDenseWeights(Built* built) {
  Built dense = Build(DenseConfig(), Precision::kFp64);
  for (const TensorSpec& from : dense.store->plan().tensors) {
    const TensorSpec* to = built->store->plan().Find(from.name);
    ASSERT_NE(to, nullptr) << from.name;
    ASSERT_EQ(to->elements, from.elements) << from.name;
    const auto* x = static_cast<const double*>(dense.store->master_data()) + from.offset;
    auto* y = static_cast<double*>(built->store->master_data()) + to->offset;
    const double factor = from.shape.size() < 2 || from.unit == 0 ? 1 : 6;
    for (int64_t i = 0; i < from.elements; ++i) y[i] = factor * x[i];
  }
}

// The loss per step of a plain gradient descent in fp64. The first `warm_up` steps are stage 1 of
// the indexers, in which the main model learns too.
std::vector<double> LossCurve(const ModelConfig& config, int64_t steps, int64_t warm_up) {
  Built built = Build(config, Precision::kFp64, {.reference_attention = true});
  TakeDenseWeights(&built);
  const auto count = static_cast<size_t>(built.store->plan().flat_elements);
  auto* weights = static_cast<double*>(built.store->master_data());
  const auto* gradients = static_cast<const double*>(built.store->gradient_data());
  std::vector<double> curve;
  for (int64_t step = 0; step < steps; ++step) {
    const BatchData batch = RandomBatch({kLongest, 0, 1, 17, 64}, config.vocab_size(), 11);
    built.store->ZeroGradients();
    const StatusOr<LossSum> loss =
        built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0 / 168,
                                                    .row_scale = 1.0 / 172,
                                                    .step = step,
                                                    .indexer_warmup = step < warm_up});
    EXPECT_TRUE(loss.ok()) << loss.status();
    curve.push_back(loss->loss / static_cast<double>(loss->tokens));
    built.model->UpdateBuffers(/*frozen=*/false);
    for (size_t i = 0; i < count; ++i) weights[i] -= 0.5 * gradients[i];
  }
  return curve;
}

class DenseLimitOf : public testing::TestWithParam<DenseLimit> {};

TEST_P(DenseLimitOf, X2LossCurveIsThatOfTheDenseModelBitForBit) {
  ModelConfig config = DenseConfig();
  GetParam().set(config.mutable_attention());
  const std::vector<double> dense = LossCurve(DenseConfig(), 20, 0);
  // The batch is learnt by heart: a curve that stood still would prove nothing.
  EXPECT_LT(dense.back(), dense.front() - 0.3);
  const std::vector<double> sparse = LossCurve(config, 20, 7);
  for (size_t step = 0; step < dense.size(); ++step) {
    EXPECT_EQ(sparse[step], dense[step]) << "step " << step;
  }
}

// The curve tells models apart: one key less for the last token that has a label, and the first
// step differs already.
TEST(DenseLimitOf, X2OneKeyLessIsAnotherCurve) {
  const std::vector<double> dense = LossCurve(DenseConfig(), 1, 0);
  ModelConfig config = DenseConfig();
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  config.mutable_attention()->mutable_dsa()->set_d_indexer(8);
  config.mutable_attention()->mutable_dsa()->set_topk(kLongest - 2);
  EXPECT_NE(LossCurve(config, 1, 0), dense);
}

// The kernel of the sparse kinds and the fast cores of dense and window layers are two programs:
// they agree to rounding, windows that leave keys out included.
TEST(DenseLimitOf, X1ReferenceCoresAgreeWithTheFastOnes) {
  for (const Kind kind : {Kind::kDense, Kind::kSwa, Kind::kHybrid}) {
    const ModelConfig config = TinyConfig(kind, true);
    const BatchData batch = RandomBatch({kLongest, 0, 1, 17, 64}, config.vocab_size(), 5);
    Built fast = Build(config, Precision::kFp64);
    Built reference = Build(config, Precision::kFp64, {.reference_attention = true});
    const layers::StepInfo step{.loss_scale = 1.0 / 168};
    const double a = fast.model->ForwardBackward(batch.view(), step)->loss;
    const double b = reference.model->ForwardBackward(batch.view(), step)->loss;
    EXPECT_NEAR(a / b, 1.0, 1e-13);
    const auto* x = static_cast<const double*>(fast.store->gradient_data());
    const auto* y = static_cast<const double*>(reference.store->gradient_data());
    for (int64_t i = 0; i < fast.store->plan().flat_elements; ++i) {
      ASSERT_NEAR(x[i], y[i], 1e-12) << "element " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, DenseLimitOf, testing::ValuesIn(DenseLimits()),
                         [](const auto& info) {
                           std::string name = info.param.name;
                           for (char& c : name) c = c == ' ' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace heddle::model
