// How a rank behaves when something goes wrong or is asked of it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>

#include "base/status/status.h"
#include "tests/worker/trainer/job.h"

namespace heddle::trainer {
namespace {

using heddle::v1::CheckpointRecord;

TEST(Trainer, TrainsEvaluatesSavesAndEnds) {
  Job job(SmallConfig(1, 12), 1);
  job.config().mutable_data()->set_eval_path(DataFolder() + "/eval");
  job.config().mutable_training()->set_eval_interval(6);
  RunToEnd(&job);
  ASSERT_EQ(job.series().size(), 12u);
  EXPECT_LT(job.series().at(12).loss(), job.series().at(1).loss());
  EXPECT_FALSE(job.series().at(5).has_eval_loss());
  EXPECT_GT(job.series().at(6).eval_loss(), 0);
  EXPECT_GT(job.series().at(12).tokens(), 12u * 8 * 30);
  ASSERT_FALSE(job.records().empty());
  const CheckpointRecord& last = job.records().back();
  EXPECT_EQ(last.step(), 12u);
  EXPECT_EQ(last.train_state().data_position(), 12u * 8);
  EXPECT_EQ(last.train_state().updates(), 12u);
  for (const CheckpointRecord& record : job.records()) {
    ExpectGood(record, job.root());
  }
}

TEST(Trainer, StopSavesAtOneStepOnAllRanks) {
  Job job(SmallConfig(2, 100000), 2);
  job.config().mutable_checkpoint()->set_save_interval(100000);
  {
    FakeAttempt attempt(job.Next());
    ASSERT_TRUE(attempt.WaitForStep(7));
    attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
    ExpectAll(&attempt, attempt.Wait(), ExitCode::kStopped);
    job.Collect(&attempt);
    ASSERT_EQ(job.records().size(), 1u);
    EXPECT_EQ(job.saved_step(), job.series().rbegin()->first);
  }
  FakeAttempt attempt(job.Next());
  ASSERT_TRUE(attempt.WaitForStep(job.saved_step() + 2));
  EXPECT_EQ(attempt.start_step(), job.saved_step());
  attempt.Stop(heddle::v1::STOP_MODE_EXIT);
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kStopped);
  EXPECT_TRUE(attempt.committed().empty());
}

TEST(Trainer, DamageSendsAllRanksToTheSameOlderCheckpoint) {
  Job job(SmallConfig(2, 12), 2);
  RunToEnd(&job);
  ASSERT_GE(job.records().size(), 2u);
  const uint64_t older = job.records()[job.records().size() - 2].step();
  const CheckpointRecord newest = job.records().back();
  const std::string path = Str(job.root(), "/", newest.dir(), "/rank-1-0.sst");
  const int fd = open(path.c_str(), O_RDWR);
  ASSERT_EQ(pwrite(fd, "damage", 6, 3000), 6);
  close(fd);
  job.config().mutable_training()->set_max_steps(16);
  FakeAttempt attempt(job.Next());
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kDone);
  EXPECT_EQ(attempt.start_step(), older);
  const auto damages = attempt.damages();
  ASSERT_FALSE(damages.empty());
  EXPECT_EQ(damages[0].checkpoint_step(), newest.step());
  EXPECT_NE(damages[0].detail().find("rank-1-0.sst"), std::string::npos) << damages[0].detail();
}

TEST(Trainer, NeverStartsAnewWhereCheckpointsExistButNoneLoads) {
  Job job(SmallConfig(1, 6), 1);
  RunToEnd(&job);
  for (const CheckpointRecord& record : job.records()) {
    std::filesystem::remove_all(Str(job.root(), "/", record.dir()));
  }
  job.config().mutable_training()->set_max_steps(9);
  FakeAttempt attempt(job.Next());
  const auto ends = attempt.Wait();
  ExpectAll(&attempt, ends, ExitCode::kStorage);
  ASSERT_TRUE(ends[0].words.has_value());
  EXPECT_EQ(ends[0].words->category(), "STORAGE");
}

// Copies the data and lets `damage` change its first shard.
std::string DamagedData(const std::string& folder,
                        const std::function<void(const std::string& shard)>& damage) {
  std::filesystem::copy(DataFolder(), folder, std::filesystem::copy_options::recursive);
  damage(folder + "/shard-00000.tok");
  return folder;
}

void ExpectBadData(const std::string& data, int64_t prefetchers) {
  Job job(SmallConfig(1, 50), 1);
  job.config().mutable_data()->set_path(data);
  job.config().mutable_data()->set_num_workers(prefetchers);
  FakeAttempt attempt(job.Next());
  const auto ends = attempt.Wait();
  ExpectAll(&attempt, ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(ends[0].words.has_value());
  EXPECT_EQ(ends[0].words->category(), "USER_DATA") << ends[0].words->detail();
  EXPECT_NE(ends[0].words->detail().find("shard-00000.tok"), std::string::npos);
}

TEST(Trainer, DamagedDataAreTheJobsFaultNotTheNodes) {
  const checkpoint::TempDir folder;
  ExpectBadData(DamagedData(folder.path() + "/short",
                            [](const std::string& shard) {
                              std::filesystem::resize_file(shard,
                                                           std::filesystem::file_size(shard) - 100);
                            }),
                0);
  const std::string flipped = DamagedData(folder.path() + "/flipped", [](const std::string& shard) {
    const int fd = open(shard.c_str(), O_RDWR);
    ASSERT_EQ(pwrite(fd, "damage", 6, 4096 + 64), 6);
    close(fd);
  });
  ExpectBadData(flipped, 0);
  ExpectBadData(flipped, 1);
}

TEST(Trainer, DataCutShortUnderARunningRankAreDamageNotACrash) {
  for (const int64_t prefetchers : {0, 1}) {
    const checkpoint::TempDir folder;
    const std::string data = DamagedData(folder.path() + "/data", [](const std::string&) {});
    Job job(SmallConfig(1, 1'000'000), 1);
    job.config().mutable_data()->set_path(data);
    job.config().mutable_data()->set_num_workers(prefetchers);
    FakeAttempt attempt(job.Next());
    ASSERT_TRUE(attempt.WaitForStep(2));
    std::filesystem::resize_file(data + "/shard-00000.tok", 4096 + 64);
    const auto ends = attempt.Wait();
    ExpectAll(&attempt, ends, ExitCode::kDoNotRetry);
    ASSERT_TRUE(ends[0].words.has_value());
    EXPECT_EQ(ends[0].words->category(), "USER_DATA") << ends[0].words->detail();
    EXPECT_NE(ends[0].words->detail().find("shard-00000.tok: shard 0 was cut short while in use: "
                                           "4160 bytes instead of "),
              std::string::npos)
        << ends[0].words->detail();
  }
}

TEST(Trainer, OtherDataAreRefusedUnlessAllowed) {
  Job job(SmallConfig(1, 6), 1);
  RunToEnd(&job);
  job.config().mutable_training()->set_seed(12);
  job.config().mutable_training()->set_max_steps(9);
  {
    FakeAttempt attempt(job.Next());
    ExpectAll(&attempt, attempt.Wait(), ExitCode::kDoNotRetry);
  }
  job.config().mutable_data()->set_allow_changed(true);
  RunToEnd(&job);
}

TEST(Trainer, AnotherTokenizerIsRefusedEvenWithAllowedOtherData) {
  Job job(SmallConfig(1, 6), 1);
  RunToEnd(&job);
  for (CheckpointRecord& record : job.records()) {
    record.mutable_train_state()->set_tokenizer_sha256(std::string(64, 'a'));
  }
  job.config().mutable_data()->set_allow_changed(true);
  job.config().mutable_training()->set_max_steps(9);
  FakeAttempt attempt(job.Next());
  const auto ends = attempt.Wait();
  ExpectAll(&attempt, ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(ends[0].words.has_value());
  EXPECT_NE(ends[0].words->detail().find("another tokenizer"), std::string::npos)
      << ends[0].words->detail();
}

TEST(Trainer, AFencedSaveEndsEveryRank) {
  Job job(SmallConfig(2, 100000), 2);
  FakeAttemptOptions options = job.Next();
  options.verdict = [](uint64_t) { return heddle::v1::CHECKPOINT_VERDICT_FENCED; };
  FakeAttempt attempt(options);
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kFenced);
  EXPECT_TRUE(attempt.committed().empty());
}

TEST(Trainer, ARefusedSaveIsDeferredAndTrainingGoesOn) {
  Job job(SmallConfig(2, 100000), 2);
  FakeAttemptOptions options = job.Next();
  options.verdict = [](uint64_t step) {
    return step < 20 ? heddle::v1::CHECKPOINT_VERDICT_REFUSED : heddle::v1::CHECKPOINT_VERDICT_OK;
  };
  FakeAttempt attempt(options);
  ASSERT_TRUE(attempt.WaitForStep(40));
  EXPECT_GE(attempt.deferred(), 2u);
  attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kStopped);
  ASSERT_FALSE(attempt.committed().empty());
  EXPECT_GE(attempt.committed()[0].step(), 20u);
}

TEST(Trainer, TrainingGoesOnWithoutCoordinatorAndSavesWhenItIsBack) {
  std::atomic<bool> back = false;
  Job job(SmallConfig(2, 100000), 2);
  FakeAttemptOptions options = job.Next();
  options.verdict = [&](uint64_t) {
    return back ? heddle::v1::CHECKPOINT_VERDICT_OK : heddle::v1::CHECKPOINT_VERDICT_UNAVAILABLE;
  };
  FakeAttempt attempt(options);
  ASSERT_TRUE(attempt.WaitForStep(40));
  EXPECT_TRUE(attempt.committed().empty());
  EXPECT_GT(attempt.deferred(), 0u);
  back = true;
  attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kStopped);
  const auto committed = attempt.committed();
  ASSERT_EQ(committed.size(), 2u);  // the one that waited, then the last
  EXPECT_EQ(committed[0].step(), 5u);
}

TEST(Trainer, WithoutAPermitNothingIsWritten) {
  Job job(SmallConfig(1, 100000), 1);
  FakeAttemptOptions options = job.Next();
  options.permit = false;
  FakeAttempt attempt(options);
  ASSERT_TRUE(attempt.WaitForStep(30));
  bool any_file = false;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(job.root())) {
    any_file |= entry.is_regular_file();
  }
  EXPECT_FALSE(any_file);
  attempt.SetPermit(true);
  attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kStopped);
  EXPECT_GE(attempt.committed().size(), 2u);
}

TEST(Trainer, NumbersThatAreNotFiniteHaltAllRanksAndAreNeverSaved) {
  using heddle::v1::ParallelConfig;
  using heddle::v1::TrainingConfig;
  for (const auto& [policy, mode] :
       {std::pair(TrainingConfig::NAN_POLICY_HALT, ParallelConfig::SHARD_NONE),
        std::pair(TrainingConfig::NAN_POLICY_SKIP, ParallelConfig::SHARD_NONE),
        std::pair(TrainingConfig::NAN_POLICY_HALT, ParallelConfig::SHARD_FULL),
        std::pair(TrainingConfig::NAN_POLICY_SKIP, ParallelConfig::SHARD_FULL)}) {
    Job job(SmallConfig(2, 200), 2);
    job.config().mutable_parallel()->set_shard(mode);
    job.config().mutable_checkpoint()->set_save_interval(1);
    job.config().mutable_training()->set_nan_policy(policy);
    // Every update multiplies the weights by about -1e4: they overflow after some steps.
    job.config().mutable_training()->set_learning_rate(100);
    job.config().mutable_training()->set_weight_decay(100);
    job.config().mutable_training()->set_warmup_steps(0);
    FakeAttempt attempt(job.Next());
    const auto ends = attempt.Wait();
    ExpectAll(&attempt, ends, ExitCode::kNumeric);
    ASSERT_TRUE(ends[1].words.has_value());
    EXPECT_EQ(ends[1].words->category(), "NUMERIC");
    // Ranks that hold a part each know the first tensor of all parts.
    EXPECT_NE(ends[1].words->detail().find("first in model.embed_tokens.weight"), std::string::npos)
        << ends[1].words->detail();
    EXPECT_EQ(ends[0].words->detail(), ends[1].words->detail());
    EXPECT_EQ(ends[1].words->detail().find("3 steps in a row") != std::string::npos,
              policy == TrainingConfig::NAN_POLICY_SKIP);
    for (const CheckpointRecord& record : attempt.committed()) {
      ExpectGood(record, job.root());
      EXPECT_EQ(record.train_state().consecutive_nonfinite(), 0u)
          << "saved at step " << record.step() << " amid steps that were not finite";
    }
    const auto points = attempt.points();
    uint64_t skipped = 0;
    for (const auto& [step, point] : points) skipped += point.skipped_nonfinite();
    EXPECT_EQ(skipped, policy == TrainingConfig::NAN_POLICY_SKIP ? 2u : 0u);
    if (skipped > 0) {
      EXPECT_TRUE(std::isnan(points.rbegin()->second.grad_norm()));
    }
  }
}

TEST(Trainer, RefusesSettingsThatThisBuildLacksByName) {
  Job job(SmallConfig(1, 5), 1);
  job.config().mutable_model()->set_dropout(0.5);
  job.config().mutable_training()->set_precision(heddle::v1::TrainingConfig::PRECISION_FP8);
  job.config().mutable_training()->set_global_batch_size(7);
  FakeAttempt attempt(job.Next());
  const auto ends = attempt.Wait();
  ExpectAll(&attempt, ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(ends[0].words.has_value());
  for (const char* key : {"model.dropout", "training.precision", "training.global_batch_size"}) {
    EXPECT_NE(ends[0].words->detail().find(key), std::string::npos) << ends[0].words->detail();
  }
}

TEST(Trainer, NeverTrainsOnTheCpuInPlaceOfAGpu) {
  Job job(SmallConfig(1, 5), 1);
  job.config().mutable_parallel()->set_gpus_per_rank(1);
  FakeAttempt unused(job.Next());
  const auto unused_ends = unused.Wait();
  ExpectAll(&unused, unused_ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(unused_ends[0].words.has_value());
  EXPECT_NE(unused_ends[0].words->detail().find("computes the model on the CPU only"),
            std::string::npos)
      << unused_ends[0].words->detail();

  if (access(Str(getenv("HEDDLE_BIN"), "/libheddle_cuda.so").c_str(), F_OK) == 0) {
    GTEST_SKIP() << "the CUDA plug-in is built; without it NCCL is an error";
  }
  job.config().mutable_parallel()->set_backend(heddle::v1::ParallelConfig::BACKEND_NCCL);
  FakeAttempt nccl(job.Next());
  const auto ends = nccl.Wait();
  ExpectAll(&nccl, ends, ExitCode::kDoNotRetry);
  ASSERT_TRUE(ends[0].words.has_value());
  EXPECT_EQ(ends[0].words->category(), "USER_CONFIG");
  EXPECT_NE(ends[0].words->detail().find("no CUDA plug-in"), std::string::npos)
      << ends[0].words->detail();
}

TEST(Trainer, LeavesWhenTheShimIsGone) {
  Job job(SmallConfig(1, 1000000), 1);
  FakeAttempt attempt(job.Next());
  ASSERT_TRUE(attempt.WaitForStep(3));
  const auto begin = std::chrono::steady_clock::now();
  attempt.DropLinks();
  const auto ends = attempt.Wait(10);
  EXPECT_NE(ends[0].code, 0);
  EXPECT_EQ(ends[0].signal, 0);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(3));
}

TEST(Trainer, AFullDiskDefersSavesAndTrainingGoesOn) {
  Job job(SmallConfig(1, 100000), 1);
  if (mount("tmpfs", job.root().c_str(), "tmpfs", 0, "size=400k") != 0) {
    GTEST_SKIP() << "needs the right to mount a small tmpfs";
  }
  {
    FakeAttempt attempt(job.Next());
    EXPECT_TRUE(attempt.WaitForStep(30));
    EXPECT_GT(attempt.deferred(), 0u);
    EXPECT_TRUE(attempt.committed().empty());
    EXPECT_EQ(mount("tmpfs", job.root().c_str(), "tmpfs", MS_REMOUNT, "size=64m"), 0);
    attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
    ExpectAll(&attempt, attempt.Wait(), ExitCode::kStopped);
    EXPECT_FALSE(attempt.committed().empty());
  }
  umount2(job.root().c_str(), MNT_DETACH);
}

}  // namespace
}  // namespace heddle::trainer
