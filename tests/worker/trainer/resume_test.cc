// What a run's numbers depend on: not on kills, evaluation or where it is continued.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <iostream>

#include "base/rng/rng.h"
#include "base/status/status.h"
#include "tests/worker/trainer/job.h"

namespace heddle::trainer {
namespace {

TEST(Resume, EvaluationChangesNoStep) {
  Job plain(SmallConfig(1, 8), 1);
  RunToEnd(&plain);
  Job evaluating(SmallConfig(1, 8), 1);
  evaluating.config().mutable_data()->set_eval_path(DataFolder() + "/eval");
  evaluating.config().mutable_training()->set_eval_interval(3);
  RunToEnd(&evaluating);
  ExpectSameBits(plain.series(), evaluating.series());
}

TEST(Resume, ReadingAheadChangesNoStep) {
  Job ahead(SmallConfig(2, 6), 2);
  RunToEnd(&ahead);
  Job direct(SmallConfig(2, 6), 2);
  direct.config().mutable_data()->set_num_workers(0);
  RunToEnd(&direct);
  ExpectSameBits(ahead.series(), direct.series());
}

constexpr uint64_t kSteps = 40;
constexpr uint64_t kKillsPerJob = 3;

// Kills one rank some steps after the newest checkpoint; all others must leave by themselves.
// Returns the steps to be redone.
uint64_t RunAndKill(Job* job, const Rng& rng, uint64_t draw) {
  const uint64_t ranks = job->config().parallel().ranks().max();
  FakeAttempt attempt(job->Next());
  attempt.WaitForStep(job->saved_step() + 2 + rng.At(2 * draw) % 7);
  attempt.Kill(static_cast<uint32_t>(rng.At(2 * draw + 1) % ranks), SIGKILL);
  const std::vector<FakeRankEnd> ends = attempt.Wait(30);
  int by_signal = 0;
  for (size_t rank = 0; rank < ends.size(); ++rank) {
    by_signal += ends[rank].signal == SIGKILL ? 1 : 0;
    EXPECT_TRUE(ends[rank].signal == SIGKILL ||
                ends[rank].code == static_cast<int>(ExitCode::kPeerFailed))
        << "code " << ends[rank].code << ", signal " << ends[rank].signal << "\n"
        << attempt.Log(static_cast<uint32_t>(rank));
  }
  EXPECT_EQ(by_signal, 1) << "a rank hung after its peer's death";
  job->Collect(&attempt);
  return job->series().rbegin()->first - job->saved_step();
}

// T7 in small: kill -9 at random steps, resume, compare every bit with an undisturbed run.
// HEDDLE_TEST_KILLS=50 makes the long form.
void KillAndResume(int ranks) {
  uint64_t kills = kKillsPerJob;
  if (const char* text = getenv("HEDDLE_TEST_KILLS"); text != nullptr) {
    std::from_chars(text, text + std::strlen(text), kills);
  }
  const uint64_t seed = static_cast<uint64_t>(getpid());
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  const Rng rng(seed, "kills");
  Job calm(SmallConfig(ranks, kSteps), ranks);
  RunToEnd(&calm);
  uint64_t redone = 0;
  uint64_t exact = 0;
  for (uint64_t done = 0; done < kills;) {
    Job killed(SmallConfig(ranks, kSteps), ranks);
    const uint64_t end = std::min(kills, done + kKillsPerJob);
    const uint64_t here = end - done;
    for (; done < end; ++done) {
      redone += RunAndKill(&killed, rng, done);
    }
    RunToEnd(&killed);
    ExpectSameBits(calm.series(), killed.series());
    EXPECT_EQ(killed.saved_step(), kSteps);
    exact += testing::Test::HasFailure() ? 0 : here;
  }
  std::cout << "{\"ranks\":" << ranks << ",\"kills\":" << kills << ",\"bit_exact\":[" << exact
            << "," << kills << "],\"steps_redone\":" << redone << ",\"seed\":" << seed << "}\n";
}

TEST(Resume, OneRankGoesOnBitForBitAfterKill9) { KillAndResume(1); }
TEST(Resume, TwoRanksGoOnBitForBitAfterKill9) { KillAndResume(2); }

TEST(Resume, Bf16GoesOnBitForBit) {
  Job calm(SmallConfig(1, 14), 1);
  calm.config().mutable_training()->set_precision(heddle::v1::TrainingConfig::PRECISION_BF16);
  RunToEnd(&calm);
  Job killed(calm.config(), 1);
  {
    FakeAttempt attempt(killed.Next());
    ASSERT_TRUE(attempt.WaitForStep(8));
    attempt.Kill(0, SIGKILL);
    attempt.Wait();
    killed.Collect(&attempt);
  }
  RunToEnd(&killed);
  ExpectSameBits(calm.series(), killed.series());
}

// Work that threads take as they come is summed in one order all the same.
TEST(Resume, SeveralThreadsGoOnBitForBit) {
  heddle::v1::RunConfig config = SmallConfig(1, 14);
  config.mutable_training()->set_precision(heddle::v1::TrainingConfig::PRECISION_BF16);
  config.mutable_training()->set_moments(heddle::v1::TrainingConfig::MOMENTS_BF16);
  config.mutable_training()->set_micro_batch_size(8);
  config.mutable_training()->set_max_seq_len(256);
  Job calm(config, 1);
  Job again(config, 1);
  Job killed(config, 1);
  for (Job* job : {&calm, &again, &killed}) job->set_threads(2);
  RunToEnd(&calm);
  RunToEnd(&again);
  ExpectSameBits(calm.series(), again.series());
  {
    FakeAttempt attempt(killed.Next());
    ASSERT_TRUE(attempt.WaitForStep(8));
    attempt.Kill(0, SIGKILL);
    attempt.Wait();
    killed.Collect(&attempt);
  }
  RunToEnd(&killed);
  ExpectSameBits(calm.series(), killed.series());
}

TEST(Resume, OtherWorldSizesReadTheSameDataAndReachTheSameLoss) {
  Job one(SmallConfig(1, 20), 1);
  RunToEnd(&one);
  Job changing(SmallConfig(2, 20), 2);
  changing.config().mutable_checkpoint()->set_save_interval(100);
  {
    FakeAttempt attempt(changing.Next());
    ASSERT_TRUE(attempt.WaitForStep(6));
    attempt.Stop(heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT);
    attempt.Wait();
    changing.Collect(&attempt);
  }
  ASSERT_LT(changing.saved_step(), 20u);
  changing.set_ranks(3);
  RunToEnd(&changing);
  ASSERT_EQ(changing.series().size(), 20u);
  for (const auto& [step, point] : changing.series()) {
    EXPECT_EQ(point.batch_hash(), one.series().at(step).batch_hash()) << "step " << step;
    EXPECT_NEAR(point.loss() / one.series().at(step).loss(), 1.0, 1e-3) << "step " << step;
  }
}

}  // namespace
}  // namespace heddle::trainer
