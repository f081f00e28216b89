// Which GPUs each task of this machine was given, shared by all daemons of the user through one
// locked file, like CpuTable. Two ranks on one GPU are an error, so every doubt is one too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "worker/daemon/gpu_devices.h"

namespace heddle::worker {

class GpuTable {
 public:
  // `path` is the table's file, `devices` what this daemon offers.
  GpuTable(std::string path, std::vector<GpuDevice> devices);

  const std::vector<GpuDevice>& devices() const { return devices_; }

  // Names for CUDA_VISIBLE_DEVICES, as many for each of `ranks` ranks. `indices` is what the
  // coordinator chose from our number of devices, for all ranks together: the devices in these
  // places, or others of ours where another daemon, or a task from before a restart that counted
  // otherwise, holds one of them. Booked for `task_dir` until Release or until neither this process
  // nor the task's shim lives. RESOURCE_EXHAUSTED: too few are free.
  StatusOr<std::vector<std::vector<std::string>>> Take(const std::string& task_dir, size_t ranks,
                                                       const std::vector<int32_t>& indices);
  void Release(const std::string& task_dir);

  // Where the table of this user lies by default.
  static std::string DefaultPath();

 private:
  std::string path_;
  std::vector<GpuDevice> devices_;
};

}  // namespace heddle::worker
