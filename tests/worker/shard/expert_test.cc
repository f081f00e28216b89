// Experts divided over ranks give the training that ranks with all experts give
// (training-runtime.md 10, 20.3): whatever the degree, the mode and the way to accumulate; with
// experts that get no token, ranks without micro-batches, and all tokens on one expert.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"
#include "tests/worker/shard/gloo_ranks.h"
#include "tests/worker/shard/sharded_run.h"

namespace heddle::shard {
namespace {

// Eight experts, two of them for a token, in two of three layers.
heddle::v1::ModelConfig MoeConfig() {
  heddle::v1::ModelConfig config = model_test::TinyConfig(model_test::Kind::kHybrid, true);
  heddle::v1::MoeConfig* moe = config.mutable_moe();
  moe->set_n_experts(8);
  moe->set_top_k(2);
  moe->set_n_shared(1);
  moe->set_d_expert(12);
  moe->add_layers(0);
  moe->add_layers(2);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_bias_update_rate(0.01);
  moe->set_aux_loss(0.01);
  moe->set_z_loss(0.001);
  return config;
}

Case MoeCase(int world, int degree, Mode mode, Accumulation accumulation) {
  Case c;
  c.config = MoeConfig();
  c.world = world;
  c.options.mode = mode;
  c.options.accumulation = accumulation;
  c.options.precision = Precision::kFp32;
  c.options.expert_degree = degree;
  c.clip = 0.5;  // the norm matters
  return c;
}

double Relative(double a, double b) { return std::abs(a - b) / std::max(std::abs(b), 1e-12); }

// Largest difference as a share of the largest element.
double LargestShare(const Values& got, const Values& expected) {
  double size = 0;
  for (const float value : expected) size = std::max(size, std::abs(double{value}));
  return Largest(got, expected) / size;
}

void ExpectSameTraining(const Outcome& got, const Outcome& expected, const std::string& what) {
  ASSERT_EQ(got.losses.size(), expected.losses.size());
  for (size_t step = 0; step < got.losses.size(); ++step) {
    EXPECT_LT(Relative(got.losses[step], expected.losses[step]), 1e-3) << what << " step " << step;
  }
  EXPECT_LT(Relative(got.norms.front(), expected.norms.front()), 1e-6) << what;
  EXPECT_LT(LargestShare(got.first_gradients, expected.first_gradients), 2e-6) << what;
  EXPECT_EQ(got.buffers, expected.buffers) << what << ": balancing biases";
}

TEST(ExpertParallel, FiftyStepsAreTheSameWithDegreesOneTwoAndFour) {
  Case c = MoeCase(4, 1, Mode::kFull, Accumulation::kLayerMajor);
  c.steps = 50;
  const Outcome expected = RunOnRanks(c);
  EXPECT_LT(expected.losses.back(), expected.losses.front() - 0.5) << "nothing was learned";
  for (const int degree : {2, 4}) {
    c.options.expert_degree = degree;
    ExpectSameTraining(RunOnRanks(c), expected, Str("degree ", degree));
  }
}

// Against ranks with all experts, without recomputation, which changes no bit.
void CompareToAll(Case c, const std::vector<Recompute>& recomputes) {
  const Outcome expected = RunOnRanks(c);
  c.options.expert_degree = 2;
  for (const Recompute recompute : recomputes) {
    c.recompute = recompute;
    const Outcome got = RunOnRanks(c);
    const std::string what =
        Str("mode ", static_cast<int>(c.options.mode), " accumulation ",
            static_cast<int>(c.options.accumulation), " recompute ", static_cast<int>(recompute));
    if (c.options.precision == Precision::kFp32) {
      ExpectSameTraining(got, expected, what);
    } else {
      EXPECT_LT(Relative(got.losses.back(), expected.losses.back()), 1e-2) << what;
      EXPECT_LT(LargestShare(got.first_gradients, expected.first_gradients), 2e-2) << what;
    }
  }
}

TEST(ExpertParallel, EveryModeAccumulationAndRecomputation) {
  for (const Mode mode : {Mode::kNone, Mode::kOptimizer, Mode::kFull}) {
    for (const Accumulation accumulation :
         {Accumulation::kSyncEach, Accumulation::kSyncLast, Accumulation::kLayerMajor}) {
      if (mode == Mode::kNone && accumulation == Accumulation::kSyncEach) continue;
      CompareToAll(MoeCase(4, 1, mode, accumulation),
                   {Recompute::kNone, Recompute::kSelective, Recompute::kFull});
    }
  }
  Case bf16 = MoeCase(4, 1, Mode::kFull, Accumulation::kSyncLast);
  bf16.options.precision = Precision::kBf16;
  CompareToAll(bf16, {Recompute::kNone, Recompute::kFull});
}

// Of the same degree every mode has the same bits, as without expert parallelism.
TEST(ExpertParallel, ModesHaveTheSameBits) {
  for (const int degree : {1, 2, 4}) {
    const Outcome none = RunOnRanks(MoeCase(4, degree, Mode::kNone, Accumulation::kSyncLast));
    for (const Mode mode : {Mode::kOptimizer, Mode::kFull}) {
      const Outcome other = RunOnRanks(MoeCase(4, degree, mode, Accumulation::kSyncLast));
      EXPECT_EQ(other.losses, none.losses) << degree;
      EXPECT_EQ(other.norms, none.norms) << degree;
      EXPECT_EQ(other.masters, none.masters) << degree;
    }
  }
}

// Eight experts for a handful of tokens, of three ranks some without a micro-batch.
TEST(ExpertParallel, ExpertsWithoutTokensAndRanksWithoutBatches) {
  for (const int world : {2, 3, 4, 8}) {
    Case c = MoeCase(world, 1, Mode::kFull, Accumulation::kSyncLast);
    c.config.mutable_moe()->set_n_experts(world == 3 ? 9 : 16);
    c.config.mutable_moe()->set_top_k(1);
    const Outcome expected = RunOnRanks(c);
    c.options.expert_degree = world;
    ExpectSameTraining(RunOnRanks(c), expected, Str(world, " ranks"));
  }
}

// A bias that nothing outweighs sends every token to expert 0: seven ranks compute nothing.
TEST(ExpertParallel, AllTokensOnOneExpert) {
  Case c = MoeCase(4, 1, Mode::kNone, Accumulation::kSyncLast);
  c.config.mutable_moe()->set_top_k(1);
  c.first_bias = 1e6f;
  const Outcome expected = RunOnRanks(c);
  c.options.expert_degree = 4;
  const Outcome got = RunOnRanks(c);
  ExpectSameTraining(got, expected, "one expert");
  const model::ModelPlan plan = *model::PlanModel(c.config);
  const model::TensorSpec& idle = *plan.Find("model.layers.0.mlp.experts.7.up_proj.weight");
  const model::TensorSpec& busy = *plan.Find("model.layers.0.mlp.experts.0.up_proj.weight");
  const auto size = [&](const model::TensorSpec& tensor) {
    double sum = 0;
    for (int64_t i = 0; i < tensor.elements; ++i) {
      sum += std::abs(double{got.first_gradients[static_cast<size_t>(tensor.offset + i)]});
    }
    return sum;
  };
  EXPECT_EQ(size(idle), 0);
  EXPECT_GT(size(busy), 0);
}

}  // namespace
}  // namespace heddle::shard
