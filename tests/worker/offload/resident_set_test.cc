#include "worker/offload/resident_set.h"

#include <gtest/gtest.h>

#include "tests/support/worker/temp_dir.h"
#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

constexpr int64_t kBytes = 2 * kPageBytes;

// Blocks of one size; the budget is given in blocks.
class ResidentSetTest : public ::testing::TestWithParam<const char*> {
 protected:
  void Make(size_t slots, int64_t resident) {
    const BlockTable table = WeightSlots(slots, kBytes);
    StatusOr<std::unique_ptr<Home>> home = MakeHomeNamed(GetParam(), dir_.path(), table);
    ASSERT_OK(home);
    ASSERT_OK_AND_ASSIGN(
        set_, ResidentSet::Create(table, {.budget_bytes = resident * kBytes}, *std::move(home)));
  }
  void FillAll(uint32_t slots) {
    for (uint32_t slot = 0; slot < slots; ++slot) ASSERT_OK(Fill(*set_, slot, 1, kBytes));
  }
  void SetUp() override {
    if (std::string_view(GetParam()) != "io_uring") return;
    if (const Status status = UringHere(); !status.ok()) GTEST_SKIP() << status.ToString();
  }
  // Gives the owner time for what it should, or should not, do by itself.
  ResidentSetStats Settle() {
    ResidentSetStats sum;
    for (int quiet = 0; quiet < 10; ++quiet) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      const ResidentSetStats stats = set_->TakeStats();
      if (stats.bytes_read + stats.bytes_written + stats.evictions > 0) quiet = 0;
      sum.bytes_read += stats.bytes_read;
      sum.bytes_written += stats.bytes_written;
      sum.evictions += stats.evictions;
    }
    return sum;
  }

  DiskDir dir_;
  std::unique_ptr<ResidentSet> set_;
};

std::vector<ExpectedUse> Reads(std::initializer_list<uint32_t> slots) {
  std::vector<ExpectedUse> uses;
  for (const uint32_t slot : slots) uses.push_back({{slot, Kind::kWeights}, Access::kRead});
  return uses;
}

TEST_P(ResidentSetTest, GivesBackWhatWasWrittenBeyondTheBudget) {
  ASSERT_NO_FATAL_FAILURE(Make(20, 3));
  FillAll(20);
  for (uint32_t slot = 0; slot < 20; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  const ResidentSetStats stats = set_->TakeStats();
  EXPECT_EQ(stats.peak_bytes, 3 * kBytes);
  EXPECT_GE(stats.evictions, 34);
  // The last ones that were filled are read from memory or from home; each is written once.
  EXPECT_EQ(stats.bytes_written, 20 * kBytes);
  EXPECT_GT(stats.write_seconds, 0);
}

TEST_P(ResidentSetTest, ReadsZeroWhereNothingWasWritten) {
  ASSERT_NO_FATAL_FAILURE(Make(4, 1));
  FillAll(3);
  ASSERT_OK_AND_ASSIGN(const std::byte* const data, set_->Pin(3, Kind::kWeights, Access::kUpdate));
  EXPECT_TRUE(Equal(data, std::vector<std::byte>(kBytes)));
  EXPECT_EQ(set_->TakeStats().bytes_read, 0);
}

TEST_P(ResidentSetTest, MovesNothingWhenAllFits) {
  ASSERT_NO_FATAL_FAILURE(Make(5, 5));
  FillAll(5);
  set_->TakeStats();
  for (int round = 0; round < 3; ++round) {
    for (uint32_t slot = 0; slot < 5; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  }
  const ResidentSetStats stats = set_->TakeStats();
  EXPECT_EQ(stats.hits, 15);
  EXPECT_EQ(stats.misses, 0);
  EXPECT_EQ(stats.bytes_read + stats.bytes_written + stats.evictions, 0);
  EXPECT_EQ(stats.exposed_seconds, 0);
  EXPECT_EQ(stats.resident_bytes, 5 * kBytes);
}

TEST_P(ResidentSetTest, FetchesWhatIsExpectedBeforeItIsPinned) {
  ASSERT_NO_FATAL_FAILURE(Make(8, 4));
  FillAll(8);
  ASSERT_OK(set_->Expect(Reads({0, 1, 2, 3})));
  int64_t bytes_read = 0;
  EXPECT_TRUE(test::WaitUntil([&] {
    bytes_read += set_->TakeStats().bytes_read;
    return bytes_read == 4 * kBytes;
  }));
  for (uint32_t slot = 0; slot < 4; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  const ResidentSetStats stats = set_->TakeStats();
  EXPECT_EQ(stats.hits, 4);
  EXPECT_EQ(stats.misses, 0);
}

TEST_P(ResidentSetTest, EvictsWhatIsNeededLast) {
  ASSERT_NO_FATAL_FAILURE(Make(4, 3));
  FillAll(4);
  // Forward 0 1 2 3, backward 3 2 1 0: of the three in memory after 2, the one that is needed last
  // is 0. The least recently used rule would lose 0, then 1, then 2, ..
  const std::initializer_list<uint32_t> order = {0, 1, 2, 3, 3, 2, 1, 0};
  for (int pass = 0; pass < 3; ++pass) {
    set_->TakeStats();
    ASSERT_OK(set_->Expect(Reads(order)));
    for (const uint32_t slot : order) EXPECT_OK(Check(*set_, slot, 1, kBytes));
    // Two for eight uses: 3 on the way there, 0 on the way back. In the first pass also what
    // filling left away.
    if (pass > 0) {
      EXPECT_EQ(set_->TakeStats().bytes_read, 2 * kBytes);
    }
  }
}

TEST_P(ResidentSetTest, EvictsTheLeastRecentlyUsedOfWhatNobodyExpects) {
  ASSERT_NO_FATAL_FAILURE(Make(4, 3));
  FillAll(4);
  for (const uint32_t slot : {0, 1, 2, 0}) ASSERT_OK(Check(*set_, slot, 1, kBytes));
  ASSERT_OK(Check(*set_, 3, 1, kBytes));  // in place of 1
  set_->TakeStats();
  for (const uint32_t slot : {0, 2, 3}) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  EXPECT_EQ(set_->TakeStats().misses, 0);
  EXPECT_OK(Check(*set_, 1, 1, kBytes));
  EXPECT_EQ(set_->TakeStats().misses, 1);
}

TEST_P(ResidentSetTest, DropsCleanBlocksWithoutAWrite) {
  ASSERT_NO_FATAL_FAILURE(Make(6, 2));
  FillAll(6);
  for (uint32_t slot = 0; slot < 6; ++slot) ASSERT_OK(Check(*set_, slot, 1, kBytes));
  set_->TakeStats();
  for (uint32_t slot = 0; slot < 6; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  const ResidentSetStats stats = set_->TakeStats();
  EXPECT_EQ(stats.bytes_written, 0);
  EXPECT_EQ(stats.bytes_read, 6 * kBytes);
  EXPECT_EQ(stats.misses, 6);
  EXPECT_GT(stats.read_seconds, 0);
  EXPECT_GT(stats.exposed_seconds, 0);
}

TEST_P(ResidentSetTest, DoesNotReadWhatIsOverwritten) {
  ASSERT_NO_FATAL_FAILURE(Make(6, 2));
  FillAll(6);
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < 6; ++slot) {
    uses.push_back({{slot, Kind::kWeights}, Access::kOverwrite});
  }
  set_->TakeStats();
  ASSERT_OK(set_->Expect(uses));
  for (uint32_t slot = 0; slot < 6; ++slot) EXPECT_OK(Fill(*set_, slot, 2, kBytes));
  EXPECT_EQ(Settle().bytes_read, 0);
  for (uint32_t slot = 0; slot < 6; ++slot) EXPECT_OK(Check(*set_, slot, 2, kBytes));
}

// Memory that was set aside for an overwrite must not pass for the contents.
TEST_P(ResidentSetTest, ReadsWhatWasToBeOverwrittenButIsNot) {
  ASSERT_NO_FATAL_FAILURE(Make(4, 2));
  FillAll(4);
  ASSERT_OK(set_->Expect(std::vector<ExpectedUse>{{{0, Kind::kWeights}, Access::kOverwrite},
                                                  {{1, Kind::kWeights}, Access::kOverwrite}}));
  Settle();
  for (uint32_t slot = 0; slot < 4; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
}

TEST_P(ResidentSetTest, KeepsPinnedBlocksInPlace) {
  ASSERT_NO_FATAL_FAILURE(Make(10, 3));
  FillAll(10);
  ASSERT_OK_AND_ASSIGN(std::byte* const pinned, set_->Pin(4, Kind::kWeights, Access::kUpdate));
  ASSERT_OK_AND_ASSIGN(const std::byte* const again, set_->Pin(4, Kind::kWeights, Access::kRead));
  EXPECT_EQ(pinned, again);
  std::ranges::copy(Contents(4, 2, kBytes), pinned);
  ASSERT_OK(set_->Unpin(4, Kind::kWeights));
  for (uint32_t slot = 5; slot < 10; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  EXPECT_TRUE(Equal(pinned, Contents(4, 2, kBytes)));
  ASSERT_OK(set_->Unpin(4, Kind::kWeights));
  for (uint32_t slot = 5; slot < 10; ++slot) EXPECT_OK(Check(*set_, slot, 1, kBytes));
  EXPECT_OK(Check(*set_, 4, 2, kBytes));
  EXPECT_STATUS(set_->Unpin(4, Kind::kWeights), StatusCode::kFailedPrecondition,
                "weights of slot 4 is not pinned");
}

TEST_P(ResidentSetTest, RefusesToPinMoreThanTheBudgetAndGoesOn) {
  ASSERT_NO_FATAL_FAILURE(Make(4, 2));
  FillAll(4);
  ASSERT_OK(set_->Pin(0, Kind::kWeights, Access::kRead));
  ASSERT_OK(set_->Pin(1, Kind::kWeights, Access::kRead));
  EXPECT_STATUS(set_->Pin(2, Kind::kWeights, Access::kRead), StatusCode::kResourceExhausted,
                "(8192 bytes) beside 16384 pinned bytes exceeds the 16384 bytes");
  ASSERT_OK(set_->Unpin(0, Kind::kWeights));
  EXPECT_OK(Check(*set_, 2, 1, kBytes));
}

TEST_P(ResidentSetTest, DiscardedContentsAreNeverWrittenAndReadAsZero) {
  ASSERT_NO_FATAL_FAILURE(Make(4, 2));
  FillAll(4);
  for (const uint32_t slot : {2, 3}) {
    ASSERT_OK(Fill(*set_, slot, 2, kBytes));
    ASSERT_OK(set_->Discard(slot, Kind::kWeights));
  }
  ASSERT_OK(set_->Discard(0, Kind::kWeights));  // only at home
  set_->TakeStats();
  for (const uint32_t slot : {0, 2, 3}) {
    ASSERT_OK_AND_ASSIGN(const std::byte* const data,
                         set_->Pin(slot, Kind::kWeights, Access::kRead));
    EXPECT_TRUE(Equal(data, std::vector<std::byte>(kBytes)));
    EXPECT_STATUS(set_->Discard(slot, Kind::kWeights), StatusCode::kFailedPrecondition, "pinned");
    ASSERT_OK(set_->Unpin(slot, Kind::kWeights));
  }
  EXPECT_EQ(Settle().bytes_written, 0);
  EXPECT_OK(Check(*set_, 1, 1, kBytes));
}

TEST_P(ResidentSetTest, RefusesBlocksThatDoNotExist) {
  ASSERT_NO_FATAL_FAILURE(Make(2, 2));
  EXPECT_STATUS(set_->Pin(2, Kind::kWeights, Access::kRead), StatusCode::kInvalidArgument,
                "weights of slot 2: there are 2 slots");
  EXPECT_STATUS(set_->Pin(0, Kind::kState, Access::kRead), StatusCode::kInvalidArgument,
                "state of slot 0 has no bytes");
  EXPECT_STATUS(set_->Expect(Reads({0, 7})), StatusCode::kInvalidArgument, "slot 7");
}

INSTANTIATE_TEST_SUITE_P(Homes, ResidentSetTest, ::testing::Values("io_uring", "threads", "arena"),
                         [](const auto& home) { return std::string(home.param); });

TEST(ResidentSet, RefusesABudgetBelowWhatIsPinnedTogether) {
  const std::vector<SlotBytes> slots = {{5000, 0, 3 << 20}, {5000, 0, 0}};
  const BlockTable table = *BlockTable::Make(slots);
  const auto create = [&table](const ResidentSetOptions& options) {
    return ResidentSet::Create(table, options, *MakeHome("", table, DiskMethod::kAuto)).status();
  };
  EXPECT_STATUS(create({.budget_bytes = 1 << 20}), StatusCode::kInvalidArgument,
                "the budget of 1048576 bytes is below the 3145728 bytes that are in use together: "
                "set it to at least 3");
  EXPECT_STATUS(create({.budget_bytes = 4 << 20, .min_pinned_bytes = (4 << 20) + 1}),
                StatusCode::kInvalidArgument, "set it to at least 5");
  EXPECT_OK(create({.budget_bytes = 3 << 20}));
}

TEST(BlockTable, RefusesNegativeSizesAndSetsWithoutBlocks) {
  EXPECT_STATUS(BlockTable::Make(std::vector<SlotBytes>{{1, 2, 3}, {1, -2, 3}}),
                StatusCode::kInvalidArgument, "slot 1 has a block of -2 bytes");
  EXPECT_STATUS(BlockTable::Make({}), StatusCode::kInvalidArgument, "no blocks");
}

TEST(ResidentSet, DescribesBudgetAndHome) {
  const BlockTable table = WeightSlots(3, 1 << 20);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ResidentSet> set,
                       ResidentSet::Create(table, {.budget_bytes = 2 << 20},
                                           *MakeHome("", table, DiskMethod::kAuto)));
  EXPECT_EQ(set->Describe(), "experts: at most 2MiB in memory, host arena of 3MiB");
}

}  // namespace
}  // namespace heddle::offload
