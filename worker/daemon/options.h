// What `heddle-worker` is told on its command line.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "base/net/endpoint.h"

namespace heddle::worker {

enum class OnTerm { kDetach, kDrain };

struct Options {
  std::string state_dir;
  net::Endpoint coordinator;
  net::Security security;
  std::string data_address;  // empty: data_interface, else the address we reach the coordinator by
  std::string data_interface;
  double cpus = 0;           // 0: what was granted
  int64_t memory_bytes = 0;  // 0: what was granted
  uint32_t share = 1;        // workers among whom what was granted is divided
  int gpus = -1;             // below 0: what was found
  std::vector<std::string> labels;
  std::string trainer;
  std::string shim;
  OnTerm on_term = OnTerm::kDrain;
  std::chrono::milliseconds drain_grace{120'000};
};

}  // namespace heddle::worker
