// Places one gang: all ranks or none (control-plane S3). Nodes that pass are taken so that the gang
// touches as few as possible and leaves the largest holes whole: the smallest single node that
// holds all of it, else the roomiest nodes first and the tightest that fits for the rest.
#include "coordinator/schedule/gang_placer.h"

#include <algorithm>
#include <set>

#include "base/units/units.h"
#include "coordinator/schedule/constraint.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/causes.h"

namespace heddle::schedule {

namespace v1 = heddle::v1;

namespace {

constexpr uint32_t kManySlots = 1u << 20;

uint32_t Slots(const Shape& shape, double cpus, uint64_t memory, size_t gpus) {
  uint64_t slots = kManySlots;
  if (shape.cpus > 0) {
    slots = std::min<uint64_t>(slots, static_cast<uint64_t>(cpus / shape.cpus + 1e-9));
  }
  if (shape.memory > 0) {
    slots = std::min<uint64_t>(slots, memory / shape.memory);
  }
  if (shape.gpus > 0) {
    slots = std::min<uint64_t>(slots, gpus / shape.gpus);
  }
  return static_cast<uint32_t>(slots);
}

struct Candidate {
  const NodeView* node = nullptr;
  uint32_t slots = 0;
};

// Chooses nodes for `ranks`; empty if they do not suffice.
std::vector<Candidate> Choose(std::vector<Candidate> candidates, uint32_t ranks) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.slots != b.slots ? a.slots > b.slots : a.node->id < b.node->id;
  });
  std::vector<Candidate> chosen;
  size_t next = 0;
  while (ranks > 0 && next < candidates.size() && candidates[next].slots > 0) {
    // The tightest of those that hold all the rest ends the search.
    if (candidates[next].slots >= ranks) {
      size_t tightest = next;
      for (size_t i = next; i < candidates.size() && candidates[i].slots >= ranks; ++i) {
        if (candidates[i].slots < candidates[tightest].slots) {
          tightest = i;
        }
      }
      chosen.push_back({candidates[tightest].node, ranks});
      return chosen;
    }
    ranks -= candidates[next].slots;
    chosen.push_back(candidates[next]);
    ++next;
  }
  return ranks == 0 ? chosen : std::vector<Candidate>();
}

Placement ToPlacement(const Shape& shape, const std::vector<Candidate>& chosen) {
  Placement placement;
  uint32_t rank = 0;
  for (const Candidate& one : chosen) {
    state::event::PlacedTask& task = placement.tasks.emplace_back();
    task.worker = one.node->id;
    task.first_rank = rank;
    task.ranks = one.slots;
    const size_t gpus = static_cast<size_t>(shape.gpus) * one.slots;
    task.gpu_indices.assign(one.node->gpus_free.begin(),
                            one.node->gpus_free.begin() + static_cast<ptrdiff_t>(gpus));
    rank += one.slots;
  }
  return placement;
}

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
  std::vector<Candidate> candidates;
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
  if (slots > 0) {
    ++funnel.free;
    funnel.candidates.push_back({&node, slots});
  }
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

void SetCode(const Shape& shape, const Funnel& funnel, WaitReason& reason) {
  if (funnel.nodes > 0 && funnel.slots_ever < shape.ranks) {
    reason.code = "INFEASIBLE";
    reason.text = Str("needs ", Describe(shape), "; all ", funnel.matching, " matching of ",
                      funnel.nodes, " nodes together hold ", funnel.slots_ever);
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

Plan PlanPlacement(const Snapshot& snapshot, const v1::JobRecord& job, int64_t now_ms,
                   const Reservations& reserved) {
  const Shape shape = ShapeOf(job.config());
  Funnel funnel;
  for (const NodeView& node : snapshot.nodes) {
    const auto promised = reserved.find(node.id);
    Count(shape, node, promised != reserved.end() && promised->second.value != job.id(), funnel);
  }
  // The node blamed for the last failure is avoided while others do; it is better than waiting.
  if (!job.avoid_node().empty() && job.avoid_until_ms() > now_ms) {
    std::vector<Candidate> others;
    std::copy_if(funnel.candidates.begin(), funnel.candidates.end(), std::back_inserter(others),
                 [&job](const Candidate& one) { return one.node->id != job.avoid_node(); });
    const std::vector<Candidate> chosen = Choose(std::move(others), shape.ranks);
    if (!chosen.empty()) {
      return ToPlacement(shape, chosen);
    }
  }
  const std::vector<Candidate> chosen = Choose(funnel.candidates, shape.ranks);
  if (!chosen.empty()) {
    return ToPlacement(shape, chosen);
  }
  return ToReason(shape, funnel);
}

std::vector<std::string> NodesToReserve(const Snapshot& snapshot, const v1::JobRecord& job,
                                        const Reservations& reserved) {
  const Shape shape = ShapeOf(job.config());
  std::vector<Candidate> candidates;
  for (const NodeView& node : snapshot.nodes) {
    const uint32_t slots = Slots(shape, node.cpus, node.memory, node.gpus.size());
    if (node.schedulable && slots > 0 && !reserved.contains(node.id) &&
        MatchesAll(shape.constraints, node.labels)) {
      candidates.push_back({&node, slots});
    }
  }
  // Nodes with more room now come first: they are ready soonest, and the choice stays the same from
  // pass to pass while jobs end.
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&shape](const Candidate& a, const Candidate& b) {
                     const auto now = [&shape](const NodeView& n) {
                       return Slots(shape, n.cpus_free, n.memory_free, n.gpus_free.size());
                     };
                     return now(*a.node) > now(*b.node);
                   });
  std::vector<std::string> chosen;
  uint64_t slots = 0;
  for (const Candidate& one : candidates) {
    if (slots >= shape.ranks) {
      break;
    }
    slots += one.slots;
    chosen.push_back(one.node->id);
  }
  return slots >= shape.ranks ? chosen : std::vector<std::string>();
}

}  // namespace heddle::schedule
