// Nodes and gangs of a large mixed cluster, each a function of its number: what the scheduler's
// benchmarks place and where.
#pragma once

#include <cstdint>

#include "coordinator/state/event.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::bench {

// Four kinds: small and large ones without GPUs, and such with 4 and 8 GPUs, of 10 zones and 4
// generations. `session` is the registration's.
v1::RegisterRequest NodeOf(uint64_t number, uint64_t session);

// A command of 1 to 64 ranks of one of `shapes` shapes: cores, memory, GPUs and constraints differ.
// One in ten wants a zone, one in ten a generation, one in six GPUs. Priorities are 0 to 99.
v1::RunConfig GangOf(uint64_t number, uint64_t shapes);

// The submit of that gang under `id`. One in twenty waits for the gang `after`, unless that is 0.
state::event::JobSubmitted SubmitOf(uint64_t number, uint64_t shapes, JobId id, JobId after);

}  // namespace heddle::bench
