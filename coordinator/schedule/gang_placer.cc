// Places one gang: all ranks or none (control-plane S3). Nodes that pass are taken so that the gang
// touches as few as possible and leaves the largest holes whole: the smallest single node that
// holds all of it, else the roomiest nodes first and the tightest that fits for the rest.
#include "coordinator/schedule/gang_placer.h"

#include <algorithm>
#include <set>

#include "base/units/units.h"
#include "coordinator/schedule/constraint.h"
#include "coordinator/state/causes.h"

namespace heddle::schedule {

namespace v1 = heddle::v1;

namespace {

// How many nodes and slots are left after each question.
struct Funnel {
  uint32_t nodes = 0;
  uint32_t matching = 0;      // constraints
  uint32_t schedulable = 0;   // of those
  uint32_t large_enough = 0;  // hold a rank when empty
  uint32_t unreserved = 0;
  uint32_t free = 0;        // hold a rank now
  uint64_t slots_ever = 0;  // all matching nodes, empty
  uint64_t slots_up = 0;    // schedulable ones, empty
  uint64_t slots_free = 0;
  uint64_t slots_reserved = 0;  // free, but promised to others
  double cpus_free = 0;
  uint64_t memory_free = 0;
  size_t gpus_free = 0;
  std::map<std::string, uint32_t> unschedulable;
  std::set<uint64_t> blocking;
  int64_t last_end_ms = 0;
  bool open_end = false;
};

void Count(const Shape& shape, const NodeView& node, bool is_reserved, Funnel& funnel) {
  ++funnel.nodes;
  if (!MatchesAll(shape.constraints, node.labels)) {
    return;
  }
  ++funnel.matching;
  const uint32_t empty = Slots(shape, node.cpus, node.memory, node.gpus.size());
  funnel.slots_ever += empty;
  if (!node.schedulable) {
    ++funnel.unschedulable[node.unschedulable];
    return;
  }
  ++funnel.schedulable;
  funnel.slots_up += empty;
  funnel.large_enough += empty > 0 ? 1 : 0;
  const uint32_t slots = Slots(shape, node.cpus_free, node.memory_free, node.gpus_free.size());
  if (slots < empty) {
    for (const auto& [job, until] : node.running) {
      funnel.blocking.insert(job.value);
      funnel.open_end = funnel.open_end || until == 0;
      funnel.last_end_ms = std::max(funnel.last_end_ms, until);
    }
  }
  if (is_reserved) {
    funnel.slots_reserved += slots;
    return;
  }
  ++funnel.unreserved;
  funnel.cpus_free += node.cpus_free;
  funnel.memory_free += node.memory_free;
  funnel.gpus_free += node.gpus_free.size();
  funnel.slots_free += slots;
  funnel.free += slots > 0 ? 1 : 0;
}

std::string Describe(const Shape& shape) {
  std::string text =
      Str(shape.ranks, shape.ranks == 1 ? " rank of " : " ranks of ", shape.cpus, " cpus");
  if (shape.memory > 0) {
    text += Str(", ", FormatBytes(shape.memory), " memory");
  }
  if (shape.gpus > 0) {
    text += Str(", ", shape.gpus, " gpus");
  }
  for (const std::string& constraint : shape.constraints) {
    text += Str(", ", constraint == kMpiConstraint ? "OpenMPI (label mpi=openmpi)" : constraint);
  }
  return text;
}

std::string Unschedulable(const Funnel& funnel) {
  std::string text;
  for (const auto& [why, count] : funnel.unschedulable) {
    text += Str(text.empty() ? "" : ", ", count, " ", why);
  }
  return text;
}

}  // namespace

std::string InfeasibleText(const Shape& shape, uint32_t matching, size_t nodes, uint64_t slots) {
  return Str("needs ", Describe(shape), "; all ", matching, " matching of ", nodes,
             " nodes together hold ", slots);
}

namespace {

void SetCode(const Shape& shape, const Funnel& funnel, WaitReason& reason) {
  if (funnel.nodes > 0 && funnel.slots_ever < shape.ranks) {
    reason.code = "INFEASIBLE";
    reason.text = InfeasibleText(shape, funnel.matching, funnel.nodes, funnel.slots_ever);
  } else if (funnel.slots_up < shape.ranks) {
    reason.code = "NO_NODES_MATCH";
    reason.text = funnel.nodes == 0 ? "no node has joined yet"
                                    : Str("needs ", Describe(shape), "; the ", funnel.schedulable,
                                          " nodes that take work hold ", funnel.slots_up, " (",
                                          Unschedulable(funnel), ")");
  } else if (funnel.slots_free + funnel.slots_reserved >= shape.ranks) {
    reason.code = "WAIT_RESERVATION";
    reason.text = Str("needs ", Describe(shape), "; ", funnel.slots_free,
                      " fit now, more are kept for earlier jobs");
  } else if (Slots(shape, funnel.cpus_free, funnel.memory_free, funnel.gpus_free) >= shape.ranks) {
    reason.code = "FRAGMENTED";
    reason.text = Str("needs ", Describe(shape), "; free resources would do, but on single nodes ",
                      "only ", funnel.slots_free, " fit");
  } else {
    reason.code = "WAIT_RESOURCES";
    reason.text = Str("needs ", Describe(shape), "; ", funnel.slots_free, " fit now, ",
                      funnel.blocking.size(), " jobs hold the rest");
  }
}

WaitReason ToReason(const Shape& shape, const Funnel& funnel) {
  WaitReason reason;
  SetCode(shape, funnel, reason);
  reason.advice = state::AdviceFor(reason.code, "");
  reason.funnel = {{"nodes", funnel.nodes},
                   {"constraint", funnel.matching},
                   {"schedulable", funnel.schedulable},
                   {"resources", funnel.large_enough},
                   {"reservation", funnel.unreserved},
                   {"fit", funnel.free}};
  for (const uint64_t job : funnel.blocking) {
    if (reason.blocking.size() < 16) {
      reason.blocking.push_back(JobId{job});
    }
  }
  if (!funnel.open_end && funnel.last_end_ms > 0 &&
      (reason.code == "WAIT_RESOURCES" || reason.code == "FRAGMENTED")) {
    reason.eta_ms = funnel.last_end_ms;
  }
  return reason;
}

}  // namespace

Placement ToPlacement(const Shape& shape, const std::vector<NodeView>& nodes,
                      const std::vector<ChosenNode>& chosen) {
  Placement placement;
  uint32_t rank = 0;
  for (const ChosenNode& one : chosen) {
    const NodeView& node = nodes[one.node];
    state::event::PlacedTask& task = placement.tasks.emplace_back();
    task.worker = node.id;
    task.first_rank = rank;
    task.ranks = one.ranks;
    const size_t gpus = static_cast<size_t>(shape.gpus) * one.ranks;
    task.gpu_indices.assign(node.gpus_free.begin(),
                            node.gpus_free.begin() + static_cast<ptrdiff_t>(gpus));
    rank += one.ranks;
  }
  return placement;
}

std::vector<ChosenNode> ChooseFor(const v1::JobRecord& job, const Shape& shape,
                                  const std::vector<NodeView>& nodes, const ShapeRoom& room,
                                  int64_t now_ms) {
  if (!job.avoid_node().empty() && job.avoid_until_ms() > now_ms) {
    const auto avoided =
        std::lower_bound(nodes.begin(), nodes.end(), job.avoid_node(),
                         [](const NodeView& one, const std::string& id) { return one.id < id; });
    std::vector<ChosenNode> chosen =
        Choose(room.slots, shape.ranks, static_cast<uint32_t>(avoided - nodes.begin()));
    if (!chosen.empty()) {
      return chosen;
    }
  }
  return Choose(room.slots, shape.ranks);
}

WaitReason WhyNot(const Shape& shape, const std::vector<NodeView>& nodes, JobId job,
                  const Reservations& reserved) {
  Funnel funnel;
  for (const NodeView& node : nodes) {
    const auto promised = reserved.find(node.id);
    Count(shape, node, promised != reserved.end() && promised->second != job, funnel);
  }
  return ToReason(shape, funnel);
}

Plan PlanPlacement(const Snapshot& snapshot, const v1::JobRecord& job, int64_t now_ms,
                   const Reservations& reserved) {
  const Shape shape = ShapeOf(job.config());
  std::vector<NodeView> nodes = snapshot.nodes;
  FreeRoom free(&nodes);
  for (uint32_t node = 0; node < nodes.size(); ++node) {
    const auto promised = reserved.find(nodes[node].id);
    if (promised != reserved.end() && promised->second.value != job.id()) {
      free.Reserve(node);
    }
  }
  const std::vector<ChosenNode> chosen = ChooseFor(job, shape, nodes, free.Look(shape), now_ms);
  if (!chosen.empty()) {
    return ToPlacement(shape, nodes, chosen);
  }
  return WhyNot(shape, nodes, JobId{job.id()}, reserved);
}

}  // namespace heddle::schedule
