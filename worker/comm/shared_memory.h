// Collectives between ranks of one host through memory that they share: no sockets, no copies by
// the kernel (training-runtime.md 3.1). Sums are taken in the same order as everywhere, so a run
// has the same bits with and without it.
#pragma once

#include <memory>
#include <string>

#include "worker/comm/communicator.h"

namespace heddle::comm {

// `group` with its traffic in shared memory, or `group` itself where ranks are on several hosts or
// in containers of their own, or the memory cannot be had; all ranks get the same. `why_not` is
// empty or says why. Blocking, called by all ranks at the same time. UNAVAILABLE: a collective of
// `group` failed.
StatusOr<std::unique_ptr<Communicator>> OverSharedMemory(std::unique_ptr<Communicator> group,
                                                         std::string* why_not);

}  // namespace heddle::comm
