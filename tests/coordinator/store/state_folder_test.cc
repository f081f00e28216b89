// Ownership, room and the commit mark.
#include "coordinator/store/state_folder.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "coordinator/store/commit_mark.h"
#include "tests/coordinator/store/store_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::store::test {
namespace {

TEST(StateLock, RefusesASecondOwnerAndNamesTheFirst) {
  TempDir dir;
  const std::string state = dir.path() + "/deep/state";
  {
    auto first = StateLock::Acquire(state);
    ASSERT_OK(first);
    EXPECT_STATUS(StateLock::Acquire(state), StatusCode::kFailedPrecondition,
                  Str("pid ", getpid()));
  }
  EXPECT_OK(StateLock::Acquire(state)) << "the lock ends with its owner";
}

TEST(StateLock, ReportsAFileInThePlaceOfTheFolder) {
  TempDir dir;
  std::ofstream(dir.path() + "/file") << "x";
  EXPECT_FALSE(StateLock::Acquire(dir.path() + "/file").ok());
  EXPECT_FALSE(StateLock::Acquire(dir.path() + "/file/below").ok());
}

TEST(DiskLimits, ReadOnlyIsTheLargerOfBytesAndFraction) {
  const DiskLimits limits;
  const uint64_t gib = 1ULL << 30;
  EXPECT_TRUE(IsReadOnly({.free_bytes = gib, .total_bytes = 10 * gib}, limits));
  EXPECT_FALSE(IsReadOnly({.free_bytes = 3 * gib, .total_bytes = 10 * gib}, limits));
  EXPECT_TRUE(IsReadOnly({.free_bytes = 3 * gib, .total_bytes = 100 * gib}, limits));
  EXPECT_FALSE(IsReadOnly({.free_bytes = 6 * gib, .total_bytes = 100 * gib}, limits));
}

TEST(Ballast, IsRealBlocksAndIsGivenBack) {
  TempDir dir;
  DiskLimits limits;
  limits.ballast_bytes = 8 << 20;
  ASSERT_OK(RestoreBallast(dir.path(), limits));
  const std::string path = dir.path() + "/ballast";
  EXPECT_EQ(std::filesystem::file_size(path), limits.ballast_bytes);
  ASSERT_OK(DropBallast(dir.path()));
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_OK(DropBallast(dir.path()));
}

TEST(CommitMark, KeepsTheNewestAndSurvivesATornSlot) {
  TempDir dir;
  const std::string path = dir.path() + "/mark";
  {
    auto mark = CommitMark::Open(path);
    ASSERT_OK(mark);
    EXPECT_EQ(mark->seq(), 0u);
    for (uint64_t seq = 1; seq <= 7; ++seq) {
      ASSERT_OK(mark->Write(seq));
    }
  }
  EXPECT_EQ(CommitMark::Open(path)->seq(), 7u);
  // 7 writes starting in slot 0 end in slot 0: tear it, and the one before must hold.
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4);
    file.put('\x7f');
  }
  EXPECT_EQ(CommitMark::Open(path)->seq(), 6u);
}

}  // namespace
}  // namespace heddle::store::test
