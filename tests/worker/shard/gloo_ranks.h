// Runs a case on ranks that are threads of this process, over shared memory or Gloo.
#pragma once

#include "tests/worker/shard/sharded_run.h"

namespace heddle::shard {

// What all ranks hold together; the rest is rank 0's.
Outcome RunOnRanks(const Case& c);

}  // namespace heddle::shard
