// What is advised where memory does not suffice must suffice, by the same estimate.
#include "model/memory_advice.h"

#include <gtest/gtest.h>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"

namespace heddle::model {
namespace {

using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

RunConfig Config(int ranks = 2) {
  RunConfig config;
  heddle::v1::ModelConfig& model = *config.mutable_model();
  model.set_vocab_size(4096);
  model.set_d_model(256);
  model.set_n_layers(6);
  model.set_n_heads(4);
  model.set_d_ffn(512);
  config.mutable_training()->set_micro_batch_size(16);
  config.mutable_training()->set_max_seq_len(512);
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  return config;
}

int64_t Plan(const RunConfig& config) {
  return EstimateMemory(config.model(), config.training(), config.parallel()).Total();
}

std::string Text(const std::vector<MemoryChange>& changes) {
  std::string text;
  for (const MemoryChange& change : changes) {
    for (const std::string& setting : change.settings) text += setting + " ";
    text += "| ";
  }
  return text;
}

TEST(ChangesThatFit, SingleOnesAreEnoughWhereTheyAreAndTheCheapestComesFirst) {
  const RunConfig config = Config();
  const int64_t plan = Plan(config);
  const std::vector<MemoryChange> changes = ChangesThatFit(config, plan * 9 / 10);
  ASSERT_FALSE(changes.empty());
  EXPECT_LE(changes.size(), 3u);
  for (const MemoryChange& change : changes) EXPECT_LE(change.bytes, plan * 9 / 10);
  EXPECT_NE(Text(changes).find("training.micro_batch_size=8"), std::string::npos) << Text(changes);
}

// The batch of a step, and so what is learnt, stays as it was.
TEST(ChangesThatFit, SmallerMicroBatchesAreAsManyMore) {
  RunConfig config = Config(1);
  const std::vector<MemoryChange> changes = ChangesThatFit(config, Plan(config) * 2 / 5);
  EXPECT_NE(Text(changes).find("training.micro_batch_size=4 "
                               "training.gradient_accumulation_steps=4"),
            std::string::npos)
      << Text(changes);
  config.mutable_training()->set_global_batch_size(64);
  EXPECT_EQ(Text(ChangesThatFit(config, Plan(config) * 2 / 5)).find("accumulation"),
            std::string::npos);
}

TEST(ChangesThatFit, SeveralTogetherWhereNoneSufficesAlone) {
  const RunConfig config = Config();
  RunConfig least = config;
  least.mutable_training()->set_micro_batch_size(1);
  least.mutable_training()->set_gradient_checkpointing(TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  least.mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  least.mutable_parallel()->set_shard(heddle::v1::ParallelConfig::SHARD_FULL);
  const int64_t limit = Plan(least) + (1 << 20);
  const std::vector<MemoryChange> changes = ChangesThatFit(config, limit);
  ASSERT_EQ(changes.size(), 1u);
  EXPECT_GT(changes[0].settings.size(), 2u) << Text(changes);
  EXPECT_LE(changes[0].bytes, limit);
  EXPECT_TRUE(ChangesThatFit(config, 1 << 20).empty()) << "nothing makes it that small";
}

TEST(ChangesThatFit, OneRankIsNotToldToShard) {
  const RunConfig config = Config(1);
  EXPECT_EQ(Text(ChangesThatFit(config, Plan(config) * 9 / 10)).find("shard"), std::string::npos);
}

TEST(Categories, AddUpToTheTotal) {
  const RunConfig config = Config();
  const MemoryEstimate estimate =
      EstimateMemory(config.model(), config.training(), config.parallel());
  int64_t sum = 0;
  for (const auto& [name, bytes] : Categories(estimate)) sum += bytes;
  EXPECT_EQ(sum, estimate.Total());
}

TEST(BytesText, HasOneDigit) {
  EXPECT_EQ(BytesText(512), "512 B");
  EXPECT_EQ(BytesText(int64_t{12} << 20), "12.0 MiB");
  EXPECT_EQ(BytesText((int64_t{5} << 30) + (int64_t{1} << 27)), "5.1 GiB");
}

}  // namespace
}  // namespace heddle::model
