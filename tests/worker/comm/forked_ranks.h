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
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {

// SET and GET of the rendezvous store; a key is a file of `folder`.
inline RendezvousCall ThroughFiles(const std::string& folder) {
  const auto path_of = [folder](std::string key) {
    std::replace(key.begin(), key.end(), '/', '_');
    return folder + "/" + key;
  };
  return
      [path_of](
          const heddle::v1::RendezvousRequest& request) -> StatusOr<heddle::v1::RendezvousReply> {
        heddle::v1::RendezvousReply reply;
        const auto deadline =
            std::chrono::steady_clock::now() + std::chrono::milliseconds(request.timeout_ms());
        for (int i = 0; i < request.keys_size(); ++i) {
          const std::string path = path_of(request.keys(i));
          if (request.verb() == heddle::v1::RENDEZVOUS_VERB_SET) {
            const std::string part = path + ".tmp" + std::to_string(getpid());
            std::ofstream(part, std::ios::binary) << request.values(i);
            std::filesystem::rename(part, path);
            continue;
          }
          while (!std::filesystem::exists(path)) {
            if (std::chrono::steady_clock::now() > deadline) {
              reply.set_code(4);
              reply.set_message("deadline passed");
              return reply;
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
          }
          std::ifstream file(path, std::ios::binary);
          reply.add_values(std::string(std::istreambuf_iterator<char>(file), {}));
        }
        return reply;
      };
}

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
// are killed, as after any other exit status than 0. The ranks' exit statuses as waitpid gives them.
inline std::vector<int> ForkRanks(int world, const std::function<std::string(int)>& body) {
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < world; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() == 0) {
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
