// Whole runs of ranks that keep a part each (training-runtime.md sections 5 and 7, 20.7): the same
// bits in every mode, checkpoints that any mode and number of ranks continues, kills.
#include <gtest/gtest.h>
#include <signal.h>

#include <string>
#include <vector>

#include "base/status/status.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/trainer/job.h"

namespace heddle::trainer {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

RunConfig ShardedConfig(ParallelConfig::Shard mode, int ranks, int64_t steps) {
  RunConfig config = SmallConfig(ranks, steps);
  config.mutable_parallel()->set_shard(mode);
  return config;
}

// One attempt that is told to save and leave once it is at `step`.
void RunAndStop(Job* job, uint64_t step) {
  FakeAttempt attempt(job->Next());
  ASSERT_TRUE(attempt.WaitForStep(step));
  attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
  attempt.Wait();
  job->Collect(&attempt);
  ASSERT_GE(job->saved_step(), step);
}

TEST(Shard, EveryModeAndAccumulationWithOneOrderOfSumsGivesTheSameBits) {
  Job whole(SmallConfig(2, 8), 2);
  RunToEnd(&whole);
  for (const auto mode : {ParallelConfig::SHARD_OPTIMIZER, ParallelConfig::SHARD_FULL}) {
    for (const auto accumulation :
         {TrainingConfig::ACCUMULATION_SYNC_LAST, TrainingConfig::ACCUMULATION_LAYER_MAJOR}) {
      Job sharded(ShardedConfig(mode, 2, 8), 2);
      sharded.config().mutable_training()->set_accumulation(accumulation);
      RunToEnd(&sharded);
      SCOPED_TRACE(testing::Message() << "shard " << mode << " accumulation " << accumulation);
      ExpectSameBits(whole.series(), sharded.series());
    }
  }
}

TEST(Shard, ReducingEachMicroBatchReachesTheSameLoss) {
  Job whole(SmallConfig(2, 20), 2);
  RunToEnd(&whole);
  for (const bool narrow : {false, true}) {
    Job each(ShardedConfig(ParallelConfig::SHARD_FULL, 2, 20), 2);
    each.config().mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_SYNC_EACH);
    if (narrow) {
      each.config().mutable_parallel()->set_reduce_dtype(ParallelConfig::REDUCE_DTYPE_BF16);
    }
    RunToEnd(&each);
    for (const auto& [step, point] : each.series()) {
      EXPECT_EQ(point.batch_hash(), whole.series().at(step).batch_hash());
      EXPECT_NEAR(point.loss() / whole.series().at(step).loss(), 1.0, narrow ? 1e-2 : 1e-3)
          << "step " << step << " bf16 on the wire: " << narrow;
    }
  }
}

// Every mode continues every other one's checkpoint, bit for bit at one number of ranks.
TEST(Shard, ModesContinueEachOther) {
  Job calm(SmallConfig(2, 24), 2);
  RunToEnd(&calm);
  Job changing(SmallConfig(2, 24), 2);
  uint64_t stop = 5;
  for (const auto mode : {ParallelConfig::SHARD_FULL, ParallelConfig::SHARD_NONE,
                          ParallelConfig::SHARD_OPTIMIZER, ParallelConfig::SHARD_FULL}) {
    changing.config().mutable_parallel()->set_shard(mode);
    ASSERT_NO_FATAL_FAILURE(RunAndStop(&changing, stop));
    ExpectGood(changing.records().back(), changing.root());
    stop = changing.saved_step() + 2;
  }
  RunToEnd(&changing);
  ExpectSameBits(calm.series(), changing.series());
}

// 4 -> 2 -> 3 -> 1 ranks: the same data, the same loss. Three ranks have different numbers of
// micro-batches, and slices of small units that are empty.
TEST(Shard, OtherNumbersOfRanksContinue) {
  Job one(SmallConfig(1, 24), 1);
  RunToEnd(&one);
  Job changing(ShardedConfig(ParallelConfig::SHARD_FULL, 4, 24), 4);
  uint64_t stop = 4;
  for (const int ranks : {4, 2, 3}) {
    changing.set_ranks(ranks);
    ASSERT_NO_FATAL_FAILURE(RunAndStop(&changing, stop));
    stop = changing.saved_step() + 4;
  }
  changing.set_ranks(1);
  RunToEnd(&changing);
  ASSERT_EQ(changing.series().size(), 24u);
  for (const auto& [step, point] : changing.series()) {
    EXPECT_EQ(point.batch_hash(), one.series().at(step).batch_hash()) << "step " << step;
    EXPECT_NEAR(point.loss() / one.series().at(step).loss(), 1.0, 1e-3) << "step " << step;
  }
}

TEST(Shard, GoesOnBitForBitAfterKill9) {
  const RunConfig config = ShardedConfig(ParallelConfig::SHARD_FULL, 2, 20);
  Job calm(config, 2);
  RunToEnd(&calm);
  Job killed(config, 2);
  for (const uint64_t step : {7, 13}) {
    FakeAttempt attempt(killed.Next());
    ASSERT_TRUE(attempt.WaitForStep(step));
    attempt.Kill(step % 2, SIGKILL);
    attempt.Wait(30);
    killed.Collect(&attempt);
  }
  RunToEnd(&killed);
  ExpectSameBits(calm.series(), killed.series());
}

// Lion has one moment: checkpoints list one class less.
TEST(Shard, LionGoesOnBitForBitInEveryMode) {
  RunConfig config = SmallConfig(2, 12);
  config.mutable_training()->set_optimizer(TrainingConfig::OPTIMIZER_LION);
  config.mutable_training()->set_beta2(0.99);
  config.mutable_training()->set_learning_rate(3e-4);
  config.mutable_training()->set_min_learning_rate(3e-5);
  Job calm(config, 2);
  RunToEnd(&calm);
  EXPECT_LT(calm.series().at(12).loss(), calm.series().at(1).loss() - 0.2);
  Job changing(config, 2);
  changing.config().mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  {
    FakeAttempt attempt(changing.Next());
    ASSERT_TRUE(attempt.WaitForStep(7));
    attempt.Kill(0, SIGKILL);
    attempt.Wait(30);
    changing.Collect(&attempt);
  }
  changing.config().mutable_parallel()->set_shard(ParallelConfig::SHARD_OPTIMIZER);
  RunToEnd(&changing);
  ExpectSameBits(calm.series(), changing.series());
  ASSERT_FALSE(changing.records().empty());
  for (const heddle::v1::TensorInfo& tensor : changing.records().back().tensors()) {
    EXPECT_EQ(tensor.classes_size(), 2) << tensor.name();
  }
}

// Rounding depends on the element's place in the model, not on who keeps it.
TEST(Shard, Bf16MomentsGoOnBitForBitInEveryMode) {
  RunConfig config = SmallConfig(2, 20);
  config.mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  Job calm(config, 2);
  RunToEnd(&calm);
  EXPECT_LT(calm.series().at(20).loss(), calm.series().at(1).loss() - 0.2);
  Job exact(SmallConfig(2, 20), 2);
  RunToEnd(&exact);
  EXPECT_NE(calm.series().at(20).loss(), exact.series().at(20).loss());
  EXPECT_NEAR(calm.series().at(20).loss() / exact.series().at(20).loss(), 1.0, 0.01);
  Job changing(config, 2);
  uint64_t step = 6;
  for (const auto mode : {ParallelConfig::SHARD_NONE, ParallelConfig::SHARD_FULL}) {
    changing.config().mutable_parallel()->set_shard(mode);
    FakeAttempt attempt(changing.Next());
    ASSERT_TRUE(attempt.WaitForStep(step));
    attempt.Kill(step % 2, SIGKILL);
    attempt.Wait(30);
    changing.Collect(&attempt);
    step += 6;
  }
  changing.config().mutable_parallel()->set_shard(ParallelConfig::SHARD_OPTIMIZER);
  RunToEnd(&changing);
  ExpectSameBits(calm.series(), changing.series());
  ASSERT_FALSE(changing.records().empty());
  for (const heddle::v1::TensorInfo& tensor : changing.records().back().tensors()) {
    EXPECT_EQ(tensor.moment_type(), heddle::v1::ELEMENT_TYPE_BF16) << tensor.name();
  }
  EXPECT_NEAR(static_cast<double>(changing.records().back().bytes()),
              static_cast<double>(exact.records().back().bytes()) * 2 / 3,
              static_cast<double>(exact.records().back().bytes()) * 0.05);
}

TEST(Shard, Fp32MomentsAreNotRoundedByAResume) {
  Job job(SmallConfig(1, 6), 1);
  RunToEnd(&job);
  job.config().mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  job.config().mutable_training()->set_max_steps(9);
  FakeAttempt attempt(job.Next());
  const auto ends = attempt.Wait();
  ExpectAll(&attempt, ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(ends[0].words.has_value());
  EXPECT_NE(ends[0].words->detail().find("training.moments: bf16, but the checkpoint"),
            std::string::npos)
      << ends[0].words->detail();
}

// Ranks evaluate different numbers of sequences and still gather together.
TEST(Shard, EvaluationChangesNoStep) {
  RunConfig config = ShardedConfig(ParallelConfig::SHARD_FULL, 3, 8);
  config.mutable_training()->set_global_batch_size(12);
  Job plain(config, 3);
  RunToEnd(&plain);
  config.mutable_data()->set_eval_path(DataFolder() + "/eval");
  config.mutable_training()->set_eval_interval(3);
  Job evaluating(config, 3);
  RunToEnd(&evaluating);
  ExpectSameBits(plain.series(), evaluating.series());
  EXPECT_GT(evaluating.series().at(3).eval_loss(), 0.0);
}

}  // namespace
}  // namespace heddle::trainer
