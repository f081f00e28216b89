// Starts one rank (control-plane X5, reliability S21). Everything the child does between fork and
// execve stands in spawn.cc, in the order the security page gives.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "worker/control/control_frame.h"
#include "worker/control/task_files.h"

namespace heddle::shim {

struct SpawnOptions {
  bool control = true;
  int64_t uid = -1;
  int64_t gid = -1;
  std::string working_dir;
  std::vector<std::string> cgroup_files;
};

// The shim's ends; non-blocking, close-on-exec, -1 where there is none.
struct SpawnedRank {
  pid_t pid = -1;
  int control_fd = -1;
  int log_fd = -1;    // stdout and stderr of the rank
  int error_fd = -1;  // one LaunchFailure, or end of file once the program runs
  control::LaunchStep failed_step = control::LaunchStep::kNone;  // when pid is -1
  int error = 0;
};

struct LaunchFailure {
  uint32_t step = 0;  // control::LaunchStep
  int32_t error = 0;  // errno
};

// REQUIRES: called on the process's main thread, whose end ends the rank (PDEATHSIG).
SpawnedRank SpawnRank(const control::RankLaunch& launch, const SpawnOptions& options);

}  // namespace heddle::shim
