// Threads of this process (training-runtime.md 3.3, 13.2): results depend on their number, speed on
// their place. The one place of the trainer that talks to LibTorch's runtime.
#pragma once

#include <span>
#include <string>

#include "base/status/status.h"

namespace heddle::trainer {

// Binds the process to `cpus` (empty: as it is) and sets LibTorch's pools. Call once, before any
// tensor work. INVALID_ARGUMENT: no such cpu, threads < 1.
Status UseThreads(int threads, std::span<const int> cpus);

// Version of the LibTorch that this was built with.
std::string TorchVersion();

}  // namespace heddle::trainer
