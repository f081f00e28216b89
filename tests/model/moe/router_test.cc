#include "model/moe/router.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "heddle/v1/config.pb.h"
#include "tests/model/golden.h"
#include "tests/model/layers/layer_fixture.h"

namespace heddle::moe {
namespace {

using layers_test::Normal;
using layers_test::ToTensor;
using layers_test::ToVector;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A router that works on given logits.
Router OnLogits(const RouterOptions& options, const float* bias = nullptr) {
  return Router(options, at::Tensor(), at::Tensor(), bias);
}

struct Result {
  std::vector<int32_t> experts;
  std::vector<double> weights;
  std::vector<int64_t> counts;
  int64_t nan_rows = 0;
  layers::LayerLosses losses;
};

Result Route(const Router& router, const at::Tensor& logits, const std::vector<int32_t>& cu = {}) {
  Result r;
  r.nan_rows = router.Select(logits, 0, &r.experts);
  const at::Tensor weights =
      at::full({logits.size(0), router.options().top_k}, kNan, logits.options());
  router.Weigh(logits, r.experts, weights);
  r.weights = ToVector(weights);
  r.counts.assign(static_cast<size_t>(router.options().experts), 0);
  for (const int32_t e : r.experts) ++r.counts[static_cast<size_t>(e)];
  layers::Documents documents;
  const std::vector<int32_t> whole = {0, static_cast<int32_t>(logits.size(0))};
  documents.cu_seqlens = cu.empty() ? whole : cu;
  const double row_scale = 1.0 / static_cast<double>(std::max<int64_t>(1, logits.size(0)));
  router.AddLosses({logits, r.experts, weights, &documents, row_scale}, &r.losses);
  return r;
}

RouterOptions Options(int64_t experts, int64_t top_k) {
  RouterOptions o;
  o.experts = experts;
  o.top_k = top_k;
  o.normalize = true;
  return o;
}

std::vector<int32_t> Chosen(const std::vector<double>& logits, int64_t top_k,
                            const std::vector<float>& bias = {}) {
  RouterOptions o = Options(static_cast<int64_t>(logits.size()), top_k);
  o.sigmoid = true;  // keeps the order of the logits
  const at::Tensor z = ToTensor(logits, o.experts, at::kDouble);
  return Route(OnLogits(o, bias.empty() ? nullptr : bias.data()), z).experts;
}

// Section 14: moe logits gen([40,5],.8,1.5) K=2 softmax.
TEST(Router, GoldenCountsSwitchLossAndZLoss) {
  RouterOptions o = Options(5, 2);
  o.balance_coefficient = 1;
  o.z_coefficient = 1;
  const at::Tensor logits = ToTensor(model_test::Gen(40 * 5, 0.8, 1.5), 5, at::kDouble);
  const Result r = Route(OnLogits(o), logits);
  EXPECT_EQ(r.counts, (std::vector<int64_t>{19, 19, 5, 18, 19}));
  EXPECT_NEAR(r.losses.balance, 1.019773033297, 1e-11);
  EXPECT_NEAR(r.losses.router_z, 3.901308140248, 1e-11);
  const Result single = Route(OnLogits(o), logits.to(at::kFloat));
  EXPECT_EQ(single.experts, r.experts);
  EXPECT_NEAR(single.losses.Total(), r.losses.Total(), 1e-5);
}

TEST(Router, E1UniformSwitchLossIsTheCoefficientAndCollapseIsEOverKTimesIt) {
  RouterOptions o = Options(8, 2);
  o.balance_coefficient = 0.25;
  const Result uniform = Route(OnLogits(o), at::full({24, 8}, 0.7, at::kDouble));
  EXPECT_NEAR(uniform.losses.balance, 0.25, 1e-12);
  std::vector<double> z;
  for (int row = 0; row < 24; ++row) {
    for (int e = 0; e < 8; ++e) z.push_back(e == 2 || e == 5 ? 50.0 : -50.0);
  }
  const Result collapsed = Route(OnLogits(o), ToTensor(z, 8, at::kDouble));
  EXPECT_NEAR(collapsed.losses.balance, 0.25 * 8 / 2, 1e-12);
}

TEST(Router, E2ZLossOfZeroLogitsIsTheSquareOfLnE) {
  RouterOptions o = Options(6, 2);
  o.z_coefficient = 1e-3;
  const Result r = Route(OnLogits(o), at::full({7, 6}, 0.0, at::kDouble));
  EXPECT_NEAR(r.losses.router_z, 1e-3 * std::log(6.0) * std::log(6.0), 1e-15);
  EXPECT_EQ(r.losses.balance, 0.0);
}

TEST(Router, SequenceLossIsOneWhereUniformAndTheSumOfDocumentsAlone) {
  for (const bool sigmoid : {false, true}) {
    RouterOptions o = Options(6, 3);
    o.sigmoid = sigmoid;
    o.balance = BalanceLoss::kSequence;
    o.balance_coefficient = 1;
    EXPECT_NEAR(Route(OnLogits(o), at::full({12, 6}, 0.3, at::kDouble)).losses.balance, 1, 1e-12);
    const std::vector<double> z = Normal(13 * 6, "z");
    const Result packed = Route(OnLogits(o), ToTensor(z, 6, at::kDouble), {0, 4, 4, 13});
    const auto alone = [&](size_t begin, size_t end) {
      const std::vector<double> rows(z.begin() + static_cast<std::ptrdiff_t>(begin * 6),
                                     z.begin() + static_cast<std::ptrdiff_t>(end * 6));
      return Route(OnLogits(o), ToTensor(rows, 6, at::kDouble)).losses.balance;
    };
    // A document counts as many rows as it has.
    EXPECT_NEAR(packed.losses.balance, (4 * alone(0, 4) + 9 * alone(4, 13)) / 13, 1e-12);
    // By the formula: E / (K T) sum_i count_i mean_t s'_i.
    double expected = 0;
    const Result first = Route(OnLogits(o), ToTensor({z.begin(), z.begin() + 24}, 6, at::kDouble));
    for (size_t t = 0; t < 4; ++t) {
      double sum = 0;
      std::vector<double> s;
      for (size_t e = 0; e < 6; ++e) {
        s.push_back(sigmoid ? 1 / (1 + std::exp(-z[t * 6 + e])) : std::exp(z[t * 6 + e]));
        sum += s.back();
      }
      for (size_t e = 0; e < 6; ++e) {
        expected += 6.0 / (3 * 4) * static_cast<double>(first.counts[e]) * s[e] / sum / 4;
      }
    }
    EXPECT_NEAR(first.losses.balance, expected, 1e-12);
  }
}

TEST(Router, ImportanceLossIsTheSquaredVariationOfTheWeights) {
  RouterOptions o = Options(5, 2);
  o.balance = BalanceLoss::kImportance;
  o.balance_coefficient = 1;
  o.route_scale = 2.5;  // cancels
  const Result r = Route(OnLogits(o), ToTensor(Normal(9 * 5, "z"), 5, at::kDouble));
  std::vector<double> g(5, 0.0);
  double sum = 0;
  for (size_t a = 0; a < r.experts.size(); ++a) {
    g[static_cast<size_t>(r.experts[a])] += r.weights[a];
    sum += r.weights[a];
  }
  double expected = 0;
  for (const double v : g) expected += (5 * v / sum - 1) * (5 * v / sum - 1) / 5;
  EXPECT_NEAR(sum, 9 * 2.5, 1e-12);
  EXPECT_NEAR(r.losses.balance, expected, 1e-12);
  o.top_k = 5;  // all experts, equal weights: balanced
  EXPECT_NEAR(Route(OnLogits(o), at::full({9, 5}, 1.0, at::kDouble)).losses.balance, 0, 1e-20);
}

// A batch of n rows counts n row_scale: what micro-batches and ranks report adds up.
TEST(Router, LossesOfMicroBatchesAddUp) {
  for (const BalanceLoss form :
       {BalanceLoss::kSwitch, BalanceLoss::kSequence, BalanceLoss::kImportance}) {
    RouterOptions o = Options(5, 2);
    o.balance = form;
    o.balance_coefficient = 0.5;
    o.z_coefficient = 0.125;
    const Router router = OnLogits(o);
    const std::vector<double> z = Normal(12 * 5, "z");
    const at::Tensor batch = ToTensor(z, 5, at::kDouble);
    const Result once = Route(router, batch);
    std::vector<double> twice = z;
    twice.insert(twice.end(), z.begin(), z.end());
    const Result both = Route(router, ToTensor(twice, 5, at::kDouble), {0, 12, 24});
    EXPECT_NEAR(both.losses.balance, once.losses.balance, 1e-12);
    EXPECT_NEAR(both.losses.router_z, once.losses.router_z, 1e-12);
    // Two micro-batches of half the step each.
    layers::LayerLosses sum;
    const at::Tensor weights = ToTensor(once.weights, 2, at::kDouble);
    layers::Documents documents;
    const std::vector<int32_t> cu = {0, 12};
    documents.cu_seqlens = cu;
    for (int half = 0; half < 2; ++half) {
      router.AddLosses({batch, once.experts, weights, &documents, 1.0 / 24}, &sum);
    }
    EXPECT_NEAR(sum.Total(), once.losses.Total(), 1e-12);
    // No losses wanted.
    layers::LayerLosses none;
    router.AddLosses({batch, once.experts, weights, &documents, 0.0}, &none);
    EXPECT_EQ(none.Total(), 0.0);
  }
}

TEST(Router, E5BiasShiftsTheChoiceAndNeverTheWeights) {
  const std::vector<double> z = {0.1, 0.4, 0.2, 0.3};
  EXPECT_EQ(Chosen(z, 2), (std::vector<int32_t>{1, 3}));
  const std::vector<float> bias = {0.5f, 0.0f, 0.0f, -0.5f};
  EXPECT_EQ(Chosen(z, 2, bias), (std::vector<int32_t>{0, 1}));
  for (const bool sigmoid : {false, true}) {
    RouterOptions o = Options(4, 2);
    o.sigmoid = sigmoid;
    o.route_scale = 2.5;
    const at::Tensor logits = ToTensor(z, 4, at::kDouble);
    const Result r = Route(OnLogits(o, bias.data()), logits);
    const auto s = [&](double v) { return sigmoid ? 1 / (1 + std::exp(-v)) : std::exp(v); };
    EXPECT_NEAR(r.weights[0], 2.5 * s(z[0]) / (s(z[0]) + s(z[1])), 1e-12);
    EXPECT_NEAR(r.weights[1], 2.5 * s(z[1]) / (s(z[0]) + s(z[1])), 1e-12);
    // A constant shift changes nothing.
    const std::vector<float> shifted = {1.5f, 1.0f, 1.0f, 0.5f};
    const Result same = Route(OnLogits(o, shifted.data()), logits);
    EXPECT_EQ(same.experts, r.experts);
    EXPECT_EQ(same.weights, r.weights);
  }
}

// The total order of section 1: score descending, index ascending, NaN below every number.
TEST(Router, TiesGoToTheLowestIndexAndNanRanksLast) {
  EXPECT_EQ(Chosen({1, 1, 1, 1}, 2), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(Chosen({1, 2, 1, 2, 1}, 3), (std::vector<int32_t>{0, 1, 3}));
  EXPECT_EQ(Chosen({kNan, -900, kNan, -800}, 2), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(Chosen({kNan, -1, kNan, kNan}, 3), (std::vector<int32_t>{0, 1, 2}));
  // Scores saturate: logits of 40 and 800 are both exactly 1.
  EXPECT_EQ(Chosen({40, 800, 40, 41}, 1), (std::vector<int32_t>{0}));
  // +0 and -0 are equal.
  EXPECT_EQ(Chosen({-900, -900, -900}, 1, {-0.0f, 0.0f, -0.0f}), (std::vector<int32_t>{0}));
  RouterOptions o = Options(3, 1);
  const Result r = Route(OnLogits(o), ToTensor({kNan, 1, 2, 1, 2, 3}, 3, at::kDouble));
  EXPECT_EQ(r.nan_rows, 1);
  EXPECT_TRUE(std::isnan(r.weights[0]));  // never hidden
  EXPECT_EQ(r.experts[1], 2);
}

// Group score: the best biased score, or the sum of the two best.
TEST(Router, GroupsLimitTheChoice) {
  RouterOptions o = Options(6, 2);
  o.sigmoid = true;
  o.groups = 3;
  o.topk_groups = 1;
  const at::Tensor logits = ToTensor({2.0, -9, 1.0, 1.0, 0.5, -9}, 6, at::kDouble);
  EXPECT_EQ(Route(OnLogits(o), logits).experts, (std::vector<int32_t>{0, 1}));
  o.group_sum_of_two = true;
  EXPECT_EQ(Route(OnLogits(o), logits).experts, (std::vector<int32_t>{2, 3}));
  const std::vector<float> zero(6, 0.0f);
  EXPECT_EQ(Route(OnLogits(o, zero.data()), logits).experts, (std::vector<int32_t>{2, 3}));
  const std::vector<float> towards_last = {0, 0, 0, 0, 5, 5};
  EXPECT_EQ(Route(OnLogits(o, towards_last.data()), logits).experts, (std::vector<int32_t>{4, 5}));
  o.topk_groups = 2;
  EXPECT_EQ(Route(OnLogits(o), logits).experts, (std::vector<int32_t>{0, 2}));
  // Equal groups: the first. Groups of one expert have no second one.
  o.topk_groups = 1;
  EXPECT_EQ(Route(OnLogits(o), at::full({1, 6}, 0.5, at::kDouble)).experts,
            (std::vector<int32_t>{0, 1}));
  o.groups = 6;
  o.topk_groups = 2;
  EXPECT_EQ(Route(OnLogits(o), logits).experts, (std::vector<int32_t>{0, 2}));
}

TEST(Router, GroupsAreRankedByTwoWhereABiasBalances) {
  heddle::v1::MoeConfig config;
  config.set_n_experts(4);
  EXPECT_FALSE(RouterOptionsOf(config).group_sum_of_two);
  config.set_bias_update_rate(1e-3);
  EXPECT_TRUE(RouterOptionsOf(config).group_sum_of_two);
  config.set_bias_update_rate(0);
  config.set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  EXPECT_TRUE(RouterOptionsOf(config).group_sum_of_two);
}

// The noisy form: softmax over the K chosen logits.
TEST(Router, NormalisedSoftmaxIsTheSoftmaxOverTheChosenLogits) {
  const Router router = OnLogits(Options(6, 3));
  const std::vector<double> z = Normal(20 * 6, "z", 3.0);
  const Result r = Route(router, ToTensor(z, 6, at::kDouble));
  for (size_t row = 0; row < 20; ++row) {
    double sum = 0;
    for (size_t j = 0; j < 3; ++j) {
      sum += std::exp(z[row * 6 + static_cast<size_t>(r.experts[row * 3 + j])]);
    }
    for (size_t j = 0; j < 3; ++j) {
      const double e = std::exp(z[row * 6 + static_cast<size_t>(r.experts[row * 3 + j])]);
      EXPECT_NEAR(r.weights[row * 3 + j], e / sum, 1e-12);
    }
  }
}

std::vector<double> Noisy(double std, const NoiseKey* key, int64_t rows) {
  RouterOptions o = Options(4, 2);
  o.noise_std = std;
  const at::Tensor weight = at::full({4, 3}, 0.0, at::kDouble);
  const Router router(o, weight, at::Tensor(), nullptr);
  const at::Tensor logits = at::full({rows, 4}, kNan, at::kDouble);
  router.Logits(at::full({rows, 3}, 1.0, at::kDouble), key, logits);
  return ToVector(logits);
}

TEST(Router, NoiseIsAFunctionOfSeedStepLayerAndGlobalToken) {
  const NoiseKey key{5, 7, 2, 100};
  const std::vector<double> z = Noisy(0.5, &key, 2000);
  EXPECT_EQ(z, Noisy(0.5, &key, 2000));
  // Any split of the step into micro-batches and ranks.
  const NoiseKey later{5, 7, 2, 100 + 1500};
  const std::vector<double> tail = Noisy(0.5, &later, 500);
  EXPECT_TRUE(std::equal(tail.begin(), tail.end(), z.begin() + 1500 * 4));
  for (const NoiseKey& other : {NoiseKey{6, 7, 2, 100}, NoiseKey{5, 8, 2, 100},
                                NoiseKey{5, 7, 3, 100}, NoiseKey{5, 7, 2, 101}}) {
    EXPECT_NE(z, Noisy(0.5, &other, 2000));
  }
  double mean = 0, square = 0;
  for (const double v : z) {
    mean += v / static_cast<double>(z.size());
    square += v * v / static_cast<double>(z.size());
  }
  EXPECT_NEAR(mean, 0, 0.02);
  EXPECT_NEAR(std::sqrt(square), 0.5, 0.02);
  EXPECT_EQ(Noisy(0.0, &key, 3), std::vector<double>(12, 0.0));
  EXPECT_EQ(Noisy(0.5, nullptr, 3), std::vector<double>(12, 0.0));
}

TEST(Router, ForcedBalanceGivesEveryExpertTheSameLoad) {
  RouterOptions o = Options(6, 4);
  o.force_balance = true;
  const at::Tensor logits = ToTensor(Normal(30 * 6, "z"), 6, at::kDouble);
  const Result r = Route(OnLogits(o), logits);
  EXPECT_EQ(r.counts, std::vector<int64_t>(6, 20));
  for (size_t row = 0; row < 30; ++row) {
    const std::set<int32_t> distinct(r.experts.begin() + static_cast<std::ptrdiff_t>(row * 4),
                                     r.experts.begin() + static_cast<std::ptrdiff_t>(row * 4 + 4));
    EXPECT_EQ(distinct.size(), 4u);
    EXPECT_NEAR(std::accumulate(r.weights.begin() + static_cast<std::ptrdiff_t>(row * 4),
                                r.weights.begin() + static_cast<std::ptrdiff_t>(row * 4 + 4), 0.0),
                1.0, 1e-12);
  }
  std::vector<int32_t> later;
  OnLogits(o).Select(logits.narrow(0, 5, 25).contiguous(), 5, &later);
  EXPECT_TRUE(std::equal(later.begin(), later.end(), r.experts.begin() + 20));
}

TEST(Router, OptionsComeFromEveryKey) {
  heddle::v1::MoeConfig config;
  config.set_n_experts(16);
  config.set_top_k(4);
  config.set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  config.set_norm_topk(false);
  config.set_route_scale(2.5);
  config.set_n_groups(4);
  config.set_topk_groups(2);
  config.set_noise_std(0.1);
  config.set_force_balance(true);
  config.set_aux_form(heddle::v1::MoeConfig::AUX_FORM_SEQUENCE);
  config.set_aux_loss(0.5);
  config.set_z_loss(0.25);
  const RouterOptions o = RouterOptionsOf(config);
  EXPECT_EQ(o.experts, 16);
  EXPECT_EQ(o.top_k, 4);
  EXPECT_TRUE(o.sigmoid);
  EXPECT_TRUE(o.normalize);  // sigmoid scores always are
  EXPECT_EQ(o.route_scale, 2.5);
  EXPECT_EQ(o.groups, 4);
  EXPECT_EQ(o.topk_groups, 2);
  EXPECT_EQ(o.noise_std, 0.1);
  EXPECT_TRUE(o.force_balance);
  EXPECT_EQ(o.balance, BalanceLoss::kSequence);
  EXPECT_EQ(o.balance_coefficient, 0.5);
  EXPECT_EQ(o.z_coefficient, 0.25);
  config.set_router(heddle::v1::MoeConfig::ROUTER_SOFTMAX);
  config.set_aux_form(heddle::v1::MoeConfig::AUX_FORM_IMPORTANCE);
  EXPECT_FALSE(RouterOptionsOf(config).normalize);
  EXPECT_EQ(RouterOptionsOf(config).balance, BalanceLoss::kImportance);
  config.set_norm_topk(true);
  EXPECT_TRUE(RouterOptionsOf(config).normalize);
}

}  // namespace
}  // namespace heddle::moe
