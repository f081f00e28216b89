// One pass over the queue (control-plane S2, S4): jobs in order, placements of the pass see each
// other, a blocked gang keeps the nodes it would use from later ones so that it cannot starve.
#include <algorithm>
#include <functional>
#include <unordered_map>

#include "coordinator/schedule/free_room.h"
#include "coordinator/schedule/gang_placer.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/names.h"

namespace heddle::schedule {

namespace v1 = heddle::v1;

namespace {

constexpr size_t kReservationsMax = 32;  // blocked gangs that reserve (S5)
constexpr size_t kExplainedMax = 1000;   // S10

constexpr size_t kRoomsKept = 256;  // of shapes: each has a number for every node

struct ShapeHash {
  size_t operator()(const Shape& shape) const {
    size_t hash = std::hash<uint64_t>()(shape.memory);
    const auto mix = [&hash](size_t value) { hash = hash * 1'000'003 + value; };
    mix(shape.ranks);
    mix(std::hash<double>()(shape.cpus));
    mix(shape.gpus);
    for (const std::string& constraint : shape.constraints) {
      mix(std::hash<std::string>()(constraint));
    }
    return hash;
  }
};

// S4: what failed for a shape fails again in this pass, as rooms only shrink in it.
struct ShapeSeen {
  bool failed = false;
  WaitReason reason;  // if it failed and is to be explained
  std::optional<ShapeRoom> room;
};

class Pass {
 public:
  Pass(Snapshot snapshot, const PassLimits& limits)
      : snapshot_(std::move(snapshot)), limits_(limits), free_(&snapshot_.nodes) {}

  PassResult Run() {
    for (const state::JobPtr& job : snapshot_.queue) {
      ++result_.considered;
      const Shape shape = ShapeOf(job->config());
      ShapeSeen& seen = shapes_[shape];
      if (!seen.failed && !Place(*job, shape, seen)) {
        Refuse(*job, shape, seen);
      }
      if (seen.failed) {
        Explain(*job, seen);
      } else if (result_.placed.size() >= limits_.placed_max ||
                 snapshot_.cut_behind.contains(job->id())) {
        // What comes next of this shape is not here, and may come before all others.
        result_.cut = true;
        break;
      }
    }
    return std::move(result_);
  }

 private:
  bool Place(const v1::JobRecord& job, const Shape& shape, ShapeSeen& seen) {
    if (!seen.room.has_value()) {
      MakeRoom();
      seen.room = free_.Look(shape);
      rooms_.push_back(&seen);
    } else {
      free_.Refresh(shape, &*seen.room);
    }
    const std::vector<ChosenNode> chosen =
        ChooseFor(job, shape, snapshot_.nodes, *seen.room, snapshot_.now_ms);
    if (chosen.empty()) {
      return false;
    }
    Placement placement = ToPlacement(shape, snapshot_.nodes, chosen);
    free_.Take(shape, chosen);
    result_.placed.push_back({JobId{job.id()}, job.version(), std::move(placement.tasks)});
    return true;
  }

  void Refuse(const v1::JobRecord& job, const Shape& shape, ShapeSeen& seen) {
    const ShapeRoom room = *std::move(seen.room);
    seen.room.reset();
    std::erase(rooms_, &seen);
    seen.failed = true;
    if (limits_.explain) {
      seen.reason = WhyNot(shape, snapshot_.nodes, JobId{job.id()}, reserved_);
    }
    if (!snapshot_.nodes.empty() && room.slots_ever < shape.ranks) {
      result_.infeasible.push_back(
          {JobId{job.id()}, job.version(),
           InfeasibleText(shape, room.matching, snapshot_.nodes.size(), room.slots_ever)});
    } else if (room.slots_up >= shape.ranks && reserving_ < kReservationsMax) {
      for (const uint32_t node : free_.NodesToReserve(shape, room)) {
        free_.Reserve(node);
        reserved_[snapshot_.nodes[node].id] = JobId{job.id()};
      }
      ++reserving_;
    }
  }

  void Explain(const v1::JobRecord& job, const ShapeSeen& seen) {
    if (limits_.explain && result_.waiting.size() < kExplainedMax) {
      result_.waiting[job.id()] = seen.reason;
    }
  }

  // Queues of very many shapes would keep a number for each of them and every node.
  void MakeRoom() {
    if (rooms_.size() < kRoomsKept) {
      return;
    }
    for (ShapeSeen* seen : rooms_) {
      seen->room.reset();
    }
    rooms_.clear();
  }

  Snapshot snapshot_;
  const PassLimits limits_;
  FreeRoom free_;
  Reservations reserved_;
  size_t reserving_ = 0;  // blocked gangs
  std::unordered_map<Shape, ShapeSeen, ShapeHash> shapes_;
  std::vector<ShapeSeen*> rooms_;  // that have one
  PassResult result_;
};

WaitReason Plain(const char* code, std::string text) {
  WaitReason reason;
  reason.code = code;
  reason.text = std::move(text);
  reason.advice = state::AdviceFor(code, "");
  return reason;
}

}  // namespace

PassResult RunPass(Snapshot snapshot, const PassLimits& limits) {
  return Pass(std::move(snapshot), limits).Run();
}

namespace {

WaitReason ExplainDependencies(const v1::JobRecord& job, state::Time now) {
  if (job.start_at() > now.wall_ms) {
    WaitReason reason = Plain("START_TIME", "waits for its start time");
    reason.eta_ms = now.ms + (job.start_at() - now.wall_ms);
    return reason;
  }
  WaitReason reason = Plain("DEPENDENCY", "waits for other jobs");
  for (const v1::DependencyRecord& one : job.after()) {
    reason.blocking.push_back(JobId{one.job()});
  }
  return reason;
}

WaitReason ExplainQueued(const state::State& state, JobId id, state::Time now) {
  Snapshot snapshot = MakeSnapshot(state, now);
  // Only what stands before the job matters for it.
  const auto at = std::find_if(snapshot.queue.begin(), snapshot.queue.end(),
                               [id](const state::JobPtr& one) { return one->id() == id.value; });
  const auto position = static_cast<uint32_t>(at - snapshot.queue.begin());
  if (at != snapshot.queue.end()) {
    snapshot.queue.erase(at + 1, snapshot.queue.end());
  }
  PassResult pass = RunPass(std::move(snapshot));
  const auto found = pass.waiting.find(id.value);
  if (found == pass.waiting.end()) {
    return Plain("NOT_YET_EVALUATED", Str("fits now; ", position, " jobs are before it"));
  }
  return found->second;
}

}  // namespace

WaitReason Explain(const state::State& state, JobId id, state::Time now) {
  const v1::JobRecord* job = state.job(id);
  if (job == nullptr) {
    return Plain("", Str("no job ", id));
  }
  switch (job->state()) {
    case v1::JOB_STATE_HELD:
      return Plain("HELD", Str("held", job->text().empty() ? "" : ": ", job->text()));
    case v1::JOB_STATE_PAUSED:
      return Plain("PAUSED", Str("paused", job->text().empty() ? "" : ": ", job->text()));
    case v1::JOB_STATE_WAITING:
      return ExplainDependencies(*job, now);
    case v1::JOB_STATE_QUEUED:
      return ExplainQueued(state, id, now);
    case v1::JOB_STATE_BACKOFF: {
      WaitReason reason = Plain(
          "BACKOFF", Str("after ", job->last_failure().code(), ": ", job->last_failure().detail()));
      reason.eta_ms = job->backoff_until_ms();
      return reason;
    }
    case v1::JOB_STATE_DONE:
      return Plain(job->reason().c_str(), Str("done: ", state::Name(job->result()),
                                              job->text().empty() ? "" : ": ", job->text()));
    default: {
      const v1::AttemptRecord* attempt = state.attempt(id, job->attempts());
      return Plain(job->reason().c_str(),
                   Str("not waiting: attempt ", job->attempts(), " is ",
                       attempt == nullptr ? std::string("?") : state::Name(attempt->state())));
    }
  }
}

Plan PlanConfig(const state::State& state, const v1::RunConfig& config, state::Time now) {
  Snapshot snapshot = MakeSnapshot(state, now);
  auto job = std::make_shared<v1::JobRecord>();
  *job->mutable_config() = config;
  // Behind all queued jobs of its own tier and above.
  const int tier = config.schedule().priority() / 20;
  std::erase_if(snapshot.queue, [tier](const state::JobPtr& one) {
    return one->config().schedule().priority() / 20 < tier;
  });
  snapshot.queue.push_back(job);
  PassResult pass = RunPass(std::move(snapshot));
  if (!pass.placed.empty() && pass.placed.back().job.value == 0) {
    return Placement{pass.placed.back().tasks};
  }
  const auto found = pass.waiting.find(0);
  return found == pass.waiting.end() ? Plain("NOT_YET_EVALUATED", "1,000 jobs wait before it")
                                     : found->second;
}

}  // namespace heddle::schedule
