// A rendezvous of processes in files, without a coordinator: for tests and benchmarks.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

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

}  // namespace heddle::comm
