// Ranks as processes of their own, as a worker starts them, with a rendezvous in files: for back
// ends that exist once in a process. The parent must not have used LibTorch's threads before.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "tests/worker/comm/file_rendezvous.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {

// Options of a rank; ranks of a task follow each other, `per_task` each.
inline GroupOptions ForkedOptions(const std::string& folder, int rank, int world, int per_task) {
  GroupOptions options;
  options.rank = rank;
  options.world_size = world;
  options.local_rank = rank % per_task;
  options.data_address = "127.0.0.1";
  options.key_prefix = "f7/secret/";
  options.rendezvous = ThroughFiles(folder);
  options.scratch = folder;
  options.init_timeout = std::chrono::milliseconds(60'000);
  options.step_timeout = std::chrono::milliseconds(60'000);
  return options;
}

// Runs `body` in one process per rank; a text that it returns is a failure, after which the others
// are killed, as after any other exit status than 0. The ranks' exit statuses as waitpid gives
// them.
inline std::vector<int> ForkRanks(int world, const std::function<std::string(int)>& body) {
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < world; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() == 0) {
      signal(SIGPIPE, SIG_IGN);  // as in the trainer
      const std::string problem = body(rank);
      if (!problem.empty()) std::fprintf(stderr, "rank %d: %s\n", rank, problem.c_str());
      _exit(problem.empty() ? 0 : 1);
    }
  }
  std::vector<int> statuses(ranks.size(), -1);
  for (size_t left = ranks.size(); left > 0; --left) {
    int status = -1;
    const pid_t ended = waitpid(-1, &status, 0);
    const auto rank = std::find(ranks.begin(), ranks.end(), ended);
    if (rank == ranks.end()) break;
    statuses[static_cast<size_t>(rank - ranks.begin())] = status;
    *rank = -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) == 0) continue;
    for (const pid_t other : ranks) {
      if (other > 0) kill(other, SIGKILL);  // it may wait for the one that failed
    }
  }
  return statuses;
}

}  // namespace heddle::comm
