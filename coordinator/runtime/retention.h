// What finished jobs and nodes that are gone leave behind, and when it goes (control-plane section
// 7). Records and events of jobs are not touched: they are the journal's (see README.md).
#pragma once

#include <cstdint>
#include <memory>

#include "coordinator/rpc/core.h"
#include "coordinator/rpc/log_files.h"

namespace heddle::runtime {

class Retention {
 public:
  // `keep_ms` after its job ended a log is removed, and the series of metric points but for its
  // last one; so long after it was last heard a LOST or LEFT node that books nothing and that
  // nobody closed is forgotten. 0: never. Both are borrowed and live until the core has stopped.
  Retention(rpc::Core* core, rpc::LogFiles* logs, int64_t keep_ms)
      : core_(core), logs_(logs), keep_ms_(keep_ms) {}

  // Any thread, once.
  void Start();

 private:
  // State thread: the next part of a pass; the next pass begins an hour later, or sooner where
  // things are kept for less than ten hours.
  void Look();
  // True when there are more.
  bool CleanJobs(int64_t before_ms);
  void ForgetNodes(int64_t before_ms);

  rpc::Core* const core_;
  rpc::LogFiles* const logs_;
  const int64_t keep_ms_;
  uint64_t next_job_ = 0;        // of this pass
  int64_t pass_before_ms_ = 0;   // jobs that ended before are this pass's; 0: between passes
  int64_t clean_before_ms_ = 0;  // those that ended before are clean since an earlier pass
};

}  // namespace heddle::runtime
