// Which GPUs this worker may offer, found without a driver library: what the kernel module shows in
// /proc, restricted as the container and the user restricted this process.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace heddle::worker {

struct GpuDevice {
  std::string id;    // never changes on this machine: the PCI address, or the name without one
  std::string name;  // what CUDA_VISIBLE_DEVICES calls it: its UUID, else its number
  std::string model;
};

struct GpuSources {
  std::string proc = "/proc/driver/nvidia/gpus";
  std::string dev = "/dev";
  std::optional<std::string> nvidia_visible;  // NVIDIA_VISIBLE_DEVICES; nothing: not set
  std::optional<std::string> cuda_visible;    // CUDA_VISIBLE_DEVICES
};
// With the variables of this process.
GpuSources GpuSourcesHere();

// `wanted` of them at most; below 0: all that are found. Numbers are in PCI order, as nvidia-smi
// counts. Where nothing is found `wanted` is believed (a driver that shows nothing in /proc).
std::vector<GpuDevice> FindGpus(const GpuSources& sources, int wanted);

}  // namespace heddle::worker
