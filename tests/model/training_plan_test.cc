// What a step takes, what changes fit into a limit, and what a submit is told that reserves too
// little. The formulas themselves: cost_formulas_test.cc.
#include "model/training_plan.h"

#include <gtest/gtest.h>

#include <cmath>

#include "heddle/v1/config.pb.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::model {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

RunConfig Config(int ranks = 1) {
  RunConfig config;
  heddle::v1::ModelConfig* model = config.mutable_model();
  model->set_vocab_size(8192);
  model->set_d_model(512);
  model->set_n_layers(8);
  model->set_n_heads(8);
  model->set_n_kv_heads(2);
  model->set_head_dim(64);
  model->set_d_ffn(1376);
  config.mutable_training()->set_max_seq_len(2048);
  config.mutable_training()->set_micro_batch_size(4);
  config.mutable_training()->set_max_steps(1000);
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  return config;
}

// From that number of tokens on the step is bound by its computation, below it by the link.
TEST(TrainingPlan, TheBoundTurnsWhereTheFormulaSays) {
  RunConfig config = Config(2);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  config.mutable_training()->set_micro_batch_size(1);
  const StepEstimate counted = EstimateStep(config, {});
  const ModelPlan plan = *PlanModel(config.model());
  // Formula (1), one micro-batch: (4 + 4) P (W - 1) / W.
  EXPECT_DOUBLE_EQ(counted.communication_bytes, 8.0 * static_cast<double>(plan.flat_elements) / 2);
  EXPECT_EQ(counted.tokens, 2 * 2048);
  EXPECT_EQ(counted.tokens_per_second, 0) << "no figures, no prediction";
  EXPECT_EQ(counted.bound, "");
  const double flops = 1e12;
  const double balance = counted.communication_bytes * flops / (2048 * counted.flops_per_token);
  EXPECT_EQ(EstimateStep(config, {flops, 1.01 * balance}).bound, "compute");
  const StepEstimate slow = EstimateStep(config, {flops, 0.5 * balance});
  EXPECT_EQ(slow.bound, "communication");
  EXPECT_NEAR(slow.step_seconds / EstimateStep(config, {flops, 2 * balance}).step_seconds, 2, 0.01);
}

TEST(TrainingPlan, AccumulationAndLayersFirstSaveTraffic) {
  RunConfig config = Config(2);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  config.mutable_training()->set_gradient_accumulation_steps(4);
  const double elements = static_cast<double>(PlanModel(config.model())->flat_elements);
  const auto bytes = [&](TrainingConfig::Accumulation accumulation) {
    config.mutable_training()->set_accumulation(accumulation);
    return EstimateStep(config, {}).communication_bytes / elements * 2;
  };
  EXPECT_DOUBLE_EQ(bytes(TrainingConfig::ACCUMULATION_SYNC_EACH), 4 * 4 + 4 * 4);
  EXPECT_DOUBLE_EQ(bytes(TrainingConfig::ACCUMULATION_SYNC_LAST), 4 * 4 + 4);
  EXPECT_DOUBLE_EQ(bytes(TrainingConfig::ACCUMULATION_LAYER_MAJOR), 4 + 4);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_OPTIMIZER);
  EXPECT_DOUBLE_EQ(bytes(TrainingConfig::ACCUMULATION_SYNC_LAST), 2 + 4);
}

TEST(TrainingPlan, RecomputationIsPartOfTheFlops) {
  RunConfig config = Config();
  const double none = EstimateStep(config, {}).flops_per_token;
  config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  const double full = EstimateStep(config, {}).flops_per_token;
  config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE);
  const double selective = EstimateStep(config, {}).flops_per_token;
  EXPECT_GT(full / none, 1.25);
  EXPECT_LT(full / none, 1.4);
  EXPECT_GT(selective, none);
  EXPECT_LT(selective, full);
}

TEST(TrainingPlan, CategoriesAddUpToWhatARankTakes) {
  RunConfig config = Config(2);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  int64_t sum = 0;
  for (const NamedBytes& one : MemoryCategories(EstimateRank(config))) {
    EXPECT_GT(one.bytes, 0) << one.name;
    sum += one.bytes;
  }
  EXPECT_EQ(sum, BytesPerRank(config));
  EXPECT_GT(DefaultReservation(config), BytesPerRank(config));
}

TEST(TrainingPlan, EveryChangeItNamesFitsAndIsComputed) {
  const RunConfig config = Config(2);
  const int64_t now = BytesPerRank(config);
  const std::vector<Change> changes = ChangesThatFit(config, now - now / 5);
  ASSERT_FALSE(changes.empty());
  for (const Change& change : changes) {
    ASSERT_EQ(change.settings.size(), 1u);
    EXPECT_LE(change.bytes, now - now / 5) << change.settings[0];
    EXPECT_FALSE(change.price.empty());
    if (change.settings[0] != "training.gradient_checkpointing=full") continue;
    RunConfig recomputed = config;
    recomputed.mutable_training()->set_gradient_checkpointing(
        TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
    EXPECT_EQ(change.bytes, BytesPerRank(recomputed));
  }
  // The same number of sequences a step.
  for (const Change& change : ChangesThatFit(Config(), BytesPerRank(Config()) - 1)) {
    if (change.settings[0].rfind("training.micro_batch_size", 0) != 0) continue;
    EXPECT_EQ(change.settings[0],
              "training.micro_batch_size=2 training.gradient_accumulation_steps=2");
  }
}

TEST(TrainingPlan, SeveralChangesTogetherWhereNoneIsEnough) {
  RunConfig config = Config(4);
  config.mutable_training()->set_precision(TrainingConfig::PRECISION_FP32);
  const std::vector<Change> singles = ChangesThatFit(config, BytesPerRank(config) - 1);
  int64_t smallest = BytesPerRank(config);
  for (const Change& change : singles) smallest = std::min(smallest, change.bytes);
  const std::vector<Change> together = ChangesThatFit(config, smallest - 1);
  ASSERT_EQ(together.size(), 1u);
  EXPECT_GE(together[0].settings.size(), 2u);
  EXPECT_LT(together[0].bytes, smallest);
  EXPECT_TRUE(ChangesThatFit(config, int64_t{1} << 20).empty()) << "nothing makes it so small";
}

TEST(TrainingPlan, AReservationBelowThePlanIsRefusedWithWhatFits) {
  RunConfig config = Config();
  EXPECT_TRUE(CheckReservation(config).ok()) << "auto";
  const int64_t plan = BytesPerRank(config);
  config.mutable_parallel()->set_memory_per_rank(plan);
  EXPECT_TRUE(CheckReservation(config).ok());
  config.mutable_parallel()->set_memory_per_rank(plan * 8 / 10);
  const Status refused = CheckReservation(config);
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(Message(refused).find("parallel.memory_per_rank"), std::string::npos) << refused;
  EXPECT_NE(Message(refused).find("training.gradient_checkpointing=full: "), std::string::npos)
      << refused;
  config.set_kind(RunConfig::KIND_COMMAND);
  EXPECT_TRUE(CheckReservation(config).ok());
}

TEST(TrainingPlan, FillsAPlanAndLeavesOutWhatIsNotKnown) {
  RunConfig config = Config(2);
  config.mutable_checkpoint()->set_save_interval(100);
  heddle::v1::PlanReply plan;
  FillPlan(config, {}, &plan);
  EXPECT_TRUE(plan.memory().fits());
  EXPECT_EQ(static_cast<int64_t>(plan.memory().bytes_per_rank()), BytesPerRank(config));
  EXPECT_FALSE(plan.throughput().has_tokens_per_second());
  EXPECT_EQ(plan.throughput().accumulation(), "sync_last");
  ASSERT_EQ(plan.warnings_size(), 1);
  EXPECT_NE(plan.warnings(0).find("--link-gbs"), std::string::npos);
  EXPECT_EQ(plan.storage().save_interval_steps(), 100);
  const ModelPlan model = *PlanModel(config.model());
  EXPECT_EQ(static_cast<int64_t>(plan.storage().checkpoint_bytes()), 12 * model.parameters);
  EXPECT_EQ(plan.storage().kept_bytes(), 4 * plan.storage().checkpoint_bytes())
      << "three kept, one in the making";

  heddle::v1::PlanReply known;
  FillPlan(config, {1e12, 1e9}, &known);
  EXPECT_GT(known.throughput().tokens_per_second(), 0);
  EXPECT_EQ(known.warnings_size(), 0);

  config.mutable_parallel()->set_memory_per_rank(BytesPerRank(config) / 2);
  heddle::v1::PlanReply small;
  FillPlan(config, {}, &small);
  EXPECT_FALSE(small.memory().fits());
  EXPECT_GT(small.memory().changes_size(), 0);
}

}  // namespace
}  // namespace heddle::model
