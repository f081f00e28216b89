// The memory that ranks of one host share for their collectives, and how they wait for each other
// in it. A collective is a series of rounds: every rank puts a part of its data into its slot,
// waits until all have, reads the others' slots. Slots are two per rank, used in turns, so that a
// rank may be one round ahead of the slowest reader.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status/status.h"

namespace heddle::comm {

class SharedSegment {
 public:
  // Of the first rank: memory without a name, reserved at once. RESOURCE_EXHAUSTED without it.
  static StatusOr<std::unique_ptr<SharedSegment>> Create(int world);
  // Of the others: that of process `pid`, whose descriptor is `fd` there.
  static StatusOr<std::unique_ptr<SharedSegment>> Open(pid_t pid, int fd, int world);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  int fd() const { return fd_; }
  size_t slot_bytes() const;
  // Slot of a rank in a round.
  std::byte* slot(int rank, uint64_t round) const;

  // Says who this rank is. Before the first round.
  void Enter(int rank);
  // After all ranks entered: their processes, to see one end.
  Status WatchPeers();

  using Deadline = std::chrono::steady_clock::time_point;
  // Waits until this rank's slot of the round may be overwritten.
  Status AwaitFree(uint64_t round, Deadline deadline);
  // The slot of the round holds this rank's part of what `tag` stands for.
  void Post(uint64_t round, uint64_t tag);
  // What a rank posted; of a round that all have posted and this rank has not finished.
  uint64_t tag(int rank, uint64_t round) const;
  // Waits until all ranks have posted the round.
  Status AwaitPosted(uint64_t round, Deadline deadline);
  // This rank has read what it wants of the round.
  void Finish(uint64_t round);
  // Any thread: ends all waits, of all ranks.
  void Abort();

 private:
  struct Header;
  SharedSegment(int fd, void* memory, int world) : fd_(fd), memory_(memory), world_(world) {}
  Header* header() const { return static_cast<Header*>(memory_); }
  template <typename Done>
  Status Await(const Done& done, Deadline deadline);
  Status CheckPeers();

  const int fd_;
  void* const memory_;
  const int world_;
  int rank_ = 0;
  std::vector<int> peers_;  // pidfds, -1 for this rank
};

}  // namespace heddle::comm
