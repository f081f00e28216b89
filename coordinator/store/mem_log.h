// StateLog in memory, for tests and the simulator: durable means applied to a map when the test
// says so. What was appended but not committed is lost by Crash(), as by a power cut.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <string>
#include <utility>

#include "coordinator/store/state_log.h"

namespace heddle::store {

// What survives a crash; shared by the MemLogs of successive "processes".
using MemDisk = std::array<std::map<std::string, std::string>, kFamilyCount>;

// One thread.
class MemLog : public StateLog {
 public:
  // Opens `disk` (borrowed) with term + 1. With `auto_commit` Append is durable at once.
  MemLog(MemDisk* disk, bool auto_commit);

  Status Append(Batch batch, Done done) override;
  Status AppendVolatile(Batch batch, Done done = {}) override;
  Status Scan(Family family, const std::string& first, const std::string& last,
              const Visit& visit) const override;
  Status ScanBack(Family family, const std::string& first, const std::string& last, size_t limit,
                  const Visit& visit) const override;
  StatusOr<std::string> Get(Family family, const std::string& key) const override;
  void Flush() override { Commit(); }
  Status Snapshot(const std::string& dir) override;
  Role role() const override { return poisoned_ ? Role::kPoisoned : Role::kLeader; }
  uint64_t term() const override { return term_; }
  LogStats Stats() const override { return stats_; }

  // Makes up to `limit` queued batches durable and runs their `done`s. Returns how many.
  size_t Commit(size_t limit = SIZE_MAX);
  // Forgets what is queued without running any `done`: the process is gone.
  void Crash() { queue_.clear(); }
  // The next commit fails as a full disk does: every queued `done` gets UNAVAILABLE, and so on.
  void Poison();

 private:
  void Apply(const Batch& batch);

  MemDisk* disk_;
  bool auto_commit_;
  bool poisoned_ = false;
  uint64_t term_;
  CommitSeq seq_ = 0;
  std::deque<std::pair<Batch, Done>> queue_;
  LogStats stats_;
};

}  // namespace heddle::store
