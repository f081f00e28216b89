// The ranks of one task as their pages and /proc show them, without their help: what they do, how
// much memory they took, where their threads stand (training-runtime.md 17.2). State thread, except
// DescribeStacks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "heddle/v1/worker_link.pb.h"
#include "worker/daemon/task_folder.h"

namespace heddle::worker {

// What is needed to look at a rank from another thread. `page` is the folder's.
struct RankTarget {
  uint32_t rank = 0;
  int pid = 0;
  uint64_t start_ticks = 0;
  control::RankPage* page = nullptr;
};

class RankWatch {
 public:
  explicit RankWatch(TaskFolder* folder);

  // The shim tells it once, and again after each attach.
  void OnSpawned(size_t local, int pid);
  void OnEnded(size_t local);

  // Empty for kind `command`, whose processes have no page.
  std::vector<v1::RankHead> Heads();
  // "in backward of block.3 at step 12, waiting in #1812 all-gather block.7"; "" before the first
  // phase.
  std::string Doing(size_t local) const;
  uint64_t step(size_t local) const;
  // Highest resident memory seen, bytes; 0: never looked at.
  uint64_t peak_bytes(size_t local) const { return seen_[local].peak_bytes; }

  // Of the ranks that live.
  std::vector<RankTarget> Targets() const;

 private:
  struct Seen {
    int pid = 0;
    uint64_t start_ticks = 0;
    uint64_t peak_bytes = 0;
    bool ended = false;
  };
  v1::RankHead Head(size_t local);
  int64_t layers() const;

  TaskFolder* const folder_;
  std::vector<Seen> seen_;
};

// Every thread of the rank, one line each, and below it its frames where the rank could write them
// (it is asked by a signal and given a quarter of a second), else what the kernel shows. At most
// 8 KiB. Blocking; any thread.
std::string DescribeStacks(const RankTarget& target);

}  // namespace heddle::worker
