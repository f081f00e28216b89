// Experts in a bounded resident set train as experts that are always in memory do, bit for bit:
// losses, norms, parameters, balancing biases (training-runtime.md 12, 20.6).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/disk_dir.h"
#include "tests/worker/shard/gloo_ranks.h"
#include "tests/worker/shard/sharded_run.h"

namespace heddle::shard {
namespace {

// 32 experts, two for a token, in two of three layers: 64 slots of five pages and more.
Case OffloadCase(int world, Precision precision) {
  Case c;
  c.config = model_test::TinyConfig(model_test::Kind::kHybrid, true);
  heddle::v1::MoeConfig* moe = c.config.mutable_moe();
  moe->set_n_experts(32);
  moe->set_top_k(2);
  moe->set_d_expert(16);
  moe->add_layers(0);
  moe->add_layers(2);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_bias_update_rate(0.01);
  moe->set_aux_loss(0.01);
  c.world = world;
  c.options.mode = Mode::kFull;
  c.options.accumulation = Accumulation::kSyncLast;
  c.options.precision = precision;
  c.options.expert_degree = world;
  c.clip = 0.5;
  return c;
}

// Bytes of all blocks of a rank: the set that leaves nothing out.
int64_t AllBytes(const Case& c) {
  const model::ModelPlan plan =
      *model::PlanModel(c.config, model::ExpertsOfRank(c.config, 0, c.options.expert_degree));
  int64_t bytes = 0;
  for (size_t u = static_cast<size_t>(plan.dense_units); u < plan.units.size(); ++u) {
    const int64_t elements = plan.units[u].elements;
    const bool bf16 = c.options.precision == Precision::kBf16;
    bytes += offload::BlockMemoryBytes((bf16 ? 2 : 4) * elements) +
             offload::BlockMemoryBytes(4 * elements) +
             offload::BlockMemoryBytes((bf16 ? 12 : 8) * elements);
  }
  return bytes;
}

void ExpectSameBits(const Outcome& got, const Outcome& expected, const std::string& what) {
  EXPECT_EQ(got.losses, expected.losses) << what;
  EXPECT_EQ(got.norms, expected.norms) << what;
  EXPECT_EQ(got.masters, expected.masters) << what;
  EXPECT_EQ(got.buffers, expected.buffers) << what;
}

struct Parts {
  Precision precision = Precision::kBf16;
  int percent = 100;
  bool spill = false;
};

// What experts in memory give, once for each precision.
const Outcome& Resident(Precision precision) {
  static std::map<Precision, Outcome> all;
  const auto found = all.find(precision);
  if (found != all.end()) return found->second;
  Case c = OffloadCase(1, precision);
  c.steps = 50;
  return all.emplace(precision, RunOnRanks(c)).first->second;
}

class OffloadEquality : public testing::TestWithParam<Parts> {};

TEST_P(OffloadEquality, FiftyStepsHaveTheBitsOfExpertsInMemory) {
  const Parts parts = GetParam();
  Case c = OffloadCase(1, parts.precision);
  c.steps = 50;
  const Outcome& expected = Resident(parts.precision);
  EXPECT_LT(expected.losses.back(), expected.losses.front() - 0.5) << "nothing was learned";
  const test::DiskDir dir;
  const int64_t all = AllBytes(c);
  c.options.offload = {.enabled = true,
                       .budget_bytes = all * parts.percent / 100,
                       .spill_dir = parts.spill ? dir.path() : ""};
  const Outcome got = RunOnRanks(c);
  ExpectSameBits(got, expected, "offloaded");
  EXPECT_LE(got.offload.peak_bytes, c.options.offload.budget_bytes);
  if (parts.percent < 100) {
    EXPECT_GT(got.offload.evictions, 0) << "everything fitted";
    EXPECT_GT(got.offload.bytes_written, all) << "nothing went home";
    EXPECT_GT(got.offload.bytes_read, all);
  } else {
    EXPECT_EQ(got.offload.evictions, 0);
  }
}

std::vector<Parts> AllParts() {
  std::vector<Parts> all;
  for (const Precision precision : {Precision::kBf16, Precision::kFp32}) {
    for (const int percent : {100, 50, 10}) {
      for (const bool spill : {false, true}) all.push_back({precision, percent, spill});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Budgets, OffloadEquality, testing::ValuesIn(AllParts()),
                         [](const testing::TestParamInfo<Parts>& info) {
                           return Str(info.param.precision == Precision::kBf16 ? "bf16" : "fp32",
                                      "_", info.param.percent, info.param.spill ? "_spill" : "");
                         });

TEST(Offload, EveryAccumulationRecomputationAndDegreeHasTheSameBits) {
  for (const int world : {1, 2, 4}) {
    for (const Accumulation accumulation : {Accumulation::kSyncLast, Accumulation::kLayerMajor}) {
      for (const Recompute recompute :
           {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
        Case c = OffloadCase(world, Precision::kBf16);
        c.options.accumulation = accumulation;
        c.recompute = recompute;
        const Outcome expected = RunOnRanks(c);
        const test::DiskDir dir;
        // At least the update of two experts.
        c.options.offload = {.enabled = true,
                             .budget_bytes = std::max<int64_t>(AllBytes(c) / 8, 64 << 10),
                             .spill_dir = dir.path()};
        ExpectSameBits(RunOnRanks(c), expected,
                       Str(world, " ranks, accumulation ", static_cast<int>(accumulation),
                           ", recompute ", static_cast<int>(recompute)));
      }
    }
  }
}

// What layer-major passes are for: five micro-batches visit an expert once forward and once back.
TEST(Offload, LayerMajorReadsWeightsOnceForAllMicroBatches) {
  Case c = OffloadCase(1, Precision::kBf16);
  const test::DiskDir dir;
  c.options.offload = {.enabled = true, .budget_bytes = AllBytes(c) / 10, .spill_dir = dir.path()};
  const auto pins = [](const Outcome& run) { return run.offload.hits + run.offload.misses; };
  const Outcome apart = RunOnRanks(c);
  c.options.accumulation = Accumulation::kLayerMajor;
  const Outcome together = RunOnRanks(c);
  EXPECT_EQ(together.masters, apart.masters);
  EXPECT_EQ(together.norms, apart.norms);
  // Of 64 experts in three steps, at most: weights forward; weights and gradient back; gradient,
  // state and weights at the update. Two at the start, one at each evaluation and two at the end.
  const int64_t experts = 64;
  EXPECT_LE(pins(together), experts * (3 * (1 + 2 + 3 + 1) + 4));
  EXPECT_GT(2 * pins(apart), 3 * pins(together));
  EXPECT_LT(together.offload.bytes_read, apart.offload.bytes_read / 10 * 8);
}

// Of the states the same part stays from one update to the next, and nothing is fetched so early
// that it must leave again: what moves is what does not fit, each way (step_estimate.cc).
TEST(Offload, WhatDoesNotFitMovesOnceAStep) {
  Case c = OffloadCase(1, Precision::kBf16);
  c.options.accumulation = Accumulation::kLayerMajor;
  c.steps = 20;
  const test::DiskDir dir;
  const int64_t all = AllBytes(c);
  c.options.offload = {.enabled = true, .budget_bytes = all * 6 / 10, .spill_dir = dir.path()};
  const Outcome run = RunOnRanks(c);
  const double out = static_cast<double>(all - c.options.offload.budget_bytes);
  // What was never written is not read: the first step reads next to nothing.
  const double read = static_cast<double>(run.offload.bytes_read) / (c.steps - 1);
  const double written = static_cast<double>(run.offload.bytes_written) / c.steps;
  std::printf("a step: %.0f bytes do not fit, %.0f read, %.0f written\n", out, read, written);
  EXPECT_NEAR(read / out, 1.0, 0.15);
  EXPECT_NEAR(written / out, 1.0, 0.15);
}

// A bound of half the weights: each pass reads the other half, the update writes weights without
// reading them.
TEST(Offload, WeightsThatDoNotFitAreReadInEveryPassAndNotForTheUpdate) {
  Case c = OffloadCase(1, Precision::kBf16);
  c.options.accumulation = Accumulation::kLayerMajor;
  const test::DiskDir dir;
  const int64_t all = AllBytes(c);
  c.options.offload = {.enabled = true, .budget_bytes = all / 10, .spill_dir = dir.path()};
  const auto moved = [&](int steps) {
    c.steps = steps;
    const Outcome run = RunOnRanks(c);
    return std::pair(run.offload.bytes_read, run.offload.bytes_written);
  };
  const auto [read_first, written_first] = moved(5);
  const auto [read_all, written_all] = moved(15);
  // Blocks of a page of weights, one of gradients, three of states.
  const double page = 64.0 * offload::kPageBytes;
  const double out = page - static_cast<double>(c.options.offload.budget_bytes);
  const double read = static_cast<double>(read_all - read_first) / 10;
  const double written = static_cast<double>(written_all - written_first) / 10;
  // Forward, backward, and the evaluation after the step.
  const double expected_read = 3 * page + page + 3 * out;
  const double expected_written = 3 * page + page + out;
  std::printf("a step: %.0f read (%.0f), %.0f written (%.0f)\n", read, expected_read, written,
              expected_written);
  EXPECT_LE(read, expected_read);
  EXPECT_GE(read, 0.85 * expected_read);
  EXPECT_NEAR(written / expected_written, 1.0, 0.08);
}

// untouched: skip. Experts with tokens are updated as ever; of others not a bit moves, and nothing
// is read for them.
TEST(Offload, ExpertsWithoutTokensAreLeftOutOfTheUpdateIfAsked) {
  Case c = OffloadCase(1, Precision::kBf16);
  c.config.mutable_moe()->set_n_experts(128);
  const test::DiskDir dir;
  c.options.offload = {.enabled = true, .budget_bytes = AllBytes(c) / 10, .spill_dir = dir.path()};
  c.steps = 0;
  const Outcome before = RunOnRanks(c);
  c.steps = 1;
  const Outcome eager = RunOnRanks(c);
  c.options.offload.skip_untouched = true;
  const Outcome skipped = RunOnRanks(c);
  const model::ModelPlan plan = *model::PlanModel(c.config);
  int touched = 0;
  int untouched = 0;
  for (auto u = static_cast<size_t>(plan.dense_units); u < plan.units.size(); ++u) {
    const auto of_unit = [&](const Values& values) {
      return Values(values.begin() + plan.units[u].offset,
                    values.begin() + plan.units[u].offset + plan.units[u].elements);
    };
    const Values gradient = of_unit(skipped.first_gradients);
    const bool learns =
        std::any_of(gradient.begin(), gradient.end(), [](float g) { return g != 0.0f; });
    EXPECT_NE(of_unit(eager.masters), of_unit(before.masters)) << "weights decay";
    const bool stays = of_unit(skipped.masters) == of_unit(before.masters);
    // A last token has no label: what only it visits has a gradient of zeros, and decays.
    if (!stays) {
      EXPECT_EQ(of_unit(skipped.masters), of_unit(eager.masters)) << u;
    }
    EXPECT_FALSE(stays && learns) << u;
    (stays ? untouched : touched) += 1;
  }
  EXPECT_GT(touched, 90);
  EXPECT_GT(untouched, 90);
  EXPECT_LT(skipped.offload.bytes_written, eager.offload.bytes_written);
}

// What experts measure as their gradients land: none of them is read again for the norm, one that
// is not finite is counted in its own step, and none is left of gradients that were dropped.
TEST(Offload, GradientsAreMeasuredWhereTheyLandAndInNoOtherStep) {
  Case c = OffloadCase(1, Precision::kBf16);
  const test::DiskDir dir;
  c.options.world = 1;
  c.options.offload = {.enabled = true, .budget_bytes = AllBytes(c) / 10, .spill_dir = dir.path()};
  ASSERT_OK_AND_ASSIGN(const model::ModelPlan plan, model::PlanModel(c.config));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Parameters> parameters,
                       MakeParameters(plan, c.options));
  const std::unique_ptr<comm::Communicator> alone = comm::MakeSolo();
  parameters->Connect(alone.get());
  ASSERT_OK(InitParameters(7, parameters.get()));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<model::LanguageModel> model,
                       model::LanguageModel::Create(c.config, parameters->memory(), {}));
  const model_test::BatchData batch = model_test::RandomBatch({100, 40}, 37, 1);
  struct Seen {
    int experts = 0;
    int read = 0;
    size_t non_finite = 0;
  };
  const auto measure = [&] {
    Seen seen;
    EXPECT_OK(parameters->ForEachMeasured([&](const Measured& slice) {
      if (slice.begin < parameters->offloaded_from()) return;
      ++seen.experts;
      seen.read += slice.stats.has_value() ? 0 : 1;
      seen.non_finite += static_cast<size_t>(slice.Stats().non_finite);
    }));
    return seen;
  };
  // Two passes: only what the last one does not visit is read.
  const auto step = [&](double first_scale) {
    parameters->BeginStep();
    for (const bool last : {false, true}) {
      layers::StepInfo info;
      info.loss_scale = last ? 0.01 : first_scale;
      info.row_scale = 0.01;
      EXPECT_OK(model->ForwardBackward(batch.view(), info,
                                       parameters->Hooks({.train = true, .last = last})));
    }
    EXPECT_OK(parameters->FinishGradients());
    return measure();
  };
  const Seen good = step(0.01);
  EXPECT_GT(good.experts, 32);
  EXPECT_EQ(good.read, 0) << "the last pass visits the experts of the first";
  EXPECT_EQ(good.non_finite, 0u);
  EXPECT_GT(step(INFINITY).non_finite, 0u);
  EXPECT_EQ(step(0.01).non_finite, 0u) << "of the step before";
  EXPECT_OK(parameters->DropOffloadedGradients());
  EXPECT_EQ(measure().experts, 0) << "they were dropped";
}

TEST(Offload, BoundsThatCannotWorkAreRefusedWithTheNumbers) {
  const Case c = OffloadCase(2, Precision::kBf16);
  const model::ModelPlan plan = *model::PlanModel(c.config);
  Options options = c.options;
  options.world = 1;
  options.expert_degree = 1;
  options.offload = {.enabled = true, .budget_bytes = 8192, .spill_dir = ""};
  EXPECT_STATUS(MakeParameters(plan, options).status(), StatusCode::kInvalidArgument,
                "two experts");
  options.offload = {.enabled = true, .budget_bytes = 1 << 20, .spill_dir = "/no/such/folder"};
  EXPECT_STATUS(MakeParameters(plan, options).status(), StatusCode::kInvalidArgument,
                "/no/such/folder");
  options.world = 2;
  options.offload.spill_dir = "";
  EXPECT_STATUS(MakeParameters(plan, options).status(), StatusCode::kInvalidArgument,
                "parallel.expert");
}

}  // namespace
}  // namespace heddle::shard
