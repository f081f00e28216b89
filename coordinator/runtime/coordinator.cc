#include "coordinator/runtime/coordinator.h"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <limits>
#include <type_traits>

#include "base/log/log.h"
#include "coordinator/runtime/records.h"

namespace heddle::runtime {
namespace {

// Clients are told to slow down before the journal itself would refuse (D2).
constexpr uint64_t kBatchesInFlightMax = 8000;
constexpr int64_t kHousekeepingMs = 1000;
constexpr int kFirePerTickMax = 10'000;

bool FromClient(const state::Event& event) {
  return std::visit(
      [](const auto& body) {
        using Body = std::decay_t<decltype(body)>;
        return std::is_same_v<Body, state::event::JobSubmitted> ||
               std::is_same_v<Body, state::event::JobResumed>;
      },
      event);
}

}  // namespace

Coordinator::Coordinator(CoordinatorOptions options, const Clock& clock)
    : options_(std::move(options)),
      clock_(clock),
      logs_root_(Str(options_.state_dir, "/logs")),
      timer_(io_),
      file_pool_(2),
      long_file_pool_(1),
      pass_pool_(1),
      started_ns_(clock.NowSteady()) {}

Coordinator::~Coordinator() {
  file_pool_.join();
  long_file_pool_.join();
  pass_pool_.join();
}

void Coordinator::Run() {
  Tick();
  auto work = boost::asio::make_work_guard(io_);
  io_.run();
  log_.reset();
}

void Coordinator::Stop() {
  Post([this] {
    if (!stopping_) {
      stopping_ = true;
      AfterDurable([this](const Status&) { io_.stop(); });
    }
  });
}

void Coordinator::Post(std::function<void()> work) { boost::asio::post(io_, std::move(work)); }

void Coordinator::PostAfter(int64_t delay_ms, std::function<void()> work) {
  auto timer = std::make_shared<boost::asio::steady_timer>(io_);
  timer->expires_after(std::chrono::milliseconds(delay_ms));
  timer->async_wait([timer, work = std::move(work)](const boost::system::error_code& error) {
    if (!error) {
      work();
    }
  });
}

void Coordinator::PostFileWork(std::function<void()> work) {
  boost::asio::post(file_pool_, std::move(work));
}

void Coordinator::PostLongFileWork(std::function<void()> work) {
  boost::asio::post(long_file_pool_, std::move(work));
}

state::Time Coordinator::Now() const {
  return {.ms = clock_.NowSteady() / 1'000'000 + time_offset_ms_, .wall_ms = clock_.NowWallMs()};
}

int64_t Coordinator::uptime_seconds() const {
  return (clock_.NowSteady() - started_ns_) / 1'000'000'000;
}

JobId Coordinator::NewJobId() { return job_ids_->Next(clock_.NowWallMs()); }

rpc::CoreFigures Coordinator::Figures() const {
  rpc::CoreFigures figures = figures_;
  figures.read_only = read_only();
  figures.mass_silence = leases_.has_value() && leases_->mass_silence();
  if (log_ != nullptr) {
    const store::LogStats stats = log_->Stats();
    figures.commit_p50_ms = stats.commit_p50_ms;
    figures.commit_p99_ms = stats.commit_p99_ms;
    figures.commits = stats.commits;
  }
  return figures;
}

// ---- the way of a change ----

void Coordinator::Execute(state::Event event, std::function<void(const state::Outcome&)> done) {
  if (poisoned_ || stopping_) {
    state::Outcome refused;
    refused.status =
        Unavailable(stopping_ ? "the coordinator is stopping"
                              : "the coordinator's store failed and is being reopened");
    done(refused);
    return;
  }
  if (FromClient(event) && appended_ - durable_ >= kBatchesInFlightMax) {
    state::Outcome refused;
    refused.status = ResourceExhausted("the coordinator is busy: retry after 100ms");
    done(refused);
    return;
  }
  auto outcome =
      std::make_shared<state::Outcome>(state::Apply(state_, event, Now(), options_.policy));
  Release release;
  if (!outcome->events.empty()) {
    for (const v1::EventRecord& record : outcome->events) {
      state_.Commit(record);
    }
    ++appended_;
    // Clients were told to slow down long before this. What workers say cannot be refused: it waits
    // in the queue of this thread instead.
    log_->AwaitRoom();
    const Status queued =
        log_->Append(BatchOf(outcome->events),
                     [this, generation = generation_](const StatusOr<store::CommitSeq>& result) {
                       OnDurable(result, generation);
                     });
    if (!queued.ok()) {
      Poison(queued);
      outcome->status = Unavailable("the coordinator's store failed");
      done(*outcome);
      return;
    }
  }
  release.events = std::move(outcome->events);
  release.batch = appended_;
  release.run = [this, outcome, note = LeaseNote(event),
                 done = std::move(done)](const Status& status) {
    if (!status.ok()) {
      outcome->status = status;
      done(*outcome);
      return;
    }
    if (note && outcome->status.ok()) {
      note();
    }
    for (const state::Effect& effect : outcome->effects) {
      RunEffect(effect);
    }
    done(*outcome);
  };
  releases_.push_back(std::move(release));
  RunReleases();
  ArmTimer();
}

// What a durable event means for the lease of its worker; empty for most.
std::function<void()> Coordinator::LeaseNote(const state::Event& event) {
  if (const auto* registered = std::get_if<state::event::WorkerRegistered>(&event)) {
    return
        [this, worker = registered->request.worker_id(), session = registered->request.session()] {
          leases_->Registered(worker, session, Now().ms);
        };
  }
  if (const auto* admin = std::get_if<state::event::NodeAdministered>(&event);
      admin != nullptr && admin->verb == v1::NODE_VERB_FORGET) {
    return [this, worker = admin->node] { leases_->Remove(worker); };
  }
  return nullptr;
}

void Coordinator::AfterDurable(std::function<void(const Status&)> done) {
  if (poisoned_) {  // the state was loaded again from what is durable
    done(OkStatus());
    return;
  }
  releases_.push_back({.batch = appended_, .events = {}, .run = std::move(done)});
  RunReleases();
}

void Coordinator::OnDurable(const StatusOr<store::CommitSeq>& result, uint64_t generation) {
  if (generation != generation_) {
    return;
  }
  if (!result.ok()) {
    Poison(result.status());
    return;
  }
  ++durable_;
  RunReleases();
}

void Coordinator::RunReleases() {
  if (releasing_) {
    return;  // called by what a release runs: the loop below goes on in order
  }
  releasing_ = true;
  while (!releases_.empty() && releases_.front().batch <= durable_) {
    const Release release = std::move(releases_.front());
    releases_.pop_front();
    Publish(release.events);
    release.run(OkStatus());
  }
  releasing_ = false;
}

void Coordinator::Publish(const std::vector<v1::EventRecord>& events) {
  for (const v1::EventRecord& event : events) {
    durable_seq_ = event.seq();
    HEDDLE_INFO("event", {"seq", event.seq()}, {"code", event.code()}, {"target", event.target()},
                {"text", event.text()});
    std::vector<rpc::EventSink> sinks = std::move(event_sinks_);
    event_sinks_.clear();
    std::erase_if(sinks, [&](const rpc::EventSink& sink) { return !sink(event); });
    for (rpc::EventSink& added : event_sinks_) {  // subscribed by a sink
      sinks.push_back(std::move(added));
    }
    event_sinks_ = std::move(sinks);
  }
}

void Coordinator::SubscribeEvents(rpc::EventSink sink) { event_sinks_.push_back(std::move(sink)); }

void Coordinator::SubscribePoints(rpc::PointSink sink) { point_sinks_.push_back(std::move(sink)); }

StatusOr<std::vector<v1::EventRecord>> Coordinator::ReadEvents(uint64_t from_seq, uint64_t job,
                                                               size_t limit) {
  if (log_ == nullptr) {
    return Unavailable("the coordinator's store is being reopened");
  }
  return runtime::ReadEvents(*log_, from_seq, durable_seq_, job, limit);
}

StatusOr<std::vector<v1::EventRecord>> Coordinator::ReadLastEvents(uint64_t job, size_t limit) {
  if (log_ == nullptr) {
    return Unavailable("the coordinator's store is being reopened");
  }
  return runtime::ReadLastEvents(*log_, durable_seq_, job, limit);
}

StatusOr<std::vector<v1::MetricPoint>> Coordinator::ReadPoints(uint64_t job,
                                                               std::pair<uint32_t, uint64_t> after,
                                                               size_t limit) {
  if (log_ == nullptr) {
    return Unavailable("the coordinator's store is being reopened");
  }
  log_->Flush();  // points are queued unsynced; what was received must be seen
  return runtime::ReadPoints(*log_, job, after, limit);
}

const v1::MetricPoint* Coordinator::LastPoint(uint64_t job) {
  auto found = last_points_.find(job);
  if (found == last_points_.end()) {
    const v1::JobRecord* record = state_.job(JobId{job});
    if (record == nullptr || record->attempts() == 0 || log_ == nullptr) {
      return nullptr;
    }
    const StatusOr<v1::MetricPoint> point = ReadLastPoint(*log_, job, 0);
    found = last_points_
                .emplace(job, point.ok() ? std::optional<v1::MetricPoint>(*point) : std::nullopt)
                .first;
  }
  return found->second.has_value() ? &*found->second : nullptr;
}

void Coordinator::RemovePoints(uint64_t job) {
  if (log_ == nullptr || poisoned_) {
    return;
  }
  const StatusOr<store::Batch> batch = RemovalOfPoints(*log_, job);
  Status removed = batch.status();
  if (batch.ok() && !batch->mutations.empty()) {
    removed = log_->AppendVolatile(*batch);
  }
  last_points_.erase(job);
  last_steps_.erase(last_steps_.lower_bound({job, 0}), last_steps_.lower_bound({job + 1, 0}));
  if (!removed.ok()) {
    HEDDLE_WARN("metric points of a finished job stay", {"job", JobId{job}}, {"error", removed});
  }
}

// ---- time ----

void Coordinator::Tick() {
  FireTimers();
  CheckDisk();
  if (poisoned_) {
    TryReopen();
  }
  if (!state_.queue().empty()) {
    WakeScheduler();
  }
  ArmTimer();
}

void Coordinator::FireTimers() {
  if (poisoned_ || stopping_) {
    return;
  }
  const state::Time now = Now();
  for (state::Event& event : leases_->Poll(now.ms)) {
    Execute(std::move(event), [](const state::Outcome&) {});
  }
  rendezvous_.Expire(now.ms);
  std::optional<state::Timer> last;
  for (int fired = 0; fired < kFirePerTickMax && !poisoned_; ++fired) {
    const auto& steady = state_.timers();
    const auto& wall = state_.wall_timers();
    std::optional<state::Timer> due;
    if (!steady.empty() && steady.begin()->at_ms <= now.ms) {
      due = *steady.begin();
    } else if (!wall.empty() && wall.begin()->at_ms <= now.wall_ms) {
      due = *wall.begin();
    }
    if (!due.has_value() || due == last) {  // one that stays is judged again at the next tick
      return;
    }
    last = due;
    Execute(state::event::TimerFired{*due}, [](const state::Outcome&) {});
  }
}

void Coordinator::ArmTimer() {
  const state::Time now = Now();
  int64_t wait = kHousekeepingMs;
  if (!state_.timers().empty()) {
    wait = std::min(wait, state_.timers().begin()->at_ms - now.ms);
  }
  if (!state_.wall_timers().empty()) {
    wait = std::min(wait, state_.wall_timers().begin()->at_ms - now.wall_ms);
  }
  if (leases_.has_value() && leases_->NextMs() != std::numeric_limits<int64_t>::max()) {
    wait = std::min(wait, leases_->NextMs() - now.ms);
  }
  if (rendezvous_.NextMs() != std::numeric_limits<int64_t>::max()) {
    wait = std::min(wait, rendezvous_.NextMs() - now.ms);
  }
  wait = std::max<int64_t>(wait, 5);
  const int64_t at_ms = clock_.NowSteady() / 1'000'000 + wait;
  if (armed_ms_ != 0 && armed_ms_ <= at_ms) {
    return;  // fires early enough; Tick arms it anew
  }
  armed_ms_ = at_ms;
  timer_.expires_after(std::chrono::milliseconds(wait));
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) {
      armed_ms_ = 0;
      Tick();
    }
  });
}

}  // namespace heddle::runtime
