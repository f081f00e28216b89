// Invariants I1 to I8 of control-plane section 6 as far as records show them, and the bookkeeping
// they rest on. Called in release at recovery (D10: a breach stops the start with a dump) and by
// the simulator after every step.
#pragma once

#include <string>
#include <vector>

#include "coordinator/state/state.h"

namespace heddle::state {

// Every breach as a sentence that names the rule; empty: all hold. O(records).
std::vector<std::string> CheckInvariants(const State& state);

// What must hold between two successive states of one history: I1 commit order, I6 DONE stays, I7
// fences and terms rise, final tasks stay final, the current fence never falls. O(changes): looks
// only at the records that `event` changed. Empty: all hold.
std::vector<std::string> CheckStep(const State& before, const heddle::v1::EventRecord& event);

}  // namespace heddle::state
