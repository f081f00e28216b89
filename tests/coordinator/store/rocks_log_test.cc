// RocksLog through its interface: order, grouping, ranges, terms, damage at open.
#include "coordinator/store/rocks_log.h"

#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <thread>
#include <vector>

#include "tests/coordinator/store/store_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::store::test {
namespace {

TEST(RocksLog, AcknowledgesInOrderAndGroupsConcurrentAppends) {
  TempDir dir;
  auto log = OpenLog(dir.path());
  ASSERT_OK(log);
  constexpr int kAppends = 2000;
  std::vector<int> order;  // touched by the commit thread only, read after Flush
  std::vector<CommitSeq> seqs;
  for (int i = 0; i < kAppends; ++i) {
    Batch batch;
    batch.Put(Family::kJobs, Str("job-", i), "record");
    batch.Put(Family::kEvents, Str("event-", i), "event");
    ASSERT_OK((*log)->Append(std::move(batch), [&, i](StatusOr<CommitSeq> seq) {
      ASSERT_OK(seq);
      order.push_back(i);
      seqs.push_back(*seq);
    }));
  }
  (*log)->Flush();
  ASSERT_EQ(order.size(), size_t{kAppends});
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  EXPECT_TRUE(std::is_sorted(seqs.begin(), seqs.end()));
  const LogStats stats = (*log)->Stats();
  EXPECT_EQ(stats.batches, uint64_t{kAppends});
  // 2,000 appends that arrive faster than the disk syncs must share syncs.
  EXPECT_LT(stats.commits, uint64_t{kAppends} / 4);
  EXPECT_GE(stats.commits, uint64_t{kAppends} / 128);
  EXPECT_GT(stats.commit_p99_ms, 0);
  EXPECT_EQ(CountRecords(**log, Family::kJobs), size_t{kAppends});
}

TEST(RocksLog, DeliversGroupsThroughTheGivenExecutor) {
  TempDir dir;
  std::mutex mutex;
  std::vector<std::function<void()>> delivered;
  RocksLogOptions options;
  options.dir = dir.path();
  options.deliver = [&](std::function<void()> run) {
    const std::lock_guard lock(mutex);
    delivered.push_back(std::move(run));
  };
  auto log = RocksLog::Open(std::move(options));
  ASSERT_OK(log);
  int done = 0;
  Batch batch;
  batch.Put(Family::kJobs, "a", "1");
  ASSERT_OK((*log)->Append(std::move(batch), [&](StatusOr<CommitSeq>) { ++done; }));
  (*log)->Flush();
  EXPECT_EQ(done, 0);
  EXPECT_EQ(*(*log)->Get(Family::kJobs, "a"), "1");
  ASSERT_EQ(delivered.size(), 1u);
  delivered[0]();
  EXPECT_EQ(done, 1);
}

TEST(RocksLog, RefusesAppendsBeyondTheQueueLimit) {
  TempDir dir;
  RocksLogOptions options;
  options.dir = dir.path();
  options.queue_limit = 16;
  auto log = RocksLog::Open(std::move(options));
  ASSERT_OK(log);
  // The first group may leave the queue at any moment; far more than limit + group must meet it.
  Status refused;
  for (int i = 0; i < 100000 && refused.ok(); ++i) {
    Batch batch;
    batch.Put(Family::kJobs, "k", "v");
    refused = (*log)->Append(std::move(batch), [](StatusOr<CommitSeq>) {});
  }
  EXPECT_STATUS(refused, StatusCode::kResourceExhausted, "queued");
  (*log)->Flush();
  EXPECT_OK(PutAndWait(log->get(), Family::kJobs, "k", "again"));
}

TEST(RocksLog, AnAppendThatAwaitsRoomIsNeverRefused) {
  TempDir dir;
  RocksLogOptions options;
  options.dir = dir.path();
  options.queue_limit = 16;
  auto log = RocksLog::Open(std::move(options));
  ASSERT_OK(log);
  for (int i = 0; i < 3000; ++i) {
    Batch batch;
    batch.Put(Family::kJobs, Str("job-", i), "record");
    (*log)->AwaitRoom();
    ASSERT_OK((*log)->Append(std::move(batch), [](StatusOr<CommitSeq>) {}));
  }
  (*log)->Flush();
  EXPECT_EQ(CountRecords(**log, Family::kJobs), size_t{3000});
}

TEST(RocksLog, ScansRangesForwardAndBackward) {
  TempDir dir;
  auto log = OpenLog(dir.path());
  ASSERT_OK(log);
  Batch batch;
  for (uint64_t i = 0; i < 10; ++i) {
    std::string key;
    AppendBigEndian64(&key, i * 100);  // crosses a byte: 200 < 300 only if big-endian
    batch.Put(Family::kEvents, key, Str(i));
  }
  batch.Put(Family::kRendezvous, "f1/a", "1");
  batch.Put(Family::kRendezvous, "f1/b", "2");
  batch.Put(Family::kRendezvous, "f2/a", "3");
  ASSERT_OK(AppendAndWait(log->get(), std::move(batch)));

  const auto key = [](uint64_t n) {
    std::string text;
    AppendBigEndian64(&text, n);
    return text;
  };
  std::string seen;
  const auto collect = [&](const std::string&, const std::string& value) {
    seen += value;
    return true;
  };
  ASSERT_OK((*log)->Scan(Family::kEvents, key(150), key(500), collect));
  EXPECT_EQ(seen, "234");
  seen.clear();
  ASSERT_OK((*log)->ScanBack(Family::kEvents, key(0), key(500), 3, collect));
  EXPECT_EQ(seen, "432");
  seen.clear();
  ASSERT_OK((*log)->ScanBack(Family::kEvents, key(800), "", 99, collect));
  EXPECT_EQ(seen, "98");

  Batch remove;
  remove.DeletePrefix(Family::kRendezvous, "f1/");
  remove.Delete(Family::kEvents, key(0));
  ASSERT_OK(AppendAndWait(log->get(), std::move(remove)));
  EXPECT_EQ(CountRecords(**log, Family::kRendezvous), 1u);
  EXPECT_STATUS((*log)->Get(Family::kEvents, key(0)), StatusCode::kNotFound, "");
}

TEST(RocksLog, TermRisesWithEveryOpen) {
  TempDir dir;
  for (uint64_t expected = 1; expected <= 4; ++expected) {
    auto log = OpenLog(dir.path());
    ASSERT_OK(log);
    EXPECT_EQ((*log)->term(), expected);
    EXPECT_EQ((*log)->role(), Role::kLeader);
  }
  auto reader = RocksLog::OpenReadOnly(dir.path());
  ASSERT_OK(reader);
  EXPECT_EQ((*reader)->term(), 4u);
  EXPECT_STATUS((*reader)->Append({}, nullptr), StatusCode::kUnavailable, "reading only");
}

TEST(RocksLog, VolatileBatchesAreReadableAndKeepTheOrder) {
  TempDir dir;
  auto log = OpenLog(dir.path());
  ASSERT_OK(log);
  Batch batch;
  batch.Put(Family::kSeries, "1", "point");
  ASSERT_OK((*log)->AppendVolatile(std::move(batch), nullptr));
  const CommitSeq before = (*log)->commit_seq();
  (*log)->Flush();
  EXPECT_EQ(*(*log)->Get(Family::kSeries, "1"), "point");
  EXPECT_EQ((*log)->commit_seq(), before) << "an unsynced batch must not count as a commit";
}

// 200 synced batches, closed without a flush of the memtable, so that all of them lie in the WAL.
void WriteTwoHundred(const std::string& dir) {
  auto log = OpenLog(dir);
  ASSERT_OK(log);
  for (int i = 0; i < 200; ++i) {
    ASSERT_OK(PutAndWait(log->get(), Family::kJobs, Str("job-", 1000 + i), std::string(100, 'x')));
  }
}

TEST(RocksLog, RefusesAFlippedBitInTheMiddleOfTheWal) {
  TempDir dir;
  WriteTwoHundred(dir.path());
  const std::string wal = NewestWal(dir.path());
  const auto bytes = std::filesystem::file_size(wal);
  ASSERT_GT(bytes, 200u * 100u);
  {
    std::fstream file(wal, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(bytes / 2));
    const char byte = static_cast<char>(file.get() ^ 0x10);
    file.seekp(static_cast<std::streamoff>(bytes / 2));
    file.put(byte);
  }
  EXPECT_STATUS(OpenLog(dir.path()), StatusCode::kDataLoss, "--repair");
  // Refusing must not change what a later repair can find.
  EXPECT_STATUS(OpenLog(dir.path()), StatusCode::kDataLoss, "was acknowledged");
  auto repaired = OpenLog(dir.path(), /*repair=*/true);
  ASSERT_OK(repaired);
  const size_t kept = CountRecords(**repaired, Family::kJobs);
  EXPECT_GT(kept, 50u);
  EXPECT_LT(kept, 150u);
  repaired->reset();
  EXPECT_OK(OpenLog(dir.path())) << "a repaired log opens plainly";
}

TEST(RocksLog, ToleratesATornTailThatWasNeverAcknowledged) {
  TempDir dir;
  WriteTwoHundred(dir.path());
  const std::string wal = NewestWal(dir.path());
  {
    // Half a record, as a crash in the middle of a write leaves it.
    std::ofstream file(wal, std::ios::app | std::ios::binary);
    const char half[] = "\x12\x34\x56\x78\x40\x00\x01partial";
    file.write(half, sizeof(half) - 1);
  }
  auto log = OpenLog(dir.path());
  ASSERT_OK(log);
  EXPECT_EQ(CountRecords(**log, Family::kJobs), 200u);
}

TEST(RocksLog, RefusesAnAcknowledgedTailThatVanished) {
  TempDir dir;
  WriteTwoHundred(dir.path());
  const std::string wal = NewestWal(dir.path());
  // A truncation at a record border leaves a log that RocksDB takes as whole.
  std::filesystem::resize_file(wal, std::filesystem::file_size(wal) - 700);
  EXPECT_STATUS(OpenLog(dir.path()), StatusCode::kDataLoss, "was acknowledged");
  EXPECT_OK(OpenLog(dir.path(), /*repair=*/true));
}

TEST(RocksLog, SnapshotOpensAsAWholeStore) {
  TempDir dir;
  WriteTwoHundred(dir.path());
  TempDir copy;
  auto log = OpenLog(dir.path());
  ASSERT_OK(log);
  ASSERT_OK((*log)->Snapshot(copy.path() + "/db"));
  auto reader = OpenLog(copy.path());
  ASSERT_OK(reader);
  EXPECT_EQ(CountRecords(**reader, Family::kJobs), 200u);
  EXPECT_OK((*reader)->VerifyChecksums());
}

}  // namespace
}  // namespace heddle::store::test
