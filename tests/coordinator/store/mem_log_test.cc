// MemLog must lose exactly what a power cut loses, or simulations prove nothing.
#include "coordinator/store/mem_log.h"

#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace heddle::store {
namespace {

Batch One(const std::string& key, const std::string& value) {
  Batch batch;
  batch.Put(Family::kJobs, key, value);
  return batch;
}

TEST(MemLog, CrashLosesOnlyWhatWasNotCommitted) {
  MemDisk disk;
  int done = 0;
  {
    MemLog log(&disk, /*auto_commit=*/false);
    EXPECT_EQ(log.term(), 1u);
    const auto count = [&](StatusOr<CommitSeq> seq) { done += seq.ok() ? 1 : 0; };
    ASSERT_OK(log.Append(One("a", "1"), count));
    ASSERT_OK(log.Append(One("b", "2"), count));
    EXPECT_STATUS(log.Get(Family::kJobs, "a"), StatusCode::kNotFound, "");
    EXPECT_EQ(log.Commit(1), 1u);
    log.Crash();
    EXPECT_EQ(log.Commit(), 0u);
  }
  EXPECT_EQ(done, 1);
  const MemLog next(&disk, true);
  EXPECT_EQ(next.term(), 2u);
  EXPECT_OK(next.Get(Family::kJobs, "a"));
  EXPECT_STATUS(next.Get(Family::kJobs, "b"), StatusCode::kNotFound, "");
}

TEST(MemLog, PoisonFailsTheQueueAndEverythingAfter) {
  MemDisk disk;
  MemLog log(&disk, false);
  Status verdict;
  ASSERT_OK(log.Append(One("a", "1"), [&](StatusOr<CommitSeq> seq) { verdict = seq.status(); }));
  log.Poison();
  EXPECT_STATUS(verdict, StatusCode::kUnavailable, "poisoned");
  EXPECT_STATUS(log.Append(One("b", "1"), nullptr), StatusCode::kUnavailable, "poisoned");
  EXPECT_EQ(log.role(), Role::kPoisoned);
}

TEST(MemLog, DeletesRangesAndScansBackward) {
  MemDisk disk;
  MemLog log(&disk, true);
  for (const char* key : {"a/1", "a/2", "b/1", "c/1"}) {
    ASSERT_OK(log.Append(One(key, key), nullptr));
  }
  Batch batch;
  batch.DeletePrefix(Family::kJobs, "a/");
  ASSERT_OK(log.Append(std::move(batch), nullptr));
  std::string seen;
  ASSERT_OK(log.ScanBack(Family::kJobs, "", "", 9, [&](const std::string& key, const std::string&) {
    seen += key + " ";
    return true;
  }));
  EXPECT_EQ(seen, "c/1 b/1 ");
}

}  // namespace
}  // namespace heddle::store
