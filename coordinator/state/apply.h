// The one transition function of the coordinator (architecture S29). Division of labour:
//
//   state thread, per event:  Outcome o = Apply(state, event, now, policy);
//                             for (EventRecord& e : o.events) state.Commit(e);   // working state
//                             journal.Append(records of o.events, done)
//   after the sync (done):    publish o.events on the bus, release o.effects, then the reply.
//
// Invariants: (1) Apply is pure: the same arguments give the same outcome; it never reads a clock,
// random bits or anything but its arguments. (2) It is total: every (state, event) pair gives an
// outcome; one that no row of the tables in transitions.cc allows is FAILED_PRECONDITION and
// changes nothing. (3) The working state may be ahead of the disk, so *every* reply and effect,
// those of an outcome without events included (a repeated request, a read), is released only
// after all batches appended before it are durable (P8). When the journal is poisoned the working
// state is thrown away and loaded again (D7). (4) Replaying the deltas of all events in order of
// `seq` gives the same records (P9).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "coordinator/state/effect.h"
#include "coordinator/state/event.h"
#include "coordinator/state/policy.h"
#include "coordinator/state/state.h"
#include "heddle/v1/records.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::state {

struct Outcome {
  // For the caller. Codes are the reaction (control-plane R3): NOT_FOUND no such thing,
  // FAILED_PRECONDITION wrong state, ABORTED stale version, fence or session, ALREADY_EXISTS the
  // request id was used for something else, INVALID_ARGUMENT never possible.
  Status status;
  // The job that the request made or changed (Submit's id; the first call's on a repeat).
  JobId job;
  // Reply to WorkerRegistered. `checkpoint_root` is filled by the caller.
  std::optional<heddle::v1::RegisterReply> registration;
  // Empty: nothing changed. Else consecutive `seq`, the first carries the whole delta: one batch.
  std::vector<heddle::v1::EventRecord> events;
  std::vector<Effect> effects;
};

// `state` must have every earlier outcome committed. Time::ms must not be below
// state.newest_ms().
Outcome Apply(const State& state, const Event& event, Time now, const Policy& policy = {});

}  // namespace heddle::state
