// What counts as a spike, what does not, and that a detector goes on exactly from what it saved.
#include "worker/trainer/spike_detector.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng/rng.h"
#include "coordinator/state/rollback.h"
#include "worker/trainer/numeric_policy.h"

namespace heddle::trainer {
namespace {

using Then = StepVerdict::Then;

// Normal with mean 0 and deviation 1, a function of its number.
double Normal(uint64_t at) {
  static const Rng rng(3, "test.spikes");
  double sum = -6;
  for (uint64_t i = 0; i < 12; ++i) {
    sum += static_cast<double>(rng.At(at * 12 + i) >> 11) * 0x1p-53;
  }
  return sum;
}

// Loss 2 +- 0.05, norms spread by a factor of about 1.35.
void AddSteps(SpikeDetector* detector, uint64_t from, uint64_t to) {
  for (uint64_t i = from; i < to; ++i) {
    detector->AddGood(2 + 0.05 * Normal(2 * i), std::exp(0.3 * Normal(2 * i + 1)));
  }
}

// The coordinator keeps checkpoints as far back as a rollback may reach. It may not know the
// trainer.
TEST(SpikeDetector, LooksBackNoFurtherThanCheckpointsAreKept) {
  EXPECT_GE(state::kRollbackReachSteps, SpikeDetector::kHighSteps);
}

TEST(SpikeDetector, FindsAJumpOfLossOrNormOnceItHasEnoughPoints) {
  SpikeDetector detector;
  AddSteps(&detector, 0, SpikeDetector::kPointsMin - 1);
  EXPECT_FALSE(detector.Judge(9, 1).found) << "too few points";
  AddSteps(&detector, 40, 41);
  EXPECT_TRUE(detector.Judge(2.5, 1).found);
  EXPECT_TRUE(detector.Judge(2, 20).found);
  EXPECT_FALSE(detector.Judge(2.1, 2).found);
  EXPECT_EQ(detector.Judge(9, 1).steps, 1);
  EXPECT_NE(detector.Judge(9, 1).what.find("loss 9 is "), std::string::npos)
      << detector.Judge(9, 1).what;
  EXPECT_NE(detector.Judge(2, 20).what.find("gradient norm 20 is "), std::string::npos);
}

TEST(SpikeDetector, AHealthyRunHasNone) {
  SpikeDetector detector;
  int found = 0;
  for (uint64_t i = 0; i < 100'000; ++i) {
    const double loss = 2 + 0.05 * Normal(2 * i);
    const double norm = std::exp(0.3 * Normal(2 * i + 1));
    found += detector.Judge(loss, norm).found ? 1 : 0;
    detector.AddGood(loss, norm);
  }
  EXPECT_EQ(found, 0);
}

TEST(SpikeDetector, ALossThatFallsOrHardlyMovesIsNone) {
  SpikeDetector detector;
  for (int i = 0; i < 100; ++i) detector.AddGood(3, 1);
  EXPECT_FALSE(detector.Judge(0.1, 1e-3).found) << "falls";
  EXPECT_FALSE(detector.Judge(3.1, 1.05).found) << "its digits move";
  EXPECT_FALSE(detector.Judge(3.5, 3).found) << "an unusual batch";
  EXPECT_TRUE(detector.Judge(3.7, 1).found);
  EXPECT_TRUE(detector.Judge(3, 11).found);
}

TEST(SpikeDetector, FindsALevelThatCameInSteps) {
  SpikeDetector detector;
  // So wide a spread that a jump of 2.5x is within six deviations.
  for (int i = 0; i < 64; ++i) detector.AddGood(i % 2 == 0 ? 1 : 2, 1);
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(detector.Judge(3.5, 1).found) << i;
    detector.AddGood(3.5, 1);
  }
  EXPECT_FALSE(detector.Judge(2.5, 1).found);
  const Spike level = detector.Judge(3.5, 1);
  EXPECT_TRUE(level.found);
  EXPECT_EQ(level.steps, 4);
}

TEST(SpikeDetector, KeepsTheLast128AndForgetsThemAfterEightSpikes) {
  SpikeDetector detector;
  AddSteps(&detector, 0, 300);
  std::vector<double> losses;
  std::vector<double> norms;
  detector.Save(&losses, &norms);
  EXPECT_EQ(losses.size(), 128u);
  EXPECT_EQ(norms.size(), 128u);
  for (int i = 0; i < 7; ++i) EXPECT_FALSE(detector.AddSpike(9)) << i;
  EXPECT_TRUE(detector.Judge(9, 1).found);
  EXPECT_TRUE(detector.AddSpike(9));
  EXPECT_FALSE(detector.Judge(9, 1).found) << "a new level";
}

TEST(SpikeDetector, GoesOnFromWhatItSaved) {
  for (const int spikes : {0, 1, 7}) {
    SpikeDetector detector;
    AddSteps(&detector, 0, 50);
    for (int i = 0; i < spikes; ++i) detector.AddSpike(9);
    std::vector<double> losses;
    std::vector<double> norms;
    detector.Save(&losses, &norms);
    SpikeDetector loaded;
    loaded.Load(losses, norms);
    EXPECT_EQ(loaded.Judge(2.4, 3).found, detector.Judge(2.4, 3).found);
    EXPECT_EQ(loaded.Judge(2.4, 3).what, detector.Judge(2.4, 3).what);
    EXPECT_EQ(loaded.AddSpike(9), detector.AddSpike(9)) << spikes;
  }
  SpikeDetector detector;
  detector.Load(std::vector<double>(3, 1.0), std::vector<double>(40, 1.0));
  EXPECT_FALSE(detector.Judge(9, 9).found) << "no Save() made this";
}

TEST(NumericPolicy, HaltEndsAtTheFirstAndLooksForNoSpike) {
  NumericPolicy policy(NanPolicy::kHalt);
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(policy.Judge(true, 2, 1).apply);
  EXPECT_TRUE(policy.Judge(true, 200, 100).apply);
  EXPECT_EQ(policy.Judge(false, 0, 0).then, Then::kHalt);
}

TEST(NumericPolicy, SkipLeavesOutTwoInARowAndEverySpike) {
  NumericPolicy policy(NanPolicy::kSkip);
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(policy.Judge(false, 0, 0).then, Then::kGoOn);
    EXPECT_EQ(policy.Judge(false, 0, 0).then, Then::kGoOn);
    EXPECT_TRUE(policy.Judge(true, 2, 1).apply);
  }
  for (int i = 0; i < 40; ++i) EXPECT_TRUE(policy.Judge(true, 2, 1).apply);
  const StepVerdict spike = policy.Judge(true, 5, 1);
  EXPECT_FALSE(spike.apply);
  EXPECT_TRUE(spike.spike);
  EXPECT_EQ(spike.then, Then::kGoOn);
  policy.Judge(false, 0, 0);
  policy.Judge(false, 0, 0);
  const StepVerdict third = policy.Judge(false, 0, 0);
  EXPECT_EQ(third.then, Then::kHalt);
  EXPECT_EQ(third.bad_steps, 3);
}

TEST(NumericPolicy, RollbackGoesBackAfterThreeInARowOrASpike) {
  NumericPolicy policy(NanPolicy::kRollback);
  EXPECT_EQ(policy.Judge(false, 0, 0).then, Then::kGoOn);
  for (int i = 0; i < 40; ++i) EXPECT_TRUE(policy.Judge(true, 2, 1).apply);
  EXPECT_EQ(policy.Judge(true, 5, 1).then, Then::kRollBack);
  policy.Judge(false, 0, 0);
  heddle::v1::TrainState saved;
  policy.Judge(false, 0, 0);
  policy.Save(&saved);
  NumericPolicy loaded(NanPolicy::kRollback);
  loaded.Load(saved);
  const StepVerdict third = loaded.Judge(false, 0, 0);
  EXPECT_EQ(third.then, Then::kRollBack);
  EXPECT_EQ(third.bad_steps, 3);
}

}  // namespace
}  // namespace heddle::trainer
