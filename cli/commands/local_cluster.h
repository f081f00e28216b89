// A cluster on this machine: one coordinator and some workers as background processes with all
// state in one folder. Starting is idempotent: what runs is left alone, what is missing is started,
// so `heddle up` after a crash re-attaches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::cli {

// Workers of a new cluster whose owner gave no number.
inline constexpr int64_t kLocalWorkers = 2;

struct LocalClusterOptions {
  std::string state;        // absolute folder; if it is new: mode 0700
  std::string program_dir;  // where the daemons' programs lie
  int64_t workers = 0;      // 0: as many as the running cluster is of, else kLocalWorkers
  int64_t start_timeout_ms = 20'000;
  int64_t stop_timeout_ms = 60'000;
};

struct RunningCluster {
  std::string coordinator;  // its address
  int64_t workers = 0;
};

// Returns once the coordinator answers and all workers are connected. A daemon that dies while
// starting is UNAVAILABLE with the end of its log. Workers share evenly the processors and memory
// that this process was granted, so FAILED_PRECONDITION where some run that share it among another
// number. Refuses a state folder that others can write to, and changes the mode of no folder that
// exists.
StatusOr<RunningCluster> StartLocalCluster(const LocalClusterOptions& options);

// Drains every worker (jobs save and queue again), then ends the daemons. Nothing of this state
// folder runs afterwards, also if the grace was over. OK without a running cluster.
Status StopLocalCluster(const LocalClusterOptions& options);

// Pids of `program` started with `--state STATE`; every process of ours carries it in its argv.
std::vector<int> FindDaemons(const std::string& program, const std::string& state);

}  // namespace heddle::cli
