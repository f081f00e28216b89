#include "worker/trainer/threads.h"

#include <ATen/Parallel.h>
#include <sched.h>
#include <torch/csrc/api/include/torch/version.h>

namespace heddle::trainer {

Status UseThreads(int threads, std::span<const int> cpus) {
  if (threads < 1) {
    return InvalidArgument(Str(threads, " threads"));
  }
  if (!cpus.empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : cpus) {
      if (cpu < 0 || cpu >= CPU_SETSIZE) {
        return InvalidArgument(Str("cpu ", cpu));
      }
      CPU_SET(static_cast<size_t>(cpu), &set);
    }
    if (sched_setaffinity(0, sizeof(set), &set) != 0) {
      return FromErrno("bind to cpus");
    }
  }
  at::set_num_threads(threads);
  at::set_num_interop_threads(1);
  return OkStatus();
}

std::string TorchVersion() { return TORCH_VERSION; }

}  // namespace heddle::trainer
