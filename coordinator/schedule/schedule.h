// Gang placement as a pure function of a snapshot (control-plane P7, section 5): all ranks or none.
// The state thread applies a decision only if the job has not changed and the nodes still have the
// room (S1), else drops it. Today: order by tier, priority, boost and submit; best
// fit; blocked gangs reserve the nodes they would use. Fair share, backfill by time, preemption and
// topology widen this through the same interface.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/ids/ids.h"
#include "coordinator/state/event.h"
#include "coordinator/state/state.h"
#include "heddle/v1/records.pb.h"

namespace heddle::schedule {

// One node as the pass sees it: capacity and what is free, frozen.
struct NodeView {
  std::string id;
  bool schedulable = false;        // CONNECTED, OPEN, OK
  const char* unschedulable = "";  // else why: SUSPECT, LOST, CORDONED, DRAINING, QUARANTINED ...
  double cpus = 0;
  uint64_t memory = 0;
  std::vector<int32_t> gpus;  // all indices
  double cpus_free = 0;
  uint64_t memory_free = 0;
  std::vector<int32_t> gpus_free;
  std::map<std::string, std::string> labels;  // with host, gpu.model, cpu.isa
  // Jobs on the node with the time they must end by (time limit); 0 if open.
  std::vector<std::pair<JobId, int64_t>> running;
};

// Immutable input of a pass. Cheap: records are shared with the state.
struct Snapshot {
  int64_t now_ms = 0;
  uint64_t revision = 0;             // State::schedule_revision()
  std::vector<NodeView> nodes;       // by id
  std::vector<state::JobPtr> queue;  // in order (S2)
  // Jobs of the queue behind which others of their shape stand that are not in it.
  std::set<uint64_t> cut_behind;
};
// What a pass is to look at and do at most, so that its time does not grow with the queue. Jobs
// that are left out are those that would fare as an earlier one of their shape.
struct PassLimits {
  size_t jobs_max = std::numeric_limits<size_t>::max();  // about so many, of all shapes
  size_t placed_max = std::numeric_limits<size_t>::max();
  bool explain = true;  // fill PassResult::waiting
};
// Of passes that come one after the other.
inline constexpr PassLimits kOneOfMany = {
    .jobs_max = 10'000, .placed_max = 1'000, .explain = false};

Snapshot MakeSnapshot(const state::State& state, state::Time now, const PassLimits& limits = {});

// What one rank needs and how many ranks there are.
struct Shape {
  uint32_t ranks = 1;
  double cpus = 1;
  uint64_t memory = 0;
  uint32_t gpus = 0;
  std::vector<std::string> constraints;
  bool operator==(const Shape&) const = default;
};
Shape ShapeOf(const heddle::v1::RunConfig& config);

struct Placement {
  std::vector<state::event::PlacedTask> tasks;
};

// Why a job does not start now (S10). `code` is one of base/causes.def: INFEASIBLE NO_NODES_MATCH
// FRAGMENTED WAIT_RESOURCES WAIT_RESERVATION, or what `Explain` adds for jobs that do not queue.
struct WaitReason {
  std::string code;
  std::string text;    // one sentence with counts
  int64_t eta_ms = 0;  // Time::ms of the expected start; 0: unknown
  // Nodes left after each constraint: nodes, schedulable, constraint, resources, reservation, fit.
  std::vector<std::pair<std::string, uint32_t>> funnel;
  std::vector<JobId> blocking;  // jobs that hold what it waits for
  std::string advice;
};

using Plan = std::variant<Placement, WaitReason>;

// Nodes promised to earlier jobs of the pass, by node id -> job.
using Reservations = std::map<std::string, JobId>;

// Places one job on the snapshot, or says why not. Does not change the snapshot.
Plan PlanPlacement(const Snapshot& snapshot, const heddle::v1::JobRecord& job, int64_t now_ms,
                   const Reservations& reserved = {});

struct PassResult {
  std::vector<state::event::AttemptPlaced> placed;
  std::vector<state::event::JobInfeasible> infeasible;  // can never fit: J22 if the policy says so
  std::map<uint64_t, WaitReason> waiting;               // first 1,000 queued jobs that stay
  uint32_t considered = 0;
  bool cut = false;  // it ended at a limit; another may place more at once
};
// One whole pass over the queue; placements of it see each other. `limits` are the snapshot's.
PassResult RunPass(Snapshot snapshot, const PassLimits& limits = {});

// Full explanation for `heddle why`: any job in any state, with the queue before it (S10).
WaitReason Explain(const state::State& state, JobId job, state::Time now);
// The same for a job that does not exist yet (`plan`, submit --dry-run): Placement if it would
// start now.
Plan PlanConfig(const state::State& state, const heddle::v1::RunConfig& config, state::Time now);

}  // namespace heddle::schedule
