// Experts divided over ranks and experts in a bounded resident set, in whole runs: kills, other
// degrees, other homes (training-runtime.md 10, 12, 20.3, 20.6, 20.7).
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "tests/support/bad_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/disk_dir.h"
#include "tests/worker/trainer/job.h"

namespace heddle::trainer {
namespace {

using heddle::v1::RunConfig;

RunConfig ExpertConfig(int ranks, int degree, int64_t steps) {
  RunConfig config = SmallConfig(ranks, steps);
  heddle::v1::MoeConfig* moe = config.mutable_model()->mutable_moe();
  moe->set_n_experts(8);
  moe->set_top_k(2);
  moe->set_n_shared(1);
  moe->set_d_expert(32);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_bias_update_rate(0.01);
  config.mutable_parallel()->set_expert(degree);
  config.mutable_parallel()->set_shard(heddle::v1::ParallelConfig::SHARD_FULL);
  return config;
}

// Of about 2 MiB of experts one stays in memory.
void Offload(RunConfig* config, const std::string& spill_dir) {
  heddle::v1::ExpertOffloadingConfig* offloading =
      config->mutable_memory()->mutable_expert_offloading();
  offloading->set_enabled(true);
  offloading->set_resident_mb(1);
  offloading->set_spill_dir(spill_dir);
}

TEST(Experts, OffloadedRunsGoOnBitForBitAndAreThoseOfExpertsInMemory) {
  for (const bool fp32 : {false, true}) {
    RunConfig config = ExpertConfig(1, 1, 50);
    config.mutable_training()->set_precision(fp32 ? heddle::v1::TrainingConfig::PRECISION_FP32
                                                  : heddle::v1::TrainingConfig::PRECISION_BF16);
    Job resident(config, 1);
    RunToEnd(&resident);
    const test::DiskDir spill;
    Offload(&config, spill.path());
    Job offloaded(config, 1);
    KillAt(&offloaded, 13, 0);
    KillAt(&offloaded, 31, 0);
    EXPECT_TRUE(std::filesystem::is_empty(spill.path())) << "a kill left files behind";
    RunToEnd(&offloaded);
    ExpectSameBits(resident.series(), offloaded.series());
    EXPECT_EQ(NewestWeights(&resident), NewestWeights(&offloaded));
    const heddle::v1::OffloadUse& use = offloaded.series().at(50).offload();
    EXPECT_GT(use.evictions(), 0u) << "everything fitted";
    EXPECT_GT(use.bytes_read(), 0u);
    EXPECT_GT(use.bytes_written(), 0u);
    EXPECT_LE(use.resident_bytes(), 1u << 20);
    EXPECT_FALSE(resident.series().at(50).has_offload());
  }
}

// Checkpoints do not know where experts were.
TEST(Experts, ResidentAndOffloadedContinueEachOther) {
  RunConfig config = ExpertConfig(2, 2, 20);
  Job resident(config, 2);
  RunToEnd(&resident);
  const test::DiskDir spill;
  Job mixed(config, 2);
  KillAt(&mixed, 7, 1);
  Offload(&mixed.config(), spill.path());
  KillAt(&mixed, 13, 0);
  mixed.config().mutable_memory()->mutable_expert_offloading()->set_spill_dir("");
  RunToEnd(&mixed);
  ExpectSameBits(resident.series(), mixed.series());
  EXPECT_EQ(NewestWeights(&resident), NewestWeights(&mixed));
}

TEST(Experts, DividedExpertsGoOnBitForBitInEveryMode) {
  for (const auto mode :
       {heddle::v1::ParallelConfig::SHARD_NONE, heddle::v1::ParallelConfig::SHARD_OPTIMIZER,
        heddle::v1::ParallelConfig::SHARD_FULL}) {
    RunConfig config = ExpertConfig(2, 2, 15);
    config.mutable_parallel()->set_shard(mode);
    Job calm(config, 2);
    RunToEnd(&calm);
    Job killed(config, 2);
    KillAt(&killed, 8, 1);
    RunToEnd(&killed);
    ExpectSameBits(calm.series(), killed.series());
    EXPECT_EQ(NewestWeights(&calm), NewestWeights(&killed));
  }
}

// With a frozen model stage 1 moves no expert, wherever it lies; stage 2 goes on from the same
// bits.
TEST(Experts, FrozenWarmupsOfOffloadedExpertsAreThoseOfExpertsInMemory) {
  for (const bool fp32 : {false, true}) {
    RunConfig config = ExpertConfig(1, 1, 14);
    config.mutable_training()->set_precision(fp32 ? heddle::v1::TrainingConfig::PRECISION_FP32
                                                  : heddle::v1::TrainingConfig::PRECISION_BF16);
    heddle::v1::AttentionConfig* attention = config.mutable_model()->mutable_attention();
    attention->set_kind(heddle::v1::ATTENTION_KIND_DSA);
    attention->clear_pattern();
    attention->mutable_dsa()->set_n_indexer_heads(2);
    attention->mutable_dsa()->set_d_indexer(8);
    attention->mutable_dsa()->set_topk(8);
    attention->mutable_dsa()->set_warmup_steps(6);
    attention->mutable_dsa()->set_freeze(heddle::v1::FREEZE_TRUE);
    Job resident(config, 1);
    RunToEnd(&resident);
    const checkpoint::TempDir spill;
    Offload(&config, spill.path());
    Job offloaded(config, 1);
    KillAt(&offloaded, 4, 0);
    KillAt(&offloaded, 8, 0);
    RunToEnd(&offloaded);
    ExpectSameBits(resident.series(), offloaded.series());
    EXPECT_EQ(NewestWeights(&resident), NewestWeights(&offloaded));
    EXPECT_GT(offloaded.series().at(14).offload().bytes_read(), 0u);
  }
}

// untouched: skip. Who had a token is of the step alone: a kill, another bound and another order of
// micro-batches change nothing, and it is not what eager gives.
TEST(Experts, RunsThatLeaveUntouchedExpertsOutGoOnBitForBit) {
  RunConfig config = ExpertConfig(1, 1, 15);
  config.mutable_model()->mutable_moe()->set_n_experts(64);
  config.mutable_model()->mutable_moe()->set_top_k(1);
  config.mutable_model()->mutable_moe()->set_d_expert(16);
  config.mutable_training()->set_precision(heddle::v1::TrainingConfig::PRECISION_BF16);
  config.mutable_training()->set_micro_batch_size(1);
  config.mutable_training()->set_global_batch_size(2);
  const checkpoint::TempDir spill;
  Offload(&config, spill.path());
  Job eager(config, 1);
  RunToEnd(&eager);
  config.mutable_memory()->mutable_expert_offloading()->set_untouched(
      heddle::v1::ExpertOffloadingConfig::UNTOUCHED_SKIP);
  Job calm(config, 1);
  RunToEnd(&calm);
  Job killed(config, 1);
  KillAt(&killed, 7, 0);
  killed.config().mutable_memory()->mutable_expert_offloading()->set_resident_mb(5);
  KillAt(&killed, 12, 0);
  killed.config().mutable_training()->set_accumulation(
      heddle::v1::TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  RunToEnd(&killed);
  ExpectSameBits(calm.series(), killed.series());
  EXPECT_EQ(NewestWeights(&calm), NewestWeights(&killed));
  EXPECT_NE(NewestWeights(&calm), NewestWeights(&eager)) << "every expert had a token";
}

// A run goes on with another degree and another number of ranks: its loss is that of a run that
// never changed, its balancing biases are the same.
TEST(Experts, AnyDegreeContinuesAnyOther) {
  RunConfig config = ExpertConfig(1, 1, 24);
  Job one(config, 1);
  RunToEnd(&one);
  Job moving(config, 1);
  KillAt(&moving, 6, 0);
  const std::vector<std::pair<int, int>> places = {{4, 2}, {2, 2}, {4, 4}};
  uint64_t step = 11;
  for (const auto& [ranks, degree] : places) {
    moving.set_ranks(ranks);
    moving.config().mutable_parallel()->mutable_ranks()->set_min(ranks);
    moving.config().mutable_parallel()->mutable_ranks()->set_max(ranks);
    moving.config().mutable_parallel()->set_expert(degree);
    if (step < 20) {
      KillAt(&moving, step, 0);
    } else {
      RunToEnd(&moving);
    }
    step += 5;
  }
  for (const auto& [at, point] : one.series()) {
    const heddle::v1::MetricPoint& other = moving.series().at(at);
    EXPECT_EQ(point.batch_hash(), other.batch_hash()) << at;
    EXPECT_NEAR(point.loss(), other.loss(), 1e-3 * point.loss()) << at;
  }
  const auto expected = NewestWeights(&one);
  for (const auto& [name, values] : NewestWeights(&moving)) {
    if (name.find("e_score_correction_bias") == std::string::npos) continue;
    EXPECT_EQ(values, expected.at(name)) << name;
  }
}

// Ends a run that spills to `folder` at once and for good, with these words.
void ExpectSpillRefused(const std::string& folder, const std::string& words) {
  RunConfig config = ExpertConfig(1, 1, 5);
  Offload(&config, folder);
  Job job(config, 1);
  FakeAttempt attempt(job.Next());
  const std::vector<FakeRankEnd> ends = attempt.Wait(30);
  ExpectAll(&attempt, ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(ends.front().words.has_value());
  EXPECT_EQ(ends.front().words->category(), "USER_CONFIG");
  EXPECT_NE(ends.front().words->detail().find(words), std::string::npos)
      << ends.front().words->detail();
}

TEST(Experts, ASpillFolderThatIsNotThereEndsTheRunWithItsName) {
  ExpectSpillRefused("/no/such/folder", "/no/such/folder");
}

TEST(Experts, ASpillFolderInMemoryEndsTheRunWithItsName) {
  if (offload::CheckOnDisk("/dev/shm").ok()) GTEST_SKIP() << "/dev/shm is no file system in memory";
  ExpectSpillRefused("/dev/shm",
                     "memory.expert_offloading.spill_dir: /dev/shm lies in memory (tmpfs)");
}

// Bits that change on the disk end the attempt with the block's name; the next one goes on from
// the checkpoint with the bits of a run that nobody disturbed.
TEST(Experts, ABitFlippedInASpilledExpertIsNeverComputedWith) {
  RunConfig config = ExpertConfig(1, 1, 40);
  Job resident(config, 1);
  RunToEnd(&resident);
  const test::DiskDir spill;
  Offload(&config, spill.path());
  Job job(config, 1);
  FakeAttempt attempt(job.Next());
  ASSERT_TRUE(attempt.WaitForStep(12));
  ASSERT_GE(FlipBits(spill.path(), attempt.pid(0)), 3) << "weights, gradients, states";
  const std::vector<FakeRankEnd> ends = attempt.Wait(60);
  ASSERT_EQ(ends.size(), 1u);
  EXPECT_EQ(ends[0].code, static_cast<int>(ExitCode::kStorage));
  ASSERT_TRUE(ends[0].words.has_value());
  EXPECT_NE(ends[0].words->detail().find("of slot"), std::string::npos) << ends[0].words->detail();
  job.Collect(&attempt);
  RunToEnd(&job);
  ExpectSameBits(resident.series(), job.series());
  EXPECT_EQ(NewestWeights(&resident), NewestWeights(&job));
}

// A full disk is told before the first step.
TEST(Experts, ADiskWithoutRoomForTheSpillEndsTheRunBeforeItBegins) {
  const test::SmallDisk disk("tmpfs", "size=1m");
  if (!disk.mounted()) GTEST_SKIP() << "no right to mount a small file system here";
  RunConfig config = ExpertConfig(1, 1, 5);
  Offload(&config, disk.path());
  Job job(config, 1);
  FakeAttempt attempt(job.Next());
  const std::vector<FakeRankEnd> ends = attempt.Wait(30);
  EXPECT_EQ(ends.front().code, static_cast<int>(ExitCode::kStorage));
  ASSERT_TRUE(ends.front().words.has_value());
  EXPECT_NE(ends.front().words->detail().find(disk.path()), std::string::npos)
      << ends.front().words->detail();
  EXPECT_NE(ends.front().words->detail().find("free"), std::string::npos);
  EXPECT_EQ(ends.front().words->step(), 0u);
}

// The spill fits and a save does not: training goes on without it, and saves once there is room.
TEST(Experts, ADiskThatIsFullAtASaveDelaysTheSave) {
  test::SmallDisk disk("tmpfs", "size=2100k");
  if (!disk.mounted()) GTEST_SKIP() << "no right to mount a small file system here";
  RunConfig config = ExpertConfig(1, 1, 60);
  Job resident(config, 1);
  RunToEnd(&resident);
  Offload(&config, disk.path());
  Job job(config, 1);
  {
    FakeAttempt attempt(job.Next());
    EXPECT_TRUE(attempt.WaitForStep(12));
    disk.Resize("size=16m");
    ExpectAll(&attempt, attempt.Wait(60), ExitCode::kDone);
    job.Collect(&attempt);
  }
  ASSERT_FALSE(job.records().empty());
  EXPECT_GT(job.records().front().step(), 10u) << "two saves had no room";
  EXPECT_EQ(job.saved_step(), 60u);
  ExpectSameBits(resident.series(), job.series());
  EXPECT_EQ(NewestWeights(&resident), NewestWeights(&job));
}

}  // namespace
}  // namespace heddle::trainer
