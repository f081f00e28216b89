// One pass over the queue (control-plane S2, S4): jobs in order, placements of the pass see each
// other, a blocked gang keeps the nodes it would use from later ones so that it cannot starve.
#include <algorithm>
#include <set>

#include "coordinator/schedule/gang_placer.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/names.h"

namespace heddle::schedule {

namespace v1 = heddle::v1;

namespace {

constexpr size_t kReservationsMax = 32;  // blocked gangs that reserve (S5)
constexpr size_t kExplainedMax = 1000;   // S10

// S4: what failed for a shape fails again in this pass, as rooms only shrink in it.
std::string MemoKey(const v1::JobRecord& job) {
  const Shape shape = ShapeOf(job.config());
  std::string key = Str(shape.ranks, "|", shape.cpus, "|", shape.memory, "|", shape.gpus);
  for (const std::string& constraint : shape.constraints) {
    key += Str("|", constraint);
  }
  return key;
}

void Take(const Shape& shape, const Placement& placement, std::vector<NodeView>& nodes) {
  for (const state::event::PlacedTask& task : placement.tasks) {
    const auto node =
        std::lower_bound(nodes.begin(), nodes.end(), task.worker,
                         [](const NodeView& one, const std::string& id) { return one.id < id; });
    node->cpus_free -= shape.cpus * task.ranks;
    node->memory_free -= shape.memory * task.ranks;
    for (const int32_t gpu : task.gpu_indices) {
      std::erase(node->gpus_free, gpu);
    }
  }
}

WaitReason Plain(const char* code, std::string text) {
  WaitReason reason;
  reason.code = code;
  reason.text = std::move(text);
  reason.advice = state::AdviceFor(code, "");
  return reason;
}

}  // namespace

PassResult RunPass(Snapshot snapshot) {
  PassResult result;
  Reservations reserved;
  std::set<uint64_t> reserving;
  std::map<std::string, WaitReason> failed;
  for (const state::JobPtr& job : snapshot.queue) {
    ++result.considered;
    const std::string memo = MemoKey(*job);
    const auto known = failed.find(memo);
    if (known != failed.end()) {
      if (result.waiting.size() < kExplainedMax) {
        result.waiting[job->id()] = known->second;
      }
      continue;
    }
    Plan plan = PlanPlacement(snapshot, *job, snapshot.now_ms, reserved);
    if (const Placement* placement = std::get_if<Placement>(&plan)) {
      Take(ShapeOf(job->config()), *placement, snapshot.nodes);
      result.placed.push_back({JobId{job->id()}, job->version(), placement->tasks});
      continue;
    }
    const WaitReason& reason = std::get<WaitReason>(plan);
    if (reason.code == "INFEASIBLE") {
      result.infeasible.push_back({JobId{job->id()}, job->version(), reason.text});
    } else if (reason.code != "NO_NODES_MATCH" && reserving.size() < kReservationsMax) {
      for (const std::string& node : NodesToReserve(snapshot, *job, reserved)) {
        reserved[node] = JobId{job->id()};
      }
      reserving.insert(job->id());
    }
    if (result.waiting.size() < kExplainedMax) {
      result.waiting[job->id()] = reason;
    }
    failed[memo] = reason;
  }
  return result;
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
