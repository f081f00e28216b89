// Beside PlanPlacement: the parts of it that a pass uses. Internal to coordinator/schedule.
#pragma once

#include <string>
#include <vector>

#include "coordinator/schedule/free_room.h"
#include "coordinator/schedule/schedule.h"

namespace heddle::schedule {

Placement ToPlacement(const Shape& shape, const std::vector<NodeView>& nodes,
                      const std::vector<ChosenNode>& chosen);

// Nodes for the gang. The node blamed for the job's last failure is avoided while others do; it is
// better than waiting. Empty: they do not suffice.
std::vector<ChosenNode> ChooseFor(const heddle::v1::JobRecord& job, const Shape& shape,
                                  const std::vector<NodeView>& nodes, const ShapeRoom& room,
                                  int64_t now_ms);

// Why a gang of this shape has to wait, with counts of every node.
WaitReason WhyNot(const Shape& shape, const std::vector<NodeView>& nodes, JobId job,
                  const Reservations& reserved);
// "needs ...; all N matching of M nodes together hold S".
std::string InfeasibleText(const Shape& shape, uint32_t matching, size_t nodes, uint64_t slots);

}  // namespace heddle::schedule
