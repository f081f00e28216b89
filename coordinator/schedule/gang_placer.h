// Beside PlanPlacement: what a blocked gang keeps for itself. Internal to coordinator/schedule.
#pragma once

#include <string>
#include <vector>

#include "coordinator/schedule/schedule.h"

namespace heddle::schedule {

// Nodes, not promised to others yet, that would hold the whole gang if they were empty; those with
// most room now first. Empty if they do not suffice.
std::vector<std::string> NodesToReserve(const Snapshot& snapshot, const heddle::v1::JobRecord& job,
                                        const Reservations& reserved);

}  // namespace heddle::schedule
