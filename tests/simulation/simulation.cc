#include "tests/simulation/simulation.h"

#include <map>
#include <memory>

#include "tests/simulation/checkers.h"
#include "tests/simulation/coordinator_node.h"
#include "tests/simulation/gang.h"
#include "tests/simulation/network.h"
#include "tests/simulation/users.h"
#include "tests/simulation/worker_node.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

namespace v1 = heddle::v1;

namespace {

// After the end of faults no message that was sent before arrives later than this.
constexpr int64_t kLateMs = 40'000;

class Simulation {
 public:
  Simulation(uint64_t seed, Mutant mutant, const std::function<void(const std::string&)>& log)
      : world_(seed),
        plan_(DrawPlan(world_, seed, mutant)),
        network_(world_, plan_),
        checkers_(world_, plan_),
        coordinator_(world_, plan_, network_, checkers_),
        users_(world_, plan_, network_, checkers_, coordinator_) {
    if (log) {
      world_.SetLog(log);
    }
  }

  Result Run();

 private:
  void Wire();
  void PlanFaults();
  // Calls `fault` again and again, `mean_ms` apart on average, until faults stop.
  void Repeat(int64_t mean_ms, std::function<void()> fault);
  void CrashCoordinator();
  void Isolate();
  void Partition();
  WorkerNode& SomeWorker();
  void Calm();
  bool Settled();

  World world_;
  const Plan plan_;
  Network network_;
  Checkers checkers_;
  CoordinatorNode coordinator_;
  Users users_;
  std::map<std::string, std::unique_ptr<WorkerNode>> workers_;
  std::vector<std::string> names_;
  std::map<uint64_t, std::unique_ptr<Gang>> gangs_;
  bool calm_ = false;
};

void Simulation::Wire() {
  for (int i = 0; i < plan_.workers; ++i) {
    const std::string id = Str("worker-", i);
    names_.push_back(id);
    auto worker =
        std::make_unique<WorkerNode>(world_, plan_, network_, checkers_, coordinator_, id);
    worker->SetGangs([this](const v1::TaskAssignment& assign) -> Gang& {
      std::unique_ptr<Gang>& gang = gangs_[assign.fence()];
      if (gang == nullptr) {
        gang = std::make_unique<Gang>(world_, plan_, checkers_, assign);
      }
      return *gang;
    });
    workers_[id] = std::move(worker);
  }
  coordinator_.SetDeliver([this](const StreamPtr& stream, const state::Effect& effect) {
    network_.SendOn(stream, false, [this, stream, effect] {
      workers_.at(stream->worker)->OnEffect(stream, effect);
    });
  });
  coordinator_.SetHeartbeatReply(
      [this](const StreamPtr& stream, uint64_t n, const std::vector<v1::Permit>& permits) {
        network_.SendOn(stream, false, [this, stream, n, permits, sent = world_.now_ms()] {
          workers_.at(stream->worker)->OnHeartbeatReply(stream, n, permits, sent);
        });
      });
}

WorkerNode& Simulation::SomeWorker() {
  return *workers_.at(
      names_[static_cast<size_t>(world_.Between(0, static_cast<int64_t>(names_.size()) - 1))]);
}

void Simulation::Repeat(int64_t mean_ms, std::function<void()> fault) {
  if (mean_ms == 0) {
    return;
  }
  world_.After(world_.Between(1, 2 * mean_ms), [this, mean_ms, fault = std::move(fault)] {
    if (!calm_) {
      fault();
      Repeat(mean_ms, fault);
    }
  });
}

void Simulation::CrashCoordinator() {
  if (!coordinator_.up()) {
    return;
  }
  coordinator_.Crash();
  const int64_t down = world_.Chance(0.8) || plan_.coordinator_only ? world_.Between(10, 5'000)
                                                                    : world_.Between(5'000, 60'000);
  world_.After(down, [this] {
    if (!coordinator_.up()) coordinator_.Boot();
  });
}

void Simulation::Isolate() {
  const int64_t length =
      plan_.coordinator_only ? world_.Between(1'000, 50'000) : world_.Between(1'000, 90'000);
  for (const std::string& worker : names_) {
    network_.Block(worker, kCoordinator);
    network_.Block(kCoordinator, worker);
  }
  world_.Trace("coordinator isolated");
  world_.After(length, [this] {
    for (const std::string& worker : names_) {
      network_.Unblock(worker, kCoordinator);
      network_.Unblock(kCoordinator, worker);
    }
    world_.Trace("coordinator joined");
  });
}

void Simulation::Partition() {
  const std::string worker = SomeWorker().id();
  const int64_t kind = world_.Between(0, 2);
  world_.Trace(Str("partition ", worker, " ", kind));
  if (kind != 1) network_.Block(worker, kCoordinator);
  if (kind != 2) network_.Block(kCoordinator, worker);
  const int64_t length = world_.Chance(0.7)
                             ? world_.Between(500, 40'000)
                             : world_.Between(20'000, 2 * plan_.policy.max_orphan_ms);
  world_.After(length, [this, worker, kind] {
    if (kind != 1) network_.Unblock(worker, kCoordinator);
    if (kind != 2) network_.Unblock(kCoordinator, worker);
    world_.Trace(Str("healed ", worker));
  });
}

void Simulation::PlanFaults() {
  Repeat(plan_.coordinator_crash_ms, [this] { CrashCoordinator(); });
  Repeat(plan_.isolate_ms, [this] { Isolate(); });
  Repeat(plan_.partition_ms, [this] { Partition(); });
  Repeat(plan_.daemon_crash_ms, [this] {
    WorkerNode& worker = SomeWorker();
    worker.CrashDaemon();
    world_.After(world_.Between(50, 20'000), [&worker] { worker.StartDaemon(); });
  });
  Repeat(plan_.daemon_pause_ms, [this] {
    SomeWorker().PauseDaemon(world_.Chance(0.5) ? world_.Between(100, 60'000)
                                                : world_.Between(24'000, 32'000));
  });
  Repeat(plan_.reboot_ms, [this] {
    WorkerNode& worker = SomeWorker();
    worker.Reboot();
    world_.After(world_.Between(2'000, 60'000), [&worker] { worker.StartDaemon(); });
  });
  Repeat(plan_.rank_death_ms, [this] { SomeWorker().KillSomeRank(); });
  Repeat(plan_.rank_freeze_ms, [this] { SomeWorker().FreezeSomeRank(); });
  Repeat(plan_.shim_death_ms, [this] { SomeWorker().KillSomeShim(); });
  Repeat(plan_.admin_ms, [this] { users_.DoAdmin(names_); });
  Repeat(plan_.verb_ms, [this] { users_.DoVerb(); });
  Repeat(plan_.clock_jump_ms,
         [this] { coordinator_.JumpWall(world_.Between(-3'600'000, 3'600'000)); });
}

void Simulation::Calm() {
  calm_ = true;
  network_.Calm();
  world_.Trace("faults stop");
  if (!coordinator_.up()) {
    coordinator_.Boot();
  }
  for (auto& [id, worker] : workers_) {
    worker->StartDaemon();
  }
  // Drains that were under way may still arrive; then the nodes are opened again.
  world_.After(kLateMs, [this] { users_.ReopenAll(names_); });
}

bool Simulation::Settled() {
  const state::Time now = coordinator_.Now();
  return coordinator_.up() && coordinator_.idle() && users_.idle() &&
         checkers_.NotSettled(coordinator_.working(), now.ms, now.wall_ms).empty();
}

Result Simulation::Run() {
  Wire();
  coordinator_.Boot();
  for (auto& [id, worker] : workers_) {
    worker->StartDaemon();
  }
  users_.PlanSubmits();
  PlanFaults();
  const int64_t begin = world_.now_ms();
  world_.After(plan_.fault_ms, [this] { Calm(); });
  const int64_t end = begin + plan_.fault_ms + plan_.settle_ms;
  int64_t look_ms = begin + plan_.fault_ms + kLateMs + 1'000;
  bool settled = false;
  while (!settled && world_.now_ms() < end && world_.Step()) {
    if (calm_ && world_.now_ms() >= look_ms) {
      settled = Settled();
      look_ms = world_.now_ms() + 2'000;
    }
  }
  if (world_.violations().empty()) {
    if (!settled) {
      const state::Time now = coordinator_.Now();
      world_.Violate("M4", Str("not settled: ",
                               checkers_.NotSettled(coordinator_.working(), now.ms, now.wall_ms)));
    } else {
      checkers_.AtEnd(coordinator_.working(), coordinator_.durable());
    }
  }
  Result result;
  result.seed = plan_.seed;
  result.trace_hash = world_.hash();
  result.steps = world_.steps();
  result.events = coordinator_.durable().next_seq() - 1;
  result.attempts = coordinator_.durable().attempts().size();
  for (const auto& [key, checkpoint] : coordinator_.durable().checkpoints()) {
    result.commits += checkpoint->created_at() > 0 ? 1 : 0;
  }
  result.simulated_ms = world_.now_ms() - begin;
  result.violations = world_.violations();
  return result;
}

}  // namespace

Result RunSeed(uint64_t seed, Mutant mutant, const std::function<void(const std::string&)>& log) {
  return Simulation(seed, mutant, log).Run();
}

Totals RunSeeds(uint64_t first, uint64_t count, Mutant mutant, bool stop_at_first) {
  Totals totals;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const Result result = RunSeed(seed, mutant);
    ++totals.seeds;
    totals.steps += result.steps;
    totals.events += result.events;
    totals.commits += result.commits;
    totals.attempts += result.attempts;
    totals.simulated_hours += static_cast<double>(result.simulated_ms) / 3.6e6;
    if (!result.violations.empty()) {
      totals.failures.push_back(Str("seed ", seed, " ", result.violations.front()));
      if (totals.failed++ == 0) {
        totals.first_failed = seed;
        totals.first_violation = result.violations.front();
      }
      if (stop_at_first) {
        break;
      }
    }
  }
  return totals;
}

}  // namespace heddle::simulation
