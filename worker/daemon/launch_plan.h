// From an assignment to what the shim starts: programs, environment, CPUs, GPUs, limits
// (control-plane section 10). Pure except for reading the daemon's own environment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "heddle/v1/worker_link.pb.h"
#include "worker/control/task_files.h"
#include "worker/daemon/capacity.h"
#include "worker/daemon/task_folder.h"

namespace heddle::worker {

inline constexpr uint64_t kLogBytesMax = uint64_t{256} << 20;  // per rank, on the worker

// True for jobs of kind `command`: no frames, no permit.
bool IsCommand(const v1::TaskAssignment& assignment);

// Threads of one rank: whole CPUs, at least one.
uint32_t ThreadsPerRank(const v1::TaskAssignment& assignment);

struct LaunchInput {
  std::string trainer;
  CgroupParents cgroups;
  std::vector<std::vector<uint32_t>> cpus;     // per local rank, may be empty
  std::vector<std::vector<std::string>> gpus;  // per local rank, names for CUDA_VISIBLE_DEVICES
};
control::LaunchFile MakeLaunch(const TaskFolder& folder, const LaunchInput& input);

// What rank `local_rank` is told in its SPEC.
v1::RankSpec MakeSpec(const TaskFolder& folder, size_t local_rank, const std::string& data_address,
                      const std::vector<uint32_t>& cpus);

}  // namespace heddle::worker
