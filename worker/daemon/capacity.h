// What this process was granted (formats F54): CPUs of its affinity mask, bounded by cgroup quotas,
// memory bounded by cgroup limits; never the totals of the host. GPUs: gpu_devices.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "heddle/v1/worker_link.pb.h"
#include "worker/daemon/gpu_devices.h"
#include "worker/daemon/options.h"

namespace heddle::worker {

// CPUs this process may run on, ascending.
std::vector<uint32_t> GrantedCpus();
double GrantedCpuTime();
uint64_t GrantedMemory();
v1::Capacity MakeCapacity(const Options& options, const std::vector<GpuDevice>& gpus);
// Warning of a worker that offers more CPUs or memory than it was granted, whose ranks will stand
// in each other's way; empty: it does not. `granted` as MakeCapacity gives it without options.
std::string OvercommitOf(const Options& options, const v1::Capacity& granted);
// The label of a worker whose ranks can use MPI.
inline constexpr char kMpiLabel[] = "mpi=openmpi";
// Whether heddle-mpi-server in `folder` (with its last slash) finds OpenMPI and PMIx. Starts it, a
// few milliseconds.
bool FindsMpi(const std::string& folder);
uint64_t FreeDiskBytes(const std::string& path);

// Where shims may make cgroups for their tasks; empty where this process has no right to.
struct CgroupParents {
  std::string v2;
  std::string v1_memory;
  std::string v1_freezer;
};
CgroupParents FindCgroupParents();

// Parts with text as input, for tests.
// Folder of this process's cgroup for `controller` ("" is v2) from the texts of /proc/self/cgroup
// and /proc/self/mountinfo; empty if that hierarchy is not mounted.
std::string CgroupFolder(const std::string& cgroup_text, const std::string& mountinfo_text,
                         const std::string& controller);

}  // namespace heddle::worker
