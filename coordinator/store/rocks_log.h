// StateLog on RocksDB 7.8.3 with the traps of that version closed (control-plane D2-D7, reliability
// D1-D3): group commit by one thread, one synced WriteBatch per group, own info logger, tolerant
// WAL recovery guarded by the commit mark, and poison on the first error of any kind.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "coordinator/store/commit_mark.h"
#include "coordinator/store/state_log.h"

namespace rocksdb {
class ColumnFamilyHandle;
class DB;
class Iterator;
class WriteBatch;
}  // namespace rocksdb

namespace heddle::store {

struct RocksLogOptions {
  std::string dir;  // state folder; the database is dir/db, the commit mark dir/mark
  // Accepts the loss of acknowledged batches: opens at the last consistent point and says how much
  // is missing in the log. Never by default (reliability R16).
  bool repair = false;
  size_t queue_limit = 8192;
  // Receives one closure per committed group, which runs the `done`s of the group. Called on the
  // commit thread; default: runs it there. Post it to the state thread to keep the state there.
  std::function<void(std::function<void()>)> deliver;
};

class RocksLog : public StateLog {
 public:
  // Opens or creates the database and stores term + 1, synced, before it returns (N1).
  // DATA_LOSS: an acknowledged batch is missing or a record in the middle of the WAL is damaged
  // (needs `repair`); RESOURCE_EXHAUSTED: no room; blocks for the time of recovery.
  // REQUIRES: the caller holds the StateLock of options.dir.
  static StatusOr<std::unique_ptr<RocksLog>> Open(RocksLogOptions options);

  // Opens for reading only, without a new term and without taking part in the lock: for --verify.
  // Appends are refused.
  static StatusOr<std::unique_ptr<RocksLog>> OpenReadOnly(const std::string& dir);

  // Commits what is queued, then closes. No `done` runs after it returned.
  ~RocksLog() override;

  Status Append(Batch batch, Done done) override;
  Status AppendVolatile(Batch batch, Done done = {}) override;
  Status Scan(Family family, const std::string& first, const std::string& last,
              const Visit& visit) const override;
  Status ScanBack(Family family, const std::string& first, const std::string& last, size_t limit,
                  const Visit& visit) const override;
  StatusOr<std::string> Get(Family family, const std::string& key) const override;
  void Flush() override;
  // Waits while nearly as much is queued as can be: before an Append that must not be refused.
  void AwaitRoom();
  Status Snapshot(const std::string& dir) override;
  Role role() const override;
  uint64_t term() const override { return term_; }
  LogStats Stats() const override;

  CommitSeq commit_seq() const;
  // Reads every block of every family and compares its checksum. DATA_LOSS names the file.
  Status VerifyChecksums() const;

 private:
  struct Pending {
    Batch batch;
    Done done;
    bool synced = false;
  };

  explicit RocksLog(RocksLogOptions options);
  Status OpenDatabase();
  Status OpenMode(bool point_in_time, bool read_only);
  void CloseDatabase();
  Status CheckMark();
  StatusOr<uint64_t> ReadMeta(const char* key) const;
  Status StartTerm();
  Status Enqueue(Pending pending);
  void CommitLoop();
  std::vector<Pending> TakeGroup();
  Status WriteGroup(const std::vector<Pending>& group);
  void FinishGroup(std::vector<Pending> group, const Status& status);
  std::unique_ptr<rocksdb::Iterator> NewIterator(Family family, const std::string& last,
                                                 std::string* bound) const;

  const RocksLogOptions options_;
  std::unique_ptr<rocksdb::DB> db_;
  std::vector<rocksdb::ColumnFamilyHandle*> families_;  // owned by db_'s close
  std::unique_ptr<CommitMark> mark_;
  uint64_t term_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable work_;  // queue_ filled or stop_
  std::condition_variable idle_;  // queue_ empty and no group in flight
  std::condition_variable room_;  // queue_ at most half full
  std::deque<Pending> queue_;     // guarded by mutex_
  Status poison_;                 // guarded by mutex_; OK while healthy
  bool in_flight_ = false;        // guarded by mutex_
  bool stop_ = false;             // guarded by mutex_
  bool read_only_ = false;
  CommitSeq commit_seq_ = 0;         // guarded by mutex_ after Open
  LogStats stats_;                   // guarded by mutex_
  std::vector<float> latencies_ms_;  // ring of the last groups, guarded by mutex_
  size_t latency_next_ = 0;
  std::thread thread_;
};

}  // namespace heddle::store
