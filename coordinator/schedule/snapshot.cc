#include <algorithm>

#include "coordinator/schedule/constraint.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/names.h"

namespace heddle::schedule {

namespace v1 = heddle::v1;

namespace {

const char* WhyUnschedulable(const v1::WorkerRecord& worker, int64_t now_ms) {
  switch (worker.state()) {
    case v1::WORKER_STATE_SUSPECT:
      return "SUSPECT";
    case v1::WORKER_STATE_LOST:
      return "LOST";
    case v1::WORKER_STATE_LEFT:
      return "LEFT";
    default:
      break;
  }
  switch (worker.admin()) {
    case v1::WORKER_ADMIN_CORDONED:
      return "CORDONED";
    case v1::WORKER_ADMIN_DRAINING:
      return "DRAINING";
    case v1::WORKER_ADMIN_DRAINED:
      return "DRAINED";
    default:
      break;
  }
  if (worker.health() != v1::WORKER_HEALTH_OK) {
    return worker.health() == v1::WORKER_HEALTH_DEGRADED ? "DEGRADED" : "QUARANTINED";
  }
  return worker.probation_until_ms() > now_ms ? "PROBATION" : "UNVERIFIED";
}

void AddLabels(const v1::WorkerRecord& worker, std::map<std::string, std::string>& labels) {
  for (const std::string& label : worker.capacity().labels()) {
    const size_t equals = label.find('=');
    if (equals != std::string::npos) {
      labels[label.substr(0, equals)] = label.substr(equals + 1);
    }
  }
  labels["host"] = worker.host();
  labels["gpu.model"] = worker.capacity().gpu_model();
  labels["cpu.isa"] = worker.capacity().cpu_isa();
}

void AddRunning(const state::State& state, const state::NodeEntry& entry, NodeView& view) {
  for (const state::TaskKey& key : entry.booked) {
    const JobId job{std::get<0>(key)};
    const v1::AttemptRecord* attempt = state.attempt(job, std::get<1>(key));
    const int64_t until = attempt == nullptr ? 0 : attempt->run_deadline_ms();
    view.running.emplace_back(job, until);
  }
}

NodeView ViewOf(const state::State& state, const state::NodeEntry& entry, int64_t now_ms) {
  const v1::WorkerRecord& worker = *entry.record;
  NodeView view;
  view.id = worker.id();
  view.schedulable = state::IsSchedulable(worker, now_ms);
  view.unschedulable = view.schedulable ? "" : WhyUnschedulable(worker, now_ms);
  view.cpus = worker.capacity().cpus();
  view.memory = worker.capacity().memory_bytes();
  view.cpus_free = std::max(0.0, view.cpus - entry.cpus_used);
  view.memory_free = view.memory > entry.memory_used ? view.memory - entry.memory_used : 0;
  for (int32_t gpu = 0; gpu < static_cast<int32_t>(worker.capacity().gpus()); ++gpu) {
    view.gpus.push_back(gpu);
    if (!entry.gpus_used.contains(gpu)) {
      view.gpus_free.push_back(gpu);
    }
  }
  AddLabels(worker, view.labels);
  AddRunning(state, entry, view);
  return view;
}

// The first jobs of the queue, a fifth of `jobs_max`, and of each shape the first ones, at least
// kOfShapeMin.
void AddFirstOfEach(const state::State& state, size_t jobs_max, Snapshot& snapshot) {
  constexpr size_t kOfShapeMin = 16;
  const size_t each = std::max(kOfShapeMin, jobs_max / state.queue_by_shape().size());
  const state::QueueKey whole_until =
      std::next(state.queue().begin(), static_cast<ptrdiff_t>(jobs_max / 5))->first;
  std::vector<std::pair<state::QueueKey, state::JobPtr>> jobs;
  for (const auto& [shape, queue] : state.queue_by_shape()) {
    size_t taken = 0;
    for (auto at = queue.begin(); at != queue.end(); ++at, ++taken) {
      if (taken >= each && at->first > whole_until) {
        snapshot.cut_behind.insert(jobs.back().second->id());
        break;
      }
      jobs.emplace_back(at->first, at->second);
    }
  }
  std::sort(jobs.begin(), jobs.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [key, job] : jobs) {
    snapshot.queue.push_back(std::move(job));
  }
}

}  // namespace

Snapshot MakeSnapshot(const state::State& state, state::Time now, const PassLimits& limits) {
  Snapshot snapshot;
  snapshot.now_ms = now.ms;
  snapshot.revision = state.schedule_revision();
  for (const auto& [id, entry] : state.nodes()) {
    if (entry.record != nullptr && entry.record->state() != v1::WORKER_STATE_LEFT) {
      snapshot.nodes.push_back(ViewOf(state, entry, now.ms));
    }
  }
  if (state.queue().size() > limits.jobs_max) {
    AddFirstOfEach(state, limits.jobs_max, snapshot);
    return snapshot;
  }
  for (const auto& [key, job] : state.queue()) {
    snapshot.queue.push_back(job);
  }
  return snapshot;
}

Shape ShapeOf(const v1::RunConfig& config) {
  Shape shape;
  const v1::ParallelConfig& parallel = config.parallel();
  shape.ranks = state::RanksOf(config);
  shape.cpus = parallel.cpus_per_rank();
  shape.memory = static_cast<uint64_t>(std::max<int64_t>(0, parallel.memory_per_rank()));
  shape.gpus = static_cast<uint32_t>(std::max(0, parallel.gpus_per_rank()));
  shape.constraints.assign(config.schedule().constraints().begin(),
                           config.schedule().constraints().end());
  if (parallel.backend() == v1::ParallelConfig::BACKEND_MPI &&
      config.kind() == v1::RunConfig::KIND_TRAIN) {
    shape.constraints.push_back(kMpiConstraint);
  }
  return shape;
}

}  // namespace heddle::schedule
