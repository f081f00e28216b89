// The one way to durability of the coordinator (control-plane D1, section 15). A batch is the
// result of one transition: changed records and their event, as bytes. No clock and no random value
// is inside, so the same stream of batches can feed a follower (H1).
//
// Invariants: (1) `done` of a batch runs after the batch is durable, never before; (2) in the order
// of Append; (3) after one error no batch is acknowledged any more: the log is POISONED (D7) and
// must be closed and opened again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::store {

// STORED as column families by name (control-plane section 7); add, never rename.
enum class Family : uint8_t {
  kMeta,
  kJobs,
  kAttempts,
  kTasks,
  kWorkers,
  kAccounts,
  kDeps,
  kNominations,
  kCheckpoints,
  kEvents,
  kJobEvents,
  kIdempotency,
  kAudit,
  kSeries,
  kRendezvous,
};
inline constexpr size_t kFamilyCount = 15;

// Name of the column family, e.g. "jobs".
const char* FamilyName(Family family);

// Upsert of a key, its deletion (no value), or the deletion of every key with this prefix.
struct Mutation {
  Family family = Family::kMeta;
  std::string key;
  std::optional<std::string> value;
  bool whole_prefix = false;
};

struct Batch {
  std::vector<Mutation> mutations;

  void Put(Family family, std::string key, std::string value);
  void Delete(Family family, std::string key);
  void DeletePrefix(Family family, std::string prefix);
  size_t Bytes() const;
};

// Rises by one with every group of batches that was made durable together.
using CommitSeq = uint64_t;

enum class Role { kLeader, kFollower, kPoisoned };

struct LogStats {
  double commit_p50_ms = 0;
  double commit_p99_ms = 0;
  uint64_t commits = 0;         // synced groups
  uint64_t batches = 0;         // batches in them
  uint64_t volatile_drops = 0;  // refused for a full queue
  size_t queued = 0;
};

class StateLog {
 public:
  using Done = std::function<void(StatusOr<CommitSeq>)>;
  // Returns false to stop the scan.
  using Visit = std::function<bool(const std::string& key, const std::string& value)>;

  virtual ~StateLog() = default;

  // Queues `batch`; does not block. `done` runs later through Options::deliver of the
  // implementation, with UNAVAILABLE if the log was poisoned meanwhile. Returns RESOURCE_EXHAUSTED
  // when the queue is full and UNAVAILABLE when poisoned; then `done` is dropped and nothing
  // changes.
  virtual Status Append(Batch batch, Done done) = 0;

  // Queues a batch that must survive kill -9 but not a power cut (families `series`, `rdzv`).
  // Written in order with the others, without its own sync; `done` (may be empty) runs once it is
  // written. Refused like Append.
  virtual Status AppendVolatile(Batch batch, Done done = {}) = 0;

  // Durable records of `family` with first <= key (< last if last is not empty), ascending.
  // Thread-safe; sees no synced batch before it is durable. DATA_LOSS for damaged blocks.
  virtual Status Scan(Family family, const std::string& first, const std::string& last,
                      const Visit& visit) const = 0;
  // The newest `limit` records of a range, newest first.
  virtual Status ScanBack(Family family, const std::string& first, const std::string& last,
                          size_t limit, const Visit& visit) const = 0;
  // NOT_FOUND if absent.
  virtual StatusOr<std::string> Get(Family family, const std::string& key) const = 0;

  // Waits until everything queued is durable (or the log is poisoned).
  virtual void Flush() = 0;

  // A consistent copy in a folder that must not exist.
  virtual Status Snapshot(const std::string& dir) = 0;

  virtual Role role() const = 0;
  // Below 2^24; rises with every open of the log (N1).
  virtual uint64_t term() const = 0;
  virtual LogStats Stats() const = 0;
};

// Keys `term` and `commit_seq` of family meta belong to the log; records use other keys.
inline constexpr char kTermKey[] = "term";
inline constexpr char kCommitSeqKey[] = "commit_seq";

// Big-endian keys, so that key order is number order.
void AppendBigEndian64(std::string* key, uint64_t value);
uint64_t ReadBigEndian64(const std::string& bytes, size_t offset = 0);

}  // namespace heddle::store
