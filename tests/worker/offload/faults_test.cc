// Faults of a disk: the right error from the right call, and never wrong bytes.
#include <gtest/gtest.h>

#include <ctime>

#include "base/status/errno_of.h"
#include "tests/support/worker/temp_dir.h"
#include "tests/worker/offload/faulty_disk.h"
#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

constexpr uint32_t kSlots = 8;
constexpr int64_t kBytes = 4 * kPageBytes;

class FaultTest : public ::testing::TestWithParam<DiskMethod> {
 protected:
  // Room for two blocks. Nothing was written: all requests are counted.
  void Make(const DiskFaults& faults) {
    StatusOr<std::unique_ptr<Disk>> disk = MakeDisk(GetParam());
    if (!disk.ok()) GTEST_SKIP() << disk.status().ToString();
    const BlockTable table = WeightSlots(kSlots, kBytes);
    ASSERT_OK_AND_ASSIGN(
        std::unique_ptr<Spill> spill,
        Spill::Create(dir_.path(), table, std::make_unique<FaultyDisk>(*std::move(disk), faults)));
    ASSERT_OK_AND_ASSIGN(
        set_, ResidentSet::Create(table, {.budget_bytes = 2 * kBytes}, std::move(spill)));
  }
  void FillAll() {
    for (uint32_t slot = 0; slot < kSlots; ++slot) ASSERT_OK(Fill(*set_, slot, 1, kBytes));
  }
  // The first slot whose check fails, and its error; kSlots if none does.
  std::pair<uint32_t, Status> FirstError() {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      if (Status status = Check(*set_, slot, 1, kBytes); !status.ok()) return {slot, status};
    }
    return {kSlots, OkStatus()};
  }
  void ExpectAllCallsFailLike(const Status& status) {
    const std::vector<ExpectedUse> uses = {{{0, Kind::kWeights}, Access::kRead}};
    EXPECT_EQ(set_->Expect(uses), status);
    EXPECT_EQ(set_->Pin(0, Kind::kWeights, Access::kRead).status(), status);
    EXPECT_EQ(set_->Pin(7, Kind::kWeights, Access::kOverwrite).status(), status);
    EXPECT_EQ(set_->Discard(7, Kind::kWeights), status);
  }

  DiskDir dir_;
  std::unique_ptr<ResidentSet> set_;
};

TEST_P(FaultTest, AReadErrorComesFromThePinOfItsBlock) {
  ASSERT_NO_FATAL_FAILURE(Make({.read_error_at = 3}));
  if (!set_) return;
  FillAll();
  const auto [slot, status] = FirstError();
  EXPECT_EQ(slot, 2u);
  EXPECT_STATUS(status, StatusCode::kDataLoss,
                "read of the weights of slot 2 at file offset 32768");
  EXPECT_EQ(ErrnoOf(status), EIO);
  ExpectAllCallsFailLike(status);
}

TEST_P(FaultTest, AReadErrorOfAPrefetchWaitsForItsPin) {
  ASSERT_NO_FATAL_FAILURE(Make({.read_error_at = 2}));
  if (!set_) return;
  FillAll();
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    uses.push_back({{slot, Kind::kWeights}, Access::kRead});
  }
  ASSERT_OK(set_->Expect(uses));
  const auto [slot, status] = FirstError();
  EXPECT_EQ(slot, 1u);
  EXPECT_EQ(ErrnoOf(status), EIO);
  ExpectAllCallsFailLike(status);
}

TEST_P(FaultTest, WhatIsOverwrittenNeedNotBeReadable) {
  std::atomic<int> reads_seen = 0;
  ASSERT_NO_FATAL_FAILURE(Make({.read_error_at = 1, .reads_seen = &reads_seen}));
  if (!set_) return;
  FillAll();
  ASSERT_OK(set_->Expect(std::vector<ExpectedUse>{{{0, Kind::kWeights}, Access::kRead}}));
  EXPECT_TRUE(test::WaitUntil([&] { return reads_seen == 1; }));
  EXPECT_OK(Fill(*set_, 0, 1, kBytes));
  EXPECT_EQ(FirstError().first, kSlots);
}

TEST_P(FaultTest, AFailedWriteIsReportedByTheNextCallAndEveryLaterOne) {
  ASSERT_NO_FATAL_FAILURE(Make({.write_error_at = 2}));
  if (!set_) return;
  Status status = OkStatus();
  uint32_t slot = 0;
  for (; slot < kSlots && status.ok(); ++slot) status = Fill(*set_, slot, 1, kBytes);
  // Slot 1 is written to make room for slot 3, whose pin waits for that.
  EXPECT_EQ(slot, 4u);
  EXPECT_STATUS(status, StatusCode::kResourceExhausted,
                "write of the weights of slot 1 at file offset 16384");
  EXPECT_EQ(ErrnoOf(status), ENOSPC);
  ExpectAllCallsFailLike(status);
}

TEST_P(FaultTest, AFailedWriteBehindTheCallersBackIsReportedToo) {
  ASSERT_NO_FATAL_FAILURE(Make({.write_error_at = 1}));
  if (!set_) return;
  ASSERT_OK(Fill(*set_, 0, 1, kBytes));
  ASSERT_OK(Fill(*set_, 1, 1, kBytes));
  ASSERT_OK(set_->Pin(1, Kind::kWeights, Access::kRead));
  // Makes the owner write slot 0.
  ASSERT_OK(set_->Expect(std::vector<ExpectedUse>{{{2, Kind::kWeights}, Access::kRead}}));
  Status status = OkStatus();
  EXPECT_TRUE(test::WaitUntil([&] {
    status = set_->Discard(3, Kind::kWeights);  // never written: nothing to do
    return !status.ok();
  }));
  EXPECT_EQ(ErrnoOf(status), ENOSPC);
  EXPECT_EQ(set_->Unpin(1, Kind::kWeights), status);
  EXPECT_STATUS(set_->Unpin(1, Kind::kWeights), StatusCode::kFailedPrecondition, "not pinned");
  ExpectAllCallsFailLike(status);
}

TEST_P(FaultTest, ShortReadsAndWritesGoOnWhereTheyStopped) {
  ASSERT_NO_FATAL_FAILURE(Make({.short_read_at = 2, .short_write_at = 3, .again_at_read = 5}));
  if (!set_) return;
  FillAll();
  EXPECT_EQ(FirstError().first, kSlots);
}

TEST_P(FaultTest, AShortenedFileIsDataLoss) {
  ASSERT_NO_FATAL_FAILURE(Make({.end_at_read = 4}));
  if (!set_) return;
  FillAll();
  const auto [slot, status] = FirstError();
  EXPECT_EQ(slot, 3u);
  EXPECT_STATUS(status, StatusCode::kDataLoss, "the file ends after 100 of 16384 bytes");
  ExpectAllCallsFailLike(status);
}

TEST_P(FaultTest, AFlippedBitIsDataLossNamingBlockAndOffset) {
  ASSERT_NO_FATAL_FAILURE(Make({.flip_before_read = 6}));
  if (!set_) return;
  FillAll();
  const auto [slot, status] = FirstError();
  EXPECT_EQ(slot, 5u);
  EXPECT_STATUS(status, StatusCode::kDataLoss,
                "read of the weights of slot 5 at file offset 81920");
  EXPECT_STATUS(status, StatusCode::kDataLoss, "the disk gave back other bytes");
  EXPECT_EQ(ErrnoOf(status), 0);
  ExpectAllCallsFailLike(status);
}

TEST_P(FaultTest, ASlowDiskShowsInTheTimeThatIsWaited) {
  constexpr std::chrono::milliseconds kDelay(10);
  ASSERT_NO_FATAL_FAILURE(Make({.delay = kDelay}));
  if (!set_) return;
  FillAll();
  set_->TakeStats();
  EXPECT_EQ(FirstError().first, kSlots);
  const ResidentSetStats stats = set_->TakeStats();
  const double least = kSlots * 0.010;
  EXPECT_EQ(stats.misses, kSlots);
  EXPECT_GE(stats.exposed_seconds, least);
  EXPECT_GE(stats.read_seconds, least);
  // A caller that computes for longer than the disk needs does not wait.
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    uses.push_back({{slot, Kind::kWeights}, Access::kRead});
  }
  ASSERT_OK(set_->Expect(uses));
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    std::this_thread::sleep_for(10 * kDelay);
    EXPECT_OK(Check(*set_, slot, 1, kBytes));
  }
  const ResidentSetStats hidden = set_->TakeStats();
  // One may be late on a machine that is busy with other things.
  EXPECT_GE(hidden.hits, kSlots - 1);
  EXPECT_LE(hidden.exposed_seconds, least / 2);
}

TEST_P(FaultTest, WaitingTakesNoProcessorTime) {
  ASSERT_NO_FATAL_FAILURE(Make({.delay = std::chrono::milliseconds(50)}));
  if (!set_) return;
  FillAll();
  set_->TakeStats();
  const clock_t before = std::clock();
  EXPECT_EQ(FirstError().first, kSlots);
  const double busy = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  const double waited = set_->TakeStats().exposed_seconds;
  EXPECT_GE(waited, kSlots * 0.050);
  EXPECT_LE(busy, waited / 4);
}

INSTANTIATE_TEST_SUITE_P(Methods, FaultTest,
                         ::testing::Values(DiskMethod::kUring, DiskMethod::kThreads),
                         [](const auto& method) {
                           return method.param == DiskMethod::kUring ? "Uring" : "Threads";
                         });

}  // namespace
}  // namespace heddle::offload
