#include "bench/placement_load.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock/clock.h"
#include "base/log/log.h"
#include "bench/synthetic_cluster.h"
#include "coordinator/runtime/coordinator.h"
#include "coordinator/store/state_folder.h"

namespace heddle::bench {

namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr size_t kInFlightMax = 4000;  // below what the coordinator refuses
constexpr int64_t kBeatMs = 2000;
constexpr size_t kNotedOneIn = 100;

// Work with a time, done by one thread in order of time: the workers of the whole cluster.
class Agenda {
 public:
  Agenda() : thread_([this] { Run(); }) {}
  ~Agenda() {
    {
      const std::lock_guard lock(mutex_);
      quit_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Agenda(const Agenda&) = delete;
  Agenda& operator=(const Agenda&) = delete;

  void After(int64_t milliseconds, std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      due_.emplace(SteadyClock::now() + std::chrono::milliseconds(milliseconds), std::move(work));
    }
    changed_.notify_all();
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (!quit_) {
      if (due_.empty()) {
        changed_.wait(lock);
      } else if (due_.begin()->first > SteadyClock::now()) {
        changed_.wait_until(lock, due_.begin()->first);
      } else {
        const std::function<void()> work = std::move(due_.begin()->second);
        due_.erase(due_.begin());
        lock.unlock();
        work();
        lock.lock();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::multimap<SteadyClock::time_point, std::function<void()>> due_;
  bool quit_ = false;
  std::thread thread_;
};

// Lets at most so many be under way.
class Gate {
 public:
  void Enter() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return inside_ < kInFlightMax; });
    ++inside_;
  }
  void Leave() {
    const std::lock_guard lock(mutex_);
    --inside_;
    changed_.notify_all();
  }
  void AwaitEmpty() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return inside_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t inside_ = 0;
};

class Run {
 public:
  Run(PlacementLoad load, runtime::Coordinator* core) : load_(std::move(load)), core_(core) {}

  Status Submit() {
    Gate gate;
    for (uint64_t i = 1; i <= load_.gangs; ++i) {
      gate.Enter();
      core_->Post([this, i, &gate] {
        core_->Execute(SubmitOf(i, load_.shapes, core_->NewJobId(), JobId{}),
                       [this, &gate](const state::Outcome& outcome) {
                         refused_ += outcome.status.ok() ? 0 : 1;
                         gate.Leave();
                       });
      });
    }
    gate.AwaitEmpty();
    return refused_ == 0 ? OkStatus() : Unavailable(Str(refused_.load(), " submits were refused"));
  }

  void Join() {
    begin_ = SteadyClock::now();
    Gate gate;
    for (uint64_t i = 0; i < load_.nodes; ++i) {
      gate.Enter();
      core_->Post([this, i, &gate] {
        const v1::RegisterRequest request = NodeOf(i, 1);
        const std::string id = request.worker_id();
        core_->Execute(state::event::WorkerRegistered{request}, [&](const state::Outcome&) {});
        core_->AfterDurable([this, id, &gate](const Status&) {
          cluster_id_ = core_->state().meta().cluster_id();
          core_->AttachWorker(id, 1, [this, id](const v1::CoordMsg& m) { OnMessage(id, m); });
          gate.Leave();
        });
      });
      agenda_.After(kBeatMs * static_cast<int64_t>(i) / static_cast<int64_t>(load_.nodes),
                    [this, i] { Beat(NodeOf(i, 1).worker_id()); });
    }
    gate.AwaitEmpty();
    joined_seconds_ = Seconds();
  }

  void Await() {
    while (Seconds() < static_cast<double>(load_.seconds) && assigned_ < load_.gangs) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    seconds_ = Seconds();
    over_ = true;
  }

  // On the state thread.
  void Print() {
    const rpc::CoreFigures figures = core_->Figures();
    std::printf(
        "{\"nodes\": %lu, \"gangs\": %lu, \"assigned\": %lu, \"tasks\": %lu, \"ended\": %lu, "
        "\"joined_seconds\": %.3f, \"seconds\": %.3f, \"still_queued\": %zu, "
        "\"pass_p99_ms\": %.2f, \"dropped_decisions\": %lu, \"commit_p50_ms\": %.2f, "
        "\"commit_p99_ms\": %.2f, \"assigned_at\": [",
        load_.nodes, load_.gangs, assigned_.load(), tasks_, ended_, joined_seconds_, seconds_,
        core_->state().queue().size(), figures.pass_p99_ms, figures.dropped_decisions,
        figures.commit_p50_ms, figures.commit_p99_ms);
    const char* comma = "";
    for (const double at : assigned_at_) {
      std::printf("%s%.4f", comma, at);
      comma = ", ";
    }
    std::printf("]}\n");
  }

 private:
  double Seconds() const {
    return std::chrono::duration<double>(SteadyClock::now() - begin_).count();
  }

  // On the state thread, as gRPC's streams are written.
  void OnMessage(const std::string& worker, const v1::CoordMsg& message) {
    if (over_) return;
    if (message.has_assign()) {
      const v1::TaskAssignment& task = message.assign();
      NoteAssigned(task);
      agenda_.After(0, [this, worker, task] { Accept(worker, task); });
    } else if (message.has_start() && load_.life_ms > 0) {
      const uint64_t fence = message.start().fence();
      const uint32_t task = message.start().task();
      agenda_.After(load_.life_ms, [this, worker, fence, task] { End(worker, fence, task); });
    }
  }

  void NoteAssigned(const v1::TaskAssignment& task) {
    ++tasks_;
    uint32_t& ranks = ranks_[task.fence()];
    ranks += static_cast<uint32_t>(task.ranks_size());
    if (ranks < task.world_size()) return;
    ranks_.erase(task.fence());
    if (++assigned_ % kNotedOneIn == 0) assigned_at_.push_back(Seconds());
  }

  // ---- the workers, on the agenda's thread ----

  void Tell(const std::string& worker, v1::WorkerMsg message) {
    message.set_worker_id(worker);
    message.set_session(1);
    core_->Post([this, message = std::move(message)]() mutable {
      message.set_cluster_id(cluster_id_);
      core_->OnWorkerMessage(message);
    });
  }

  void Beat(const std::string& worker) {
    if (over_) return;
    v1::WorkerMsg message;
    message.mutable_heartbeat()->set_n(1);
    Tell(worker, std::move(message));
    agenda_.After(kBeatMs, [this, worker] { Beat(worker); });
  }

  void Report(const std::string& worker, const v1::TaskAssignment& task, uint64_t seq,
              v1::TaskState task_state) {
    v1::WorkerMsg message;
    v1::TaskReport& report = *message.mutable_report();
    report.set_job(task.job());
    report.set_fence(task.fence());
    report.set_task(task.task());
    report.set_seq(seq);
    report.set_state(task_state);
    report.set_acknowledged(true);
    report.set_data_address("127.0.0.1");
    for (const uint32_t rank : task.ranks()) {
      if (task_state == v1::TASK_STATE_RUNNING) report.add_joined_ranks(rank);
      if (task_state == v1::TASK_STATE_EXITED) {
        v1::RankOutcome& exit = *report.add_exits();
        exit.set_rank(rank);
        exit.set_exit_code(0);
        exit.set_at(1);
      }
    }
    Tell(worker, std::move(message));
  }

  void Accept(const std::string& worker, const v1::TaskAssignment& task) {
    if (!held_.emplace(std::make_pair(task.fence(), task.task()), task).second) return;
    Report(worker, task, 1, v1::TASK_STATE_PREPARING);
    Report(worker, task, 2, v1::TASK_STATE_READY);
  }

  void End(const std::string& worker, uint64_t fence, uint32_t number) {
    const auto held = held_.find({fence, number});
    if (over_ || held == held_.end()) return;
    Report(worker, held->second, 3, v1::TASK_STATE_RUNNING);
    Report(worker, held->second, 4, v1::TASK_STATE_EXITED);
    held_.erase(held);
    ++ended_;
  }

  const PlacementLoad load_;
  runtime::Coordinator* const core_;
  SteadyClock::time_point begin_;
  double joined_seconds_ = 0;
  double seconds_ = 0;
  std::atomic<bool> over_ = false;
  std::atomic<uint64_t> refused_ = 0;
  std::atomic<uint64_t> assigned_ = 0;
  std::string cluster_id_;              // of the state thread, as the next three
  std::map<uint64_t, uint32_t> ranks_;  // assigned so far, by fence
  std::vector<double> assigned_at_;
  uint64_t tasks_ = 0;
  uint64_t ended_ = 0;
  std::map<std::pair<uint64_t, uint32_t>, v1::TaskAssignment> held_;  // by fence and task
  Agenda agenda_;  // last: its thread uses what stands above
};

}  // namespace

Status PlaceAll(const PlacementLoad& load) {
  // As the daemon logs: a line for every event.
  RETURN_IF_ERROR(log::Init(
      {.level = log::Level::kInfo, .file = Str(load.dir, "/log"), .name = "coordinator"}));
  const std::string state_dir = Str(load.dir, "/state");
  RETURN_IF_ERROR(store::MakeFolders(state_dir));
  ASSIGN_OR_RETURN(const store::StateLock lock, store::StateLock::Acquire(state_dir));
  runtime::CoordinatorOptions options;
  options.state_dir = state_dir;
  options.checkpoint_root = Str(state_dir, "/checkpoints");
  options.version = "bench";
  options.disk.read_only_bytes = uint64_t{64} << 20;
  options.disk.read_only_fraction = 0;
  const SystemClock clock;
  runtime::Coordinator coordinator(options, clock);
  RETURN_IF_ERROR(coordinator.Start());
  std::thread state_thread([&] { coordinator.Run(); });
  Run run(load, &coordinator);
  const Status submitted = run.Submit();
  if (submitted.ok()) {
    run.Join();
    run.Await();
    std::mutex mutex;
    std::condition_variable printed;
    bool done = false;
    coordinator.Post([&] {
      run.Print();
      const std::lock_guard lock(mutex);
      done = true;
      printed.notify_all();
    });
    std::unique_lock held(mutex);
    printed.wait(held, [&] { return done; });
  }
  coordinator.Stop();
  state_thread.join();
  return submitted;
}

}  // namespace heddle::bench
