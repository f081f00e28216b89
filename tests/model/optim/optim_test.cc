#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"
#include "model/optim/gradient_norm.h"
#include "model/optim/optimizer.h"
#include "model/optim/schedule.h"

namespace heddle::optim {
namespace {

// training-runtime.md 11.6.
std::vector<float> ThreeGoldenSteps(Algorithm algorithm) {
  Hyperparameters hyper;
  hyper.algorithm = algorithm;
  hyper.beta2 = algorithm == Algorithm::kLion ? 0.99 : 0.95;
  std::vector<float> p(5), g(5), m(5), v(5);
  for (int n = 0; n < 5; ++n) p[n] = static_cast<float>(std::sin(0.37 * n + 0.3));
  const std::vector<GroupRange> groups = {{0, 5, 0.1, 1.0}};
  for (int k = 0; k < 3; ++k) {
    for (int n = 0; n < 5; ++n) g[n] = static_cast<float>(4.0 * std::sin(0.37 * n + 1.1 + k));
    StepArgs args;
    args.update = k + 1;
    args.learning_rate = 1e-2;
    args.grad_scale = 4.0;
    OptimizerStep(hyper, groups, args, {0, p, m, v, g, {}});
  }
  return p;
}

TEST(Optimizer, ReproducesTheGoldenSteps) {
  const std::vector<double> adamw = {0.2666322595003, 0.5939085271051, 0.8389773548364,
                                     0.9695888092738, 0.9696293618697};
  const std::vector<double> lion = {0.2646645223065, 0.6091548814124, 0.8498495909119,
                                    0.9741717510240, 0.9852749405992};
  const std::vector<float> a = ThreeGoldenSteps(Algorithm::kAdamW);
  const std::vector<float> b = ThreeGoldenSteps(Algorithm::kLion);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_NEAR(a[i], adamw[i], 2e-7);
    EXPECT_NEAR(b[i], lion[i], 2e-7);
  }
}

struct State {
  std::vector<float> p, m, v, g;
  std::vector<uint16_t> w;
  explicit State(size_t size) : p(size), m(size), v(size), g(size), w(size) {
    for (size_t i = 0; i < size; ++i) {
      p[i] = std::sin(0.1f * static_cast<float>(i));
      g[i] = std::cos(0.3f * static_cast<float>(i));
    }
  }
  Shard shard(size_t begin, size_t end) {
    const size_t n = end - begin;
    return {static_cast<int64_t>(begin),
            std::span(p).subspan(begin, n),
            std::span(m).subspan(begin, n),
            std::span(v).subspan(begin, n),
            std::span<const float>(g).subspan(begin, n),
            std::span(w).subspan(begin, n)};
  }
};

TEST(Optimizer, CutsIntoShardsChangeNoBit) {
  constexpr size_t kSize = 70'001;
  const std::vector<GroupRange> groups = {
      {0, 1000, 0.1, 1.0}, {1000, 1003, 0.0, 1.0}, {1003, static_cast<int64_t>(kSize), 0.1, 10.0}};
  StepArgs args;
  args.learning_rate = 1e-3;
  State whole(kSize);
  State parts(kSize);
  for (int64_t update = 1; update <= 3; ++update) {
    args.update = update;
    OptimizerStep({}, groups, args, whole.shard(0, kSize));
    for (const auto& [begin, end] : std::vector<std::pair<size_t, size_t>>{
             {0, 0}, {0, 17}, {17, 1001}, {1001, 66'000}, {66'000, kSize}}) {
      OptimizerStep({}, groups, args, parts.shard(begin, end));
    }
  }
  EXPECT_EQ(whole.p, parts.p);
  EXPECT_EQ(whole.m, parts.m);
  EXPECT_EQ(whole.v, parts.v);
  EXPECT_EQ(whole.w, parts.w);
}

TEST(Optimizer, WritesTheRoundedWeights) {
  State state(40);
  OptimizerStep({}, std::vector<GroupRange>{{0, 40, 0.0, 1.0}}, {1, 1e-3, 1.0, false},
                state.shard(0, 40));
  for (size_t i = 0; i < 40; ++i) {
    const uint32_t bits = static_cast<uint32_t>(state.w[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    EXPECT_NEAR(value, state.p[i], std::abs(state.p[i]) / 256.0 + 1e-30);
  }
}

TEST(Optimizer, AnInfiniteGradientChangesNothing) {
  State state(40);
  const State before = state;
  OptimizerStep({}, std::vector<GroupRange>{{0, 40, 0.1, 1.0}}, {1, 1e-3, 1.0, true},
                state.shard(0, 40));
  EXPECT_EQ(state.p, before.p);
  EXPECT_EQ(state.m, before.m);
  EXPECT_EQ(state.w, before.w);
}

TEST(Optimizer, IndexersAreClippedByTheirOwnFactor) {
  State state(40);
  StepArgs args;
  args.learning_rate = 1e-3;
  args.grad_scale = 2.0;
  args.indexer_grad_scale = 8.0;
  const GroupRange model{.begin = 0, .end = 20};
  const GroupRange indexer{.begin = 20, .end = 40, .indexer = true};
  OptimizerStep({}, std::vector<GroupRange>{model, indexer}, args, state.shard(0, 40));
  State half(40);
  args.indexer_grad_scale = 2.0;
  OptimizerStep({}, std::vector<GroupRange>{model, indexer}, args, half.shard(0, 40));
  for (size_t i = 0; i < 40; ++i) {
    EXPECT_FLOAT_EQ(state.m[i] * (i < 20 ? 1.0f : 4.0f), half.m[i]) << i;
  }
}

TEST(Optimizer, DecaysMatricesButNoNorms) {
  heddle::v1::ModelConfig config;
  config.set_n_kv_heads(2);
  const model::ModelPlan plan = *model::PlanModel(config);
  Hyperparameters hyper;
  hyper.weight_decay = 0.25;
  const std::vector<GroupRange> groups = GroupsOf(plan, hyper);
  EXPECT_EQ(groups.front().begin, 0);
  EXPECT_EQ(groups.back().end, plan.flat_elements);
  const auto decay_at = [&](int64_t element) {
    for (const GroupRange& group : groups) {
      if (element >= group.begin && element < group.end) return group.weight_decay;
    }
    return -1.0;
  };
  for (const model::TensorSpec& tensor : plan.tensors) {
    const double expected = tensor.name.find("norm") == std::string::npos ? 0.25 : 0.0;
    EXPECT_EQ(decay_at(tensor.offset), expected) << tensor.name;
    EXPECT_EQ(decay_at(tensor.offset + tensor.elements - 1), expected) << tensor.name;
  }
}

// Decay alone would shrink what no gradient holds up.
TEST(Optimizer, LeavesWhatNoLossTrainsAsItIs) {
  heddle::v1::ModelConfig config;
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_GSA);
  config.mutable_attention()->mutable_gsa()->set_adaptive_k(
      heddle::v1::GsaConfig::ADAPTIVE_K_LEARNED);
  config.set_vocab_size(64);
  config.set_n_layers(2);
  const model::ModelPlan plan = *model::PlanModel(config);
  State state(static_cast<size_t>(plan.flat_elements));
  std::fill(state.g.begin(), state.g.end(), 0.0f);
  const State before = state;
  OptimizerStep({}, GroupsOf(plan, {}), {1, 1e-2, 1.0, false}, state.shard(0, state.p.size()));
  int untrained = 0, decayed = 0;
  for (const model::TensorSpec& tensor : plan.tensors) {
    const auto range = [&](const std::vector<float>& p) {
      const auto begin = p.begin() + tensor.offset;
      return std::vector<float>(begin, begin + tensor.elements);
    };
    const bool learned_k = tensor.name.find(".adaptive_k.") != std::string::npos;
    const bool same = range(before.p) == range(state.p);
    untrained += learned_k ? 1 : 0;
    decayed += same ? 0 : 1;
    EXPECT_TRUE(same || !learned_k) << tensor.name;
    if (tensor.name.find("indexer.k_proj.weight") != std::string::npos) {
      EXPECT_FALSE(same) << tensor.name;
    }
  }
  EXPECT_EQ(untrained, 2 * 4);
  EXPECT_GT(decayed, 2 * 8);
}

// 20.9: the rate is a function of the step, never of the rate before.
TEST(Schedule, WarmsUpThenFallsAsACosine) {
  const Schedule schedule{1.0, 0.1, 10, 110};
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 0), 0.1);
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 9), 1.0);
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 10), 1.0);
  EXPECT_NEAR(LearningRate(schedule, 60), 0.55, 1e-12);
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 110), 0.1);
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 100'000), 0.1);
  EXPECT_DOUBLE_EQ(LearningRate({1.0, 0.0, 0, 4}, 0), 1.0);
  EXPECT_DOUBLE_EQ(LearningRate({1.0, 0.5, 0, 0}, 0), 0.5);
}

TEST(GradientNorm, SumsInDoubleAndCountsWhatIsNotFinite) {
  std::vector<float> g(200'003, 1e-3f);
  g[100'000] = 1e20f;
  EXPECT_NEAR(MeasureGradients(g).sum_of_squares, 1e40, 1e34);
  EXPECT_EQ(MeasureGradients(g).non_finite, 0);
  g[100'000] = std::numeric_limits<float>::infinity();
  g[7] = std::numeric_limits<float>::quiet_NaN();
  g[200'002] = -std::numeric_limits<float>::infinity();
  const GradientStats stats = MeasureGradients(g);
  EXPECT_EQ(stats.non_finite, 3);
  EXPECT_NEAR(stats.sum_of_squares, 0.2, 1e-4);
  EXPECT_EQ(MeasureGradients({}).sum_of_squares, 0.0);
}

TEST(GradientNorm, ClipsByDivisionOnlyAboveTheLimit) {
  EXPECT_EQ(ClipDivisor(0.5, 1.0), 1.0);
  EXPECT_EQ(ClipDivisor(4.0, 2.0), 2.0);
  EXPECT_EQ(ClipDivisor(4.0, 0.0), 1.0);
}

TEST(Hyperparameters, TakesTheTypeOfTheMomentsAndTheSeedOfTheirRounding) {
  heddle::v1::TrainingConfig training;
  EXPECT_EQ(HyperparametersOf(training).moments, Moments::kFp32);
  training.set_moments(heddle::v1::TrainingConfig::MOMENTS_BF16);
  training.set_seed(5);
  EXPECT_EQ(HyperparametersOf(training).moments, Moments::kBf16);
  EXPECT_EQ(HyperparametersOf(training).seed, 5u);
}

float Wide(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Masters with moments of either type.
struct Trained {
  std::vector<float> p, g, m, v;
  std::vector<uint16_t> m16, v16;
  explicit Trained(size_t size) : p(size), g(size), m(size), v(size), m16(size), v16(size) {}
  Shard shard(const Hyperparameters& hyper, size_t begin, size_t end) {
    const size_t n = end - begin;
    Shard shard;
    shard.flat_offset = static_cast<int64_t>(begin);
    shard.rounding_offset = shard.flat_offset;
    shard.master = std::span(p).subspan(begin, n);
    shard.gradient = std::span<const float>(g).subspan(begin, n);
    if (hyper.moments == Moments::kBf16) {
      shard.m_bf16 = std::span(m16).subspan(begin, n);
      shard.v_bf16 = std::span(v16).subspan(begin, n);
    } else {
      shard.m = std::span(m).subspan(begin, n);
      shard.v = std::span(v).subspan(begin, n);
    }
    return shard;
  }
};

double Mean(const std::vector<uint16_t>& values) {
  double sum = 0;
  for (const uint16_t value : values) sum += Wide(value);
  return sum / static_cast<double>(values.size());
}

uint16_t Nearest(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 20.11. The step of v is (1 - beta2) of what is missing: below half of bf16's last place it is
// lost to the nearest value, and v ends far from the square of the gradient.
TEST(Bf16Moments, DoNotStallAtSmallGradients) {
  constexpr size_t kSize = 4096;
  constexpr int kUpdates = 6000;
  constexpr float kGradient = 1e-4f;
  for (const double beta2 : {0.95, 0.999}) {
    Hyperparameters hyper;
    hyper.beta2 = beta2;
    hyper.moments = Moments::kBf16;
    const std::vector<GroupRange> groups = {{0, kSize, 0.0, 1.0}};
    Trained state(kSize);
    state.g.assign(kSize, kGradient);
    uint16_t nearest = 0;
    for (int update = 1; update <= kUpdates; ++update) {
      StepArgs args;
      args.update = update;
      args.learning_rate = 1e-3;
      OptimizerStep(hyper, groups, args, state.shard(hyper, 0, kSize));
      nearest = Nearest(Wide(nearest) * static_cast<float>(beta2) +
                        kGradient * kGradient * static_cast<float>(1.0 - beta2));
    }
    EXPECT_NEAR(Mean(state.m16) / kGradient, 1.0, 2e-3) << "beta2 " << beta2;
    EXPECT_NEAR(Mean(state.v16) / (kGradient * kGradient), 1.0, 1e-2) << "beta2 " << beta2;
    for (const uint16_t v : state.v16) {
      ASSERT_NEAR(Wide(v) / (kGradient * kGradient), 1.0, 0.25) << "beta2 " << beta2;
    }
    // Adam under a constant gradient walks the rate per update, bias correction included.
    double walked = 0;
    for (const float p : state.p) walked -= p;
    EXPECT_NEAR(walked / kSize / (1e-3 * kUpdates), 1.0, 1e-2) << "beta2 " << beta2;
    EXPECT_LT(Wide(nearest) / (kGradient * kGradient), 1.0 - 1e-2) << "nearest does not stall";
  }
}

TEST(Bf16Moments, CutsIntoShardsChangeNoBit) {
  constexpr size_t kSize = 200'001;
  const std::vector<GroupRange> groups = {
      {0, 1000, 0.1, 1.0}, {1000, 1003, 0.0, 1.0}, {1003, static_cast<int64_t>(kSize), 0.1, 10.0}};
  for (const Algorithm algorithm : {Algorithm::kAdamW, Algorithm::kLion}) {
    Hyperparameters hyper;
    hyper.algorithm = algorithm;
    hyper.moments = Moments::kBf16;
    hyper.seed = 9;
    StepArgs args;
    args.learning_rate = 1e-3;
    Trained whole(kSize);
    for (size_t i = 0; i < kSize; ++i) whole.g[i] = std::cos(0.3f * static_cast<float>(i));
    Trained parts = whole;
    for (int64_t update = 1; update <= 3; ++update) {
      args.update = update;
      OptimizerStep(hyper, groups, args, whole.shard(hyper, 0, kSize));
      for (const auto& [begin, end] : std::vector<std::pair<size_t, size_t>>{
               {0, 0}, {0, 17}, {17, 1001}, {1001, 66'000}, {66'000, kSize}}) {
        OptimizerStep(hyper, groups, args, parts.shard(hyper, begin, end));
      }
    }
    EXPECT_EQ(whole.p, parts.p);
    EXPECT_EQ(whole.m16, parts.m16);
    EXPECT_EQ(whole.v16, parts.v16);
  }
}

// Every update and every seed rounds in its own way; what was drawn can be drawn again.
TEST(Bf16Moments, RoundingDependsOnSeedAndUpdateAlone) {
  const auto moments = [](uint64_t seed, int64_t update) {
    Hyperparameters hyper;
    hyper.moments = Moments::kBf16;
    hyper.seed = seed;
    Trained state(1000);
    for (size_t i = 0; i < 1000; ++i) state.g[i] = std::cos(0.3f * static_cast<float>(i));
    StepArgs args;
    args.update = update;
    OptimizerStep(hyper, std::vector<GroupRange>{{0, 1000, 0.0, 1.0}}, args,
                  state.shard(hyper, 0, 1000));
    return state.m16;
  };
  EXPECT_EQ(moments(1, 2), moments(1, 2));
  EXPECT_NE(moments(1, 2), moments(1, 3));
  EXPECT_NE(moments(1, 2), moments(2, 2));
}

}  // namespace
}  // namespace heddle::optim
