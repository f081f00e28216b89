// The order of a save's events against each other, without processes.
#include "worker/trainer/checkpointer.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "tests/checkpoint/temp_dir.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/trainer/instant_control.h"

namespace heddle::trainer {
namespace {

class CheckpointerTest : public testing::Test {
 protected:
  CheckpointerOptions OptionsOf(uint32_t rank) {
    CheckpointerOptions options;
    options.root = root_.path();
    options.attempt_dir = "j-1/f1";
    options.fence = 1;
    options.rank = rank;
    options.world_size = 2;
    heddle::v1::TensorInfo info;
    info.set_id(1);
    info.set_name("w");
    info.add_shape(static_cast<int64_t>(values_.size()));
    info.add_classes(heddle::v1::TENSOR_CLASS_MASTER);
    options.tensors = {info};
    return options;
  }

  Status Stage(Checkpointer* checkpointer, uint64_t step) {
    heddle::v1::TrainState state;
    state.set_step(step);
    return checkpointer->Stage(
        [this](checkpoint::Snapshot* snapshot) {
          const checkpoint::LocalRange all = {
              .tensor = 1, .count = values_.size(), .data = values_.data()};
          return snapshot->Stage(OptionsOf(0).tensors, {all});
        },
        state);
  }

  static bool WaitUntilIdle(const Checkpointer& checkpointer) {
    for (int i = 0; i < 5000 && checkpointer.busy(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return !checkpointer.busy();
  }

  checkpoint::TempDir root_;
  SystemClock clock_;
  InstantControl control_;
  std::vector<float> values_ = std::vector<float>(100, 1.0f);
};

TEST_F(CheckpointerTest, AnApprovalThatComesBeforeTheThreadWakesIsNotLost) {
  Checkpointer checkpointer(&control_, &clock_, OptionsOf(1));
  Agreement approved;
  approved[Slot::kSaveApproved] = 1;
  for (uint64_t step = 1; step <= 200; ++step) {
    ASSERT_OK(Stage(&checkpointer, step));
    checkpointer.Apply(approved);  // at once
    ASSERT_TRUE(WaitUntilIdle(checkpointer)) << "step " << step;
    ASSERT_EQ(checkpointer.stats().last_committed_step, step);
  }
  EXPECT_EQ(control_.seals, 200);
}

TEST_F(CheckpointerTest, NothingIsWrittenBeforeTheApproval) {
  Checkpointer checkpointer(&control_, &clock_, OptionsOf(1));
  ASSERT_OK(Stage(&checkpointer, 1));
  checkpointer.Apply(Agreement());
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  Agreement mine;
  checkpointer.Fill(&mine);
  EXPECT_TRUE(mine.Any(Slot::kSaveBusy));
  EXPECT_FALSE(mine.Any(Slot::kSaveApproved));
  EXPECT_EQ(control_.seals, 0);
}

TEST_F(CheckpointerTest, AFailureOfAnotherRankDropsTheSaveWhenEverItComes) {
  Checkpointer checkpointer(&control_, &clock_, OptionsOf(1));
  Agreement failed;
  failed[Slot::kSaveFailed] = 1;
  for (uint64_t step = 1; step <= 100; ++step) {
    ASSERT_OK(Stage(&checkpointer, step));
    if (step % 2 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    checkpointer.Apply(failed);
    ASSERT_TRUE(WaitUntilIdle(checkpointer)) << "step " << step;
  }
  EXPECT_EQ(checkpointer.stats().deferred, 100u);
  EXPECT_EQ(checkpointer.stats().committed, 0u);
  EXPECT_EQ(control_.seals, 0);
}

// The coordinator died after it committed, before it told the ranks whose seals were not the last.
TEST_F(CheckpointerTest, ACommitWhoseNewsIsLostIsAskedFor) {
  control_.seals_before_commit = 1;
  Checkpointer checkpointer(&control_, &clock_, OptionsOf(1));
  Agreement approved;
  approved[Slot::kSaveApproved] = 1;
  ASSERT_OK(Stage(&checkpointer, 1));
  checkpointer.Apply(approved);
  ASSERT_TRUE(WaitUntilIdle(checkpointer)) << "no later save would ever start";
  EXPECT_EQ(checkpointer.stats().last_committed_step, 1u);
  EXPECT_EQ(control_.seals, 2);
}

TEST_F(CheckpointerTest, ValuesThatAreNotFiniteFailTheSaveNotTheStep) {
  Checkpointer checkpointer(&control_, &clock_, OptionsOf(0));
  values_[7] = std::numeric_limits<float>::infinity();
  ASSERT_OK(Stage(&checkpointer, 1));
  Agreement mine;
  for (int i = 0; i < 5000 && !mine.Any(Slot::kSaveFailed); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    checkpointer.Fill(&mine);
  }
  EXPECT_TRUE(mine.Any(Slot::kSaveFailed));
  checkpointer.Apply(mine);
  EXPECT_TRUE(WaitUntilIdle(checkpointer));
  EXPECT_EQ(checkpointer.stats().deferred, 1u);
}

}  // namespace
}  // namespace heddle::trainer
