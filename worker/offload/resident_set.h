// The bounded set of blocks in memory: a block is pinned to be used, and what does not fit goes
// home (home.h) and comes back. One thread of the set moves blocks while the caller computes: the
// next ones in, the last one out (training-runtime section 12, "read next, update, write
// previous").
//
// Invariants:
//  1. Memory of blocks, transfers included, never exceeds the budget.
//  2. A pinned block does not move, and is not given away.
//  3. A block that is being written is not changed; one being read is not seen.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/clock/clock.h"
#include "base/status/status.h"
#include "worker/offload/block_memory.h"
#include "worker/offload/blocks.h"
#include "worker/offload/eviction_order.h"
#include "worker/offload/expected_uses.h"
#include "worker/offload/home.h"

namespace heddle::offload {

struct ResidentSetOptions {
  int64_t budget_bytes = 0;
  // The most that the caller will have pinned together, as BlockMemoryBytes of each block.
  int64_t min_pinned_bytes = 0;
  // Reads, and as many writes, that may run together. At most kDiskRequests / 2.
  int transfers = 8;
  // Where the memory of blocks is to be (base/numa); empty: anywhere.
  std::vector<int> memory_nodes;
  // Every block that gives way is compared with the choice of a look at all of them: for tests.
  bool check_order = false;
};

// Counters since the last TakeStats, but for the last two.
struct ResidentSetStats {
  int64_t hits = 0;       // pins that did not wait
  int64_t misses = 0;     // pins that did
  int64_t evictions = 0;  // blocks that lost their memory
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  double read_seconds = 0;     // in which at least one read was on its way
  double write_seconds = 0;    // the same for writes
  double exposed_seconds = 0;  // in which the caller waited
  int64_t resident_bytes = 0;  // memory of blocks now, kept free memory included
  int64_t peak_bytes = 0;      // its maximum since the set was made
};

// All calls by one thread, the caller. After an error of a transfer the contents are lost: the
// error comes once from the call it concerns (of a read: the Pin of that block; of a write: the
// next call), and then from every call. Waits have no deadline: a disk that hangs is ended by the
// step's.
class ResidentSet {
 public:
  // Starts the thread. INVALID_ARGUMENT with the numbers if the budget is below min_pinned_bytes or
  // the largest block. `home` is of the same table.
  static StatusOr<std::unique_ptr<ResidentSet>> Create(const BlockTable& table,
                                                       const ResidentSetOptions& options,
                                                       std::unique_ptr<Home> home);
  // Waits for transfers; what is in the set is gone. Pins end.
  ~ResidentSet();
  ResidentSet(const ResidentSet&) = delete;
  ResidentSet& operator=(const ResidentSet&) = delete;

  // The pins to come, in their order, in place of what was expected before: the first ones are
  // fetched as far as the budget goes, and the last ones make room. A pin takes its block's first
  // expected use; uses that are jumped over stay expected until the next call. Does not wait.
  // INVALID_ARGUMENT: a block that does not exist.
  Status Expect(std::span<const ExpectedUse> uses);

  // The block's bytes, from a page's begin, where they stay until as many Unpins. Waits until they
  // are there. kUpdate and kOverwrite: the bytes will be written back. What was never written reads
  // as zero; with kOverwrite the contents are any.
  // INVALID_ARGUMENT: no such block. RESOURCE_EXHAUSTED: with what is pinned it does not fit.
  // DATA_LOSS and others: the home's errors (spill_file.h).
  StatusOr<std::byte*> Pin(uint32_t slot, Kind kind, Access access);
  // Whether Pin would return without waiting. Announces nothing.
  bool IsHere(uint32_t slot, Kind kind, Access access);
  // FAILED_PRECONDITION if it is not pinned. Done also where an older error is returned.
  Status Unpin(uint32_t slot, Kind kind);
  // The contents are not needed any more: no write, and zero when read again. May wait for a
  // transfer of this block. FAILED_PRECONDITION if it is pinned.
  Status Discard(uint32_t slot, Kind kind);

  ResidentSetStats TakeStats();
  // One line for logs: budget and home.
  std::string Describe() const;

 private:
  // kBlank: it has memory whose contents are not the block's, for an overwrite to come.
  enum class State : uint8_t { kAway, kBlank, kReading, kHere };
  struct Resident {
    std::byte* data = nullptr;
    State state = State::kAway;
    bool dirty = false;    // differs from home
    bool written = false;  // home has it
    bool writing = false;
    bool leaving = false;  // loses its memory when written; counted in leaving_bytes_
    int pins = 0;
    uint64_t used = 0;  // order of the last pin
  };
  struct Demand {
    uint32_t block = 0;
    Access access = Access::kRead;
  };
  enum class Room { kReady, kComing, kNone };
  // Time in which at least one transfer is on its way.
  struct Busy {
    int running = 0;
    int64_t since_ns = 0;
    int64_t total_ns = 0;
    void Begin(int64_t now_ns);
    void End(int64_t now_ns);
    double TakeSeconds(int64_t now_ns);
  };
  struct Start {
    Transfer transfer;
    bool zero = false;  // a read of what was never written
  };

  ResidentSet(const BlockTable& table, const ResidentSetOptions& options,
              std::unique_ptr<Home> home);

  // ---- both sides; mutex_ held ----
  // It has memory that could be taken.
  static bool IsIdle(const Resident& block);
  // After each change of the block. Not of its next use: what is pinned or demanded does not go.
  void Reorder(uint32_t number);

  // ---- the caller's side; mutex_ held ----
  bool Ready(const Resident& block, Access access) const;
  bool BlankAtOnce(uint32_t number, Access access);
  Status CheckFits(uint32_t number) const;
  Status Await(std::unique_lock<std::mutex>& lock, uint32_t number, Access access);

  // ---- the owner's side: the set's thread ----
  void Own();
  // The rest with mutex_ held. Planning decides which transfers to start now.
  void Plan(std::vector<Start>& starts);
  bool PlanDemand(std::vector<Start>& starts);
  void PlanExpected(std::vector<Start>& starts);
  // Gives the block memory and starts its read. REQUIRES: the memory fits.
  void Fetch(uint32_t number, Access access, std::vector<Start>& starts);
  void StartRead(uint32_t number, std::vector<Start>& starts);
  // Sees to `bytes` of free memory at the cost of blocks that are needed after `place`.
  Room MakeRoom(int64_t bytes, size_t place, bool demanded, std::vector<Start>& starts);
  std::optional<uint32_t> Furthest(size_t place, bool demanded) const;
  // The same by looking at every block.
  std::optional<uint32_t> FurthestOfAll(size_t place, bool demanded) const;
  void StartWrite(uint32_t number, std::vector<Start>& starts);
  void Release(uint32_t number);
  void Finish(const TransferEnd& end);
  void FinishRead(uint32_t number, const Status& status);
  void FinishWrite(uint32_t number, const Status& status);
  void StopLeaving(uint32_t number);

  const BlockTable table_;
  const ResidentSetOptions options_;
  const SystemClock clock_;
  const std::unique_ptr<Home> home_;

  std::mutex mutex_;  // guards all below but the thread
  std::condition_variable changed_;
  BlockMemory memory_;
  ExpectedUses uses_;
  EvictionOrder order_;           // of what is idle
  std::vector<Resident> blocks_;  // by number
  size_t fetched_ = 0;            // places before this one are here, on their way, or over
  std::optional<Demand> demand_;  // what the caller waits for
  std::map<uint32_t, Status> read_errors_;
  Status failed_;
  int64_t pinned_bytes_ = 0;
  int64_t leaving_bytes_ = 0;
  uint64_t pin_count_ = 0;
  int transfers_ = 0;
  Busy reading_;
  Busy writing_;
  int64_t exposed_ns_ = 0;
  ResidentSetStats stats_;
  bool stopped_ = false;

  std::thread owner_;
};

}  // namespace heddle::offload
