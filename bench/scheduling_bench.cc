// Times the scheduler where it is asked for most: many nodes of several kinds, many queued gangs.
//   bench_scheduling pass NODES GANGS SHAPES PASSES
//   bench_scheduling place DIR NODES GANGS SHAPES SECONDS LIFE_MS
// `pass` drives the real state and the real pass: the first passes fill an idle cluster; then,
// before each pass, gangs end, nodes are cordoned, lost and come back, and as many gangs are
// submitted as were placed. Prints one JSON line: of each pass the milliseconds of its snapshot, of
// itself and of applying its decisions, and what it decided.
// `place` is in placement_load.h: from queued to assigned through a whole coordinator.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "base/rng/rng.h"
#include "base/status/status.h"
#include "bench/placement_load.h"
#include "bench/synthetic_cluster.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/apply.h"
#include "coordinator/state/state.h"

namespace heddle::bench {
namespace {

constexpr uint64_t kSessionStep = 1'000'000;
constexpr int64_t kMsBetweenPasses = 100;
constexpr size_t kNodesCordoned = 20;  // before each pass; as many are opened again later
constexpr size_t kNodesLost = 3;
constexpr size_t kAwayPasses = 20;  // for so many passes a node stays away
constexpr uint64_t kEndOneIn = 50;  // of the running gangs, before each pass

double Milliseconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

struct PassFigures {
  bool filling = false;
  double snapshot_ms = 0;
  double pass_ms = 0;
  double apply_ms = 0;
  size_t placed = 0;
  size_t dropped = 0;
  size_t queued = 0;  // before it
  size_t tasks = 0;
};

// The coordinator's records and what its users, workers and operators do to them.
class World {
 public:
  World(uint64_t nodes, uint64_t gangs, uint64_t shapes)
      : nodes_(nodes), shapes_(shapes), random_(Rng(1, "bench.world")) {
    HEDDLE_CHECK(Do(state::event::CoordinatorStarted{Term{1}, "b", std::string(16, 'k')}).ok());
    for (uint64_t i = 0; i < nodes; ++i) {
      HEDDLE_CHECK(Do(state::event::WorkerRegistered{NodeOf(i, 1)}).ok());
    }
    wanted_ = gangs;
    Submit();
  }

  size_t running() const { return running_.size(); }

  PassFigures Pass() {
    PassFigures figures;
    figures.queued = state_.queue().size();
    schedule::Snapshot snapshot;
    figures.snapshot_ms = Milliseconds([&] {
      snapshot = schedule::MakeSnapshot(state_, {now_ms_, now_ms_}, schedule::kOneOfMany);
    });
    schedule::PassResult result;
    figures.pass_ms = Milliseconds(
        [&] { result = schedule::RunPass(std::move(snapshot), schedule::kOneOfMany); });
    figures.apply_ms = Milliseconds([&] {
      for (const state::event::AttemptPlaced& placed : result.placed) {
        if (!Do(placed).ok()) {
          ++figures.dropped;
          continue;
        }
        ++figures.placed;
        figures.tasks += placed.tasks.size();
        started_.push_back(placed.job);
      }
    });
    return figures;
  }

  // What happens between two passes. Not timed.
  void Between() {
    now_ms_ += kMsBetweenPasses;
    for (const JobId job : started_) Start(job);
    started_.clear();
    const size_t ending = running_.size() / kEndOneIn;
    for (size_t i = 0; i < ending; ++i) {
      std::swap(running_[random_.Below(running_.size())], running_.back());
      Report(running_.back(), v1::TASK_STATE_EXITED);
      running_.pop_back();
    }
    MoveNodes();
    while (!state_.timers().empty() && state_.timers().begin()->at_ms <= now_ms_) {
      const state::Timer due = *state_.timers().begin();
      if (!Do(state::event::TimerFired{due}).ok()) break;
      if (!state_.timers().empty() && *state_.timers().begin() == due) break;
    }
    Submit();
  }

 private:
  Status Do(const state::Event& event) {
    const state::Outcome outcome = state::Apply(state_, event, {now_ms_, now_ms_}, policy_);
    for (const v1::EventRecord& record : outcome.events) state_.Commit(record);
    return outcome.status;
  }

  // As many as are missing in the queue. Each may wait for the one before it.
  void Submit() {
    while (state_.queue().size() < wanted_) {
      const JobId id{1000 + ++submitted_};
      const JobId after = running_.empty() ? JobId{} : running_[submitted_ % running_.size()];
      HEDDLE_CHECK(Do(SubmitOf(submitted_, shapes_, id, after)).ok());
    }
  }

  // A running gang's tasks: every one tells of its ranks' way to `task_state`.
  void Report(JobId job, v1::TaskState task_state) {
    for (const state::TaskPtr& task : state_.TasksOf(job, state_.job(job)->attempts())) {
      v1::TaskReport report;
      report.set_job(job.value);
      report.set_fence(task->fence());
      report.set_task(task->task());
      report.set_seq(task->seq() + 1);
      report.set_state(task_state);
      report.set_acknowledged(true);
      for (uint32_t r = task->first_rank(); r < task->first_rank() + task->ranks(); ++r) {
        if (task_state == v1::TASK_STATE_RUNNING) report.add_joined_ranks(r);
        if (task_state == v1::TASK_STATE_EXITED) report.add_exits()->set_rank(r);
      }
      for (v1::RankOutcome& exit : *report.mutable_exits()) {
        exit.set_exit_code(0);
        exit.set_at(now_ms_);
      }
      const v1::WorkerRecord* worker = state_.worker(task->worker());
      // A task of a node that was lost tells nothing.
      (void)Do(state::event::TaskReported{task->worker(), worker->session(), report});
    }
  }

  void Start(JobId job) {
    Report(job, v1::TASK_STATE_PREPARING);
    Report(job, v1::TASK_STATE_READY);
    Report(job, v1::TASK_STATE_RUNNING);
    running_.push_back(job);
  }

  void MoveNodes() {
    ++turn_;
    const auto administer = [this](uint64_t node, v1::NodeVerb verb) {
      state::event::NodeAdministered event;
      event.request.identity = "bench";
      event.node = NodeOf(node, 1).worker_id();
      event.verb = verb;
      (void)Do(event);
    };
    for (size_t i = 0; i < kNodesCordoned + kNodesLost; ++i) {
      const uint64_t node = random_.Below(nodes_);
      const bool lost = i >= kNodesCordoned;
      if (lost) {
        const std::string id = NodeOf(node, 1).worker_id();
        const uint64_t session = state_.worker(id)->session();
        (void)Do(state::event::WorkerSuspect{id, session, "silent"});
        (void)Do(state::event::WorkerLost{id, session});
      } else {
        administer(node, v1::NODE_VERB_CORDON);
      }
      away_.push_back({node, lost, turn_ + kAwayPasses});
    }
    while (!away_.empty() && away_.front().until <= turn_) {
      const Away back = away_.front();
      away_.erase(away_.begin());
      if (back.lost) {
        (void)Do(state::event::WorkerRegistered{NodeOf(back.node, kSessionStep * turn_)});
      } else {
        administer(back.node, v1::NODE_VERB_REOPEN);
      }
    }
  }

  struct Away {
    uint64_t node = 0;
    bool lost = false;
    uint64_t until = 0;
  };

  const uint64_t nodes_;
  const uint64_t shapes_;
  RngCursor random_;
  state::State state_;
  state::Policy policy_;
  int64_t now_ms_ = 1'000'000;
  size_t wanted_ = 0;
  uint64_t submitted_ = 0;
  uint64_t turn_ = 0;
  std::vector<JobId> started_;
  std::vector<JobId> running_;
  std::vector<Away> away_;
};

void Print(const std::vector<PassFigures>& passes, size_t running) {
  std::printf("{\"running\": %zu, \"passes\": [", running);
  const char* comma = "";
  for (const PassFigures& one : passes) {
    std::printf(
        "%s{\"filling\": %s, \"snapshot_ms\": %.3f, \"pass_ms\": %.3f, \"apply_ms\": %.3f, "
        "\"placed\": %zu, \"dropped\": %zu, \"tasks\": %zu, \"queued\": %zu}",
        comma, one.filling ? "true" : "false", one.snapshot_ms, one.pass_ms, one.apply_ms,
        one.placed, one.dropped, one.tasks, one.queued);
    comma = ", ";
  }
  std::printf("]}\n");
}

int RunPasses(uint64_t nodes, uint64_t gangs, uint64_t shapes, uint64_t count) {
  World world(nodes, gangs, shapes);
  std::vector<PassFigures> passes;
  // Until nothing of the queue fits any more.
  for (bool filling = true; filling;) {
    passes.push_back(world.Pass());
    passes.back().filling = true;
    filling = passes.back().placed > 0;
  }
  for (uint64_t i = 0; i < count; ++i) {
    world.Between();
    passes.push_back(world.Pass());
  }
  Print(passes, world.running());
  return 0;
}

uint64_t NumberOf(const char* text) {
  const std::string digits = text;
  uint64_t value = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return value;
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "pass" && argc == 6 && NumberOf(argv[2]) > 0) {
    return RunPasses(NumberOf(argv[2]), NumberOf(argv[3]), std::max<uint64_t>(1, NumberOf(argv[4])),
                     NumberOf(argv[5]));
  }
  if (mode == "place" && argc == 8 && NumberOf(argv[3]) > 0) {
    const Status done = PlaceAll({.dir = argv[2],
                                  .nodes = NumberOf(argv[3]),
                                  .gangs = NumberOf(argv[4]),
                                  .shapes = std::max<uint64_t>(1, NumberOf(argv[5])),
                                  .seconds = NumberOf(argv[6]),
                                  .life_ms = static_cast<int64_t>(NumberOf(argv[7]))});
    if (!done.ok()) std::fprintf(stderr, "%s\n", Message(done).c_str());
    return done.ok() ? 0 : 1;
  }
  std::fprintf(stderr,
               "usage: bench_scheduling pass NODES GANGS SHAPES PASSES\n"
               "       bench_scheduling place DIR NODES GANGS SHAPES SECONDS LIFE_MS\n");
  return 2;
}

}  // namespace
}  // namespace heddle::bench

int main(int argc, char** argv) { return heddle::bench::Main(argc, argv); }
