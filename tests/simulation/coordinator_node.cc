#include "tests/simulation/coordinator_node.h"

#include <algorithm>
#include <limits>

#include "coordinator/state/diagnosis.h"
#include "coordinator/state/names.h"

namespace heddle::simulation {

namespace v1 = heddle::v1;
using state::Effect;
using state::Event;
using state::Outcome;

namespace {

// The worker an effect is for; nullptr for the coordinator's own.
const std::string* WorkerOf(const Effect& effect) {
  return std::visit(
      [](const auto& e) -> const std::string* {
        if constexpr (requires { e.worker; }) {
          return &e.worker;
        } else {
          return nullptr;
        }
      },
      effect);
}

}  // namespace

state::Time CoordinatorNode::Now() const {
  return {base_ms_ + (world_.now_ms() - start_ms_), world_.now_ms() + wall_offset_ms_};
}

// ---- life -------------------------------------------------------------------------------------

void CoordinatorNode::Boot() {
  HEDDLE_CHECK(!up_);
  up_ = true;
  ++epoch_;
  start_ms_ = world_.now_ms();
  base_ms_ = std::max(world_.now_ms() + wall_offset_ms_, durable_.newest_ms());
  // Recovery from the records, in any order: the way the real store does it.
  state::State loaded;
  std::vector<v1::RecordChange> dump = durable_.Dump();
  for (size_t i = dump.size(); i > 1; --i) {
    std::swap(dump[i - 1],
              dump[static_cast<size_t>(world_.Between(0, static_cast<int64_t>(i) - 1))]);
  }
  for (v1::RecordChange& change : dump) {
    loaded.Load(std::move(change));
  }
  loaded.SetNextSeq(durable_.next_seq(), durable_.newest_ms());
  working_ = std::move(loaded);
  checkers_.AfterRecovery(working_, durable_);
  queue_.clear();
  syncing_ = false;
  streams_.clear();
  waiting_.clear();
  open_.clear();
  returned_.clear();
  armed_timer_ms_ = armed_lease_ms_ = std::numeric_limits<int64_t>::max();
  pass_armed_ = false;
  leases_ = std::make_unique<state::LeaseTable>(plan_.leases, Now().ms);
  if (plan_.mutant != Mutant::kTermNotPersisted || disk_term_ == 0) {
    ++disk_term_;
  }
  world_.Trace(Str("coordinator starts, term ", disk_term_));
  const Outcome outcome =
      Decide(state::event::CoordinatorStarted{Term{disk_term_}, "cluster", std::string(16, 'k')});
  if (!outcome.status.ok()) {
    world_.Violate("I7", Str("coordinator cannot start: ", outcome.status));
    return;
  }
  Append(outcome, nullptr);
  for (const auto& [id, entry] : working_.nodes()) {
    if (entry.record != nullptr && entry.record->state() == v1::WORKER_STATE_SUSPECT) {
      leases_->Recovered(id, entry.record->session(), Now().ms);
    }
  }
  ArmLeases();
}

void CoordinatorNode::Crash() {
  if (!up_) {
    return;
  }
  world_.Trace("coordinator crashes");
  up_ = false;
  ++epoch_;
  // The batch in flight may have reached the disk: all of it or nothing of it.
  if (syncing_ && world_.Chance(0.5)) {
    for (size_t i = 0; i < group_; ++i) {
      for (const v1::EventRecord& event : queue_[i].outcome.events) {
        durable_.Commit(event);
        checkers_.OnDurable(event);
      }
    }
  }
  queue_.clear();
  syncing_ = false;
  std::map<std::string, StreamPtr> streams = std::move(streams_);
  streams_.clear();
  for (const auto& [worker, stream] : streams) {
    stream->on_break_up = nullptr;
    network_.Break(stream);
  }
}

// ---- decide, journal, release -----------------------------------------------------------------

Outcome CoordinatorNode::Decide(const Event& event) {
  const state::Time now = Now();
  Outcome outcome = state::Apply(working_, event, now, plan_.policy);
  std::string trace = Str(state::EventName(event), " ", static_cast<int>(outcome.status.code()));
  for (const v1::EventRecord& one : outcome.events) {
    trace += Str(" ", one.seq(), ":", one.code(), "(", one.target(), " ", one.text(), ")");
    checkers_.BeforeCommit(working_, one);
    working_.Commit(one);
  }
  world_.Trace(trace);
  if (!outcome.events.empty()) {
    checkers_.AfterCommit(working_);
  }
  return outcome;
}

void CoordinatorNode::Append(Outcome outcome, Reply reply) {
  Batch batch;
  batch.last_seq = working_.next_seq() - 1;
  batch.outcome = std::move(outcome);
  batch.reply = std::move(reply);
  if (plan_.mutant == Mutant::kReplyBeforeSync) {
    Batch early = batch;
    batch.outcome.effects.clear();
    batch.reply = nullptr;
    queue_.push_back(std::move(batch));
    StartSync();
    Release(std::move(early));
    return;
  }
  queue_.push_back(std::move(batch));
  StartSync();
  ArmTimers();
}

void CoordinatorNode::StartSync() {
  if (syncing_ || queue_.empty()) {
    return;
  }
  syncing_ = true;
  group_ = queue_.size();
  const bool slow = world_.Chance(0.02);
  world_.After(slow ? world_.Between(20, 1'500) : world_.Between(0, 12), [this, epoch = epoch_] {
    if (epoch == epoch_) FinishSync();
  });
}

void CoordinatorNode::FinishSync() {
  syncing_ = false;
  std::vector<Batch> done;
  for (size_t i = 0; i < group_; ++i) {
    done.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  for (const Batch& batch : done) {
    for (const v1::EventRecord& event : batch.outcome.events) {
      durable_.Commit(event);
      checkers_.OnDurable(event);
    }
  }
  StartSync();
  const uint64_t epoch = epoch_;
  for (Batch& batch : done) {
    if (epoch == epoch_) {
      Release(std::move(batch));
    }
  }
  ArmTimers();
}

void CoordinatorNode::Release(Batch batch) {
  if ((!batch.outcome.effects.empty() || batch.reply != nullptr) &&
      batch.last_seq >= durable_.next_seq()) {
    world_.Violate("P8", Str("effect or reply of event ", batch.last_seq, " released, durable is ",
                             durable_.next_seq() - 1));
  }
  releasing_seq_ = batch.last_seq;
  for (const Effect& effect : batch.outcome.effects) {
    RunEffect(effect);
  }
  releasing_seq_ = UINT64_MAX;
  if (batch.reply != nullptr) {
    batch.reply(batch.outcome);
  }
}

void CoordinatorNode::Post(Event event, Reply reply) {
  if (!up_) {
    return;
  }
  Append(Decide(event), std::move(reply));
}

// ---- effects ----------------------------------------------------------------------------------

void CoordinatorNode::RunEffect(const Effect& effect) {
  if (const std::string* worker = WorkerOf(effect); worker != nullptr) {
    ToWorker(*worker, effect);
  } else if (std::holds_alternative<state::effect::WakeScheduler>(effect)) {
    WakeScheduler();
  } else if (const auto* files = std::get_if<state::effect::DeleteCheckpointFiles>(&effect)) {
    DeleteFiles(*files);
  } else if (const auto* verify = std::get_if<state::effect::VerifyCheckpoint>(&effect)) {
    Verify(*verify);
  }
}

void CoordinatorNode::ToWorker(const std::string& worker, const Effect& effect) {
  const auto stream = streams_.find(worker);
  // A stream opens after the answer to its registration, which goes out after what came before it.
  if (stream == streams_.end() || releasing_seq_ < stream->second->from_seq) {
    return;
  }
  if (const auto* stale = std::get_if<state::effect::SendStale>(&effect);
      stale != nullptr && stale->session != stream->second->session) {
    return;
  }
  if (!open_.contains(worker)) {
    if (!plan_.drop_before_open) {
      waiting_[worker].push_back(effect);
    }
    return;
  }
  deliver_(stream->second, effect);
}

void CoordinatorNode::DeleteFiles(const state::effect::DeleteCheckpointFiles& effect) {
  checkers_.OnDelete(durable_, effect.key);
  world_.After(world_.Between(1, 500), [this, epoch = epoch_, key = effect.key] {
    if (epoch == epoch_) Post(state::event::CheckpointFilesDeleted{key}, nullptr);
  });
}

void CoordinatorNode::Verify(const state::effect::VerifyCheckpoint& effect) {
  if (world_.Chance(0.2)) {
    return;  // the reader is slow, or crashed: asked again by the next start
  }
  const bool good = !world_.Chance(plan_.damage / 4);
  world_.After(
      world_.Between(5, 3'000), [this, epoch = epoch_, good, key = state::KeyOf(effect.record)] {
        if (epoch == epoch_) {
          Post(state::event::CheckpointVerified{key, good, good ? "" : "digest differs"}, nullptr);
        }
      });
}

// ---- workers ----------------------------------------------------------------------------------

void CoordinatorNode::OnRegister(const v1::RegisterRequest& request, Register reply) {
  if (!up_) {
    return;
  }
  Outcome outcome = Decide(state::event::WorkerRegistered{request});
  if (!outcome.status.ok()) {
    Append(std::move(outcome), [reply](const Outcome& o) { reply(o, nullptr); });
    return;
  }
  const std::string worker = request.worker_id();
  if (const auto old = streams_.find(worker); old != streams_.end()) {
    old->second->on_break_up = nullptr;
    network_.Break(old->second);
  }
  StreamPtr stream = std::make_shared<Stream>();
  stream->worker = worker;
  stream->session = request.session();
  stream->from_seq = working_.next_seq() - 1;
  stream->on_break_up = [this, epoch = epoch_, worker, session = request.session()] {
    if (epoch == epoch_ && leases_ != nullptr) {
      leases_->StreamClosed(worker, session, Now().ms);
      open_.erase(worker);
      ArmLeases();
    }
  };
  streams_[worker] = stream;
  waiting_.erase(worker);
  open_.erase(worker);
  returned_.insert(worker);
  leases_->Registered(worker, request.session(), Now().ms);
  for (const v1::TaskReport& report : request.tasks()) {
    working_.NoteProgress(Fence{report.fence()}, report.step(), Now(), plan_.policy);
  }
  Append(std::move(outcome), [reply, stream](const Outcome& o) { reply(o, stream); });
  ArmLeases();
}

void CoordinatorNode::OnStream(const StreamPtr& stream) {
  const auto current = streams_.find(stream->worker);
  if (!up_ || current == streams_.end() || current->second != stream ||
      !open_.insert(stream->worker).second) {
    return;
  }
  std::vector<Effect> effects = std::move(waiting_[stream->worker]);
  waiting_.erase(stream->worker);
  for (const Effect& effect : effects) {
    deliver_(stream, effect);
  }
}

void CoordinatorNode::OnHeartbeat(const StreamPtr& stream, const v1::Heartbeat& heartbeat) {
  const auto current = streams_.find(stream->worker);
  if (!up_ || current == streams_.end() || current->second != stream) {
    return;
  }
  const v1::WorkerRecord* record = working_.worker(stream->worker);
  if (record != nullptr &&
      (record->state() == v1::WORKER_STATE_LOST || record->state() == v1::WORKER_STATE_LEFT)) {
    ToWorker(stream->worker,
             state::effect::SendStale{stream->worker, stream->session, "it was given up"});
    return;
  }
  leases_->Heard(stream->worker, stream->session, Now().ms);
  for (const v1::Heartbeat::TaskBeat& beat : heartbeat.tasks()) {
    working_.NoteProgress(Fence{beat.fence()}, beat.step(), Now(), plan_.policy);
    working_.NoteHeads(Fence{beat.fence()}, beat.heads(), Now());
  }
  for (const v1::Heartbeat::TaskBeat& beat : heartbeat.tasks()) {
    std::optional<state::event::RanksDiagnosed> found =
        state::Diagnose(working_, Fence{beat.fence()}, Now());
    if (found.has_value()) Post(*std::move(found), nullptr);
  }
  // A read: its reply waits for all batches before it (invariant 3 of apply.h).
  Outcome read;
  std::vector<v1::Permit> permits = state::PermitsFor(working_, stream->worker, plan_.policy);
  Append(std::move(read),
         [this, epoch = epoch_, stream, permits, n = heartbeat.n()](const Outcome&) {
           if (epoch == epoch_) {
             leases_->PermitSent(stream->worker, Now().ms);
             heartbeat_reply_(stream, n, permits);
           }
         });
  ArmLeases();
}

void CoordinatorNode::OnWorkerEvent(const StreamPtr& stream, Event event) {
  if (!up_) {
    return;
  }
  leases_->Heard(stream->worker, stream->session, Now().ms);
  Post(std::move(event), nullptr);
  ArmLeases();
}

// ---- timers -----------------------------------------------------------------------------------

void CoordinatorNode::ArmTimers() {
  if (!up_) {
    return;
  }
  int64_t at = std::numeric_limits<int64_t>::max();
  if (!working_.timers().empty()) {
    at = working_.timers().begin()->at_ms - base_ms_ + start_ms_;
  }
  if (!working_.wall_timers().empty()) {
    at = std::min(at, working_.wall_timers().begin()->at_ms - wall_offset_ms_);
  }
  at = std::max(at, world_.now_ms());
  if (at >= armed_timer_ms_ || at == std::numeric_limits<int64_t>::max()) {
    return;
  }
  armed_timer_ms_ = at;
  world_.At(at, [this, epoch = epoch_] {
    if (epoch == epoch_) FireTimers();
  });
}

void CoordinatorNode::FireTimers() {
  armed_timer_ms_ = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < 1000; ++i) {
    std::optional<state::Timer> due;
    if (!working_.timers().empty() && working_.timers().begin()->at_ms <= Now().ms) {
      due = *working_.timers().begin();
    } else if (!working_.wall_timers().empty() &&
               working_.wall_timers().begin()->at_ms <= Now().wall_ms) {
      due = *working_.wall_timers().begin();
    }
    if (!due.has_value()) {
      ArmTimers();
      return;
    }
    const uint64_t before = working_.next_seq();
    Append(Decide(state::event::TimerFired{*due}), nullptr);
    if (working_.next_seq() == before) {
      world_.Violate("timers", Str("timer ", state::Name(due->kind), " stays due"));
      return;
    }
  }
  world_.Violate("timers", "they never end");
}

void CoordinatorNode::ArmLeases() {
  const int64_t next = leases_->NextMs();
  if (next == std::numeric_limits<int64_t>::max()) {
    return;
  }
  const int64_t at = std::max(next - base_ms_ + start_ms_, world_.now_ms());
  if (at >= armed_lease_ms_) {
    return;
  }
  armed_lease_ms_ = at;
  world_.At(at, [this, epoch = epoch_] {
    if (epoch == epoch_) PollLeases();
  });
}

void CoordinatorNode::PollLeases() {
  armed_lease_ms_ = std::numeric_limits<int64_t>::max();
  for (Event& event : leases_->Poll(Now().ms)) {
    Post(std::move(event), nullptr);
  }
  ArmLeases();
}

// ---- scheduler --------------------------------------------------------------------------------

void CoordinatorNode::WakeScheduler() {
  if (pass_armed_ || !up_) {
    return;
  }
  pass_armed_ = true;
  // D10 (5): not before the workers with allocations are back, or 15 s.
  size_t expected = 0;
  for (const auto& [id, entry] : working_.nodes()) {
    expected += entry.booked.empty() || returned_.contains(id) ? 0 : 1;
  }
  const int64_t since = world_.now_ms() - start_ms_;
  const int64_t wait = expected > 0 && since < 15'000 ? 500 : world_.Between(2, 100);
  world_.After(wait, [this, epoch = epoch_, ready = wait != 500] {
    if (epoch != epoch_) {
      return;
    }
    pass_armed_ = false;
    if (ready) {
      RunScheduler();
    } else {
      WakeScheduler();
    }
  });
}

void CoordinatorNode::RunScheduler() {
  // At times a pass sees and places next to nothing and leaves the rest to the next one.
  const schedule::PassLimits limits =
      world_.Chance(0.2) ? schedule::PassLimits{.jobs_max = 2, .placed_max = 1, .explain = false}
                         : schedule::kOneOfMany;
  schedule::PassResult pass =
      schedule::RunPass(schedule::MakeSnapshot(working_, Now(), limits), limits);
  if (pass.cut) WakeScheduler();
  // The pass runs on its own thread: its decisions come back to a state that has moved on.
  const int64_t delay = world_.Chance(0.1) ? world_.Between(100, 2'000) : world_.Between(0, 20);
  for (state::event::AttemptPlaced& placed : pass.placed) {
    world_.After(delay, [this, epoch = epoch_, placed = std::move(placed)] {
      if (epoch == epoch_) {
        Post(placed, [this](const Outcome& outcome) {
          if (!outcome.status.ok()) WakeScheduler();
        });
      }
    });
  }
  for (state::event::JobInfeasible& infeasible : pass.infeasible) {
    world_.After(delay, [this, epoch = epoch_, infeasible = std::move(infeasible)] {
      if (epoch == epoch_) Post(infeasible, nullptr);
    });
  }
}

}  // namespace heddle::simulation
