#include "tests/simulation/worker_node.h"

#include <algorithm>

#include "coordinator/state/names.h"
#include "tests/simulation/gang.h"

namespace heddle::simulation {

namespace v1 = heddle::v1;

namespace {

constexpr size_t kUnansweredBeatsMax = 3;
// After this much silence the transport's own questions have found the other end dead.
constexpr int64_t kKeepaliveMs = 30'000;

}  // namespace

bool SimTask::RankLives(uint32_t rank) const {
  const bool here =
      std::find(assign.ranks().begin(), assign.ranks().end(), rank) != assign.ranks().end();
  const bool exited =
      std::any_of(report.exits().begin(), report.exits().end(),
                  [rank](const v1::RankOutcome& exit) { return exit.rank() == rank; });
  return here && !exited;
}

// ---- life -------------------------------------------------------------------------------------

void WorkerNode::StartDaemon() {
  if (daemon_up_) {
    return;
  }
  daemon_up_ = true;
  awake_ms_ = 0;
  ++daemon_epoch_;
  world_.Trace(Str(id_, " daemon starts"));
  RegisterSoon(world_.Between(0, 300));
}

void WorkerNode::CrashDaemon() {
  if (!daemon_up_) {
    return;
  }
  world_.Trace(Str(id_, " daemon crashes"));
  daemon_up_ = false;
  ++daemon_epoch_;
  Disconnect();
  for (auto& [fence, task] : tasks_) {
    task->acked_seq = 0;  // it says everything again
    // A full disk took no numbers: the next daemon counts on from an old one.
    if (world_.Chance(0.1)) {
      const uint64_t lost = static_cast<uint64_t>(world_.Between(1, 4));
      task->report.set_seq(task->report.seq() - std::min(lost, task->report.seq()));
    }
  }
}

void WorkerNode::PauseDaemon(int64_t length_ms) {
  if (!daemon_up_ || awake_ms_ > world_.now_ms()) {
    return;
  }
  world_.Trace(Str(id_, " daemon stands still"));
  awake_ms_ = world_.now_ms() + length_ms;
  world_.After(kKeepaliveMs, [this, stream = stream_, until = awake_ms_] {
    if (stream != nullptr && stream == stream_ && awake_ms_ == until && until > world_.now_ms()) {
      network_.Break(stream);
    }
  });
}

void WorkerNode::WhenAwake(std::function<void()> work) {
  if (awake_ms_ <= world_.now_ms()) {
    work();
    return;
  }
  world_.At(awake_ms_, [this, epoch = daemon_epoch_, work = std::move(work)] {
    if (epoch == daemon_epoch_ && daemon_up_) WhenAwake(work);
  });
}

void WorkerNode::Reboot() {
  world_.Trace(Str(id_, " reboots"));
  CrashDaemon();
  ++instance_;
  for (auto it = tasks_.begin(); it != tasks_.end();) {
    SimTask& task = *it->second;
    EndProcesses(task);
    if (state::IsFinal(task.report.state()) || world_.Chance(0.5)) {
      task.report.set_state(state::IsFinal(task.report.state()) ? task.report.state()
                                                                : v1::TASK_STATE_GONE);
      // The number in the folder is not synced with each report: power loss may take it back.
      const uint64_t lost = world_.Chance(0.3) ? static_cast<uint64_t>(world_.Between(1, 4)) : 0;
      task.report.set_seq(task.report.seq() + 1 - std::min(lost, task.report.seq()));
      ++it;
    } else {
      it = tasks_.erase(it);
    }
  }
}

SimTask* WorkerNode::SomeLiveTask() {
  std::vector<SimTask*> live;
  for (auto& [fence, task] : tasks_) {
    if (task->processes) {
      live.push_back(task.get());
    }
  }
  return live.empty()
             ? nullptr
             : live[static_cast<size_t>(world_.Between(0, static_cast<int64_t>(live.size()) - 1))];
}

bool WorkerNode::KillSomeRank() {
  SimTask* task = SomeLiveTask();
  if (task == nullptr) {
    return false;
  }
  for (const uint32_t rank : task->assign.ranks()) {
    if (task->RankLives(rank)) {
      v1::RankOutcome outcome;
      outcome.set_rank(rank);
      outcome.set_at(world_.now_ms());
      outcome.set_step(task->report.step());
      if (world_.Chance(0.6)) {
        outcome.set_signal(9);
      } else if (world_.Chance(0.5)) {
        outcome.set_exit_code(1);
        if (world_.Chance(0.3)) {
          const auto step = static_cast<int64_t>(outcome.step());
          outcome.set_exit_code(90);
          outcome.set_category("ROLLBACK");
          outcome.set_rollback_to_step(static_cast<uint64_t>(world_.Between(0, step)));
          outcome.mutable_skip()->set_first(outcome.rollback_to_step() * 8);
          outcome.mutable_skip()->set_count(8);
        }
      } else {
        outcome.set_oom(true);
        outcome.set_signal(9);
      }
      world_.Trace(Str(id_, " rank ", rank, " of ", task->fence(), " dies"));
      RankExited(task->fence(), std::move(outcome));
      return true;
    }
  }
  return false;
}

void WorkerNode::FreezeSomeRank() {
  SimTask* task = SomeLiveTask();
  if (task != nullptr && !task->command()) {
    gangs_(task->assign).Freeze(task->assign.ranks(0));
  }
}

bool WorkerNode::KillSomeShim() {
  SimTask* task = SomeLiveTask();
  if (task == nullptr) {
    return false;
  }
  world_.Trace(Str(id_, " shim of ", task->fence(), " dies"));
  Kill(*task, "SHIM_LOST", "CONTROL_PLANE");
  return true;
}

// ---- connection -------------------------------------------------------------------------------

void WorkerNode::RegisterSoon(int64_t delay_ms) {
  world_.After(delay_ms, [this, epoch = daemon_epoch_] {
    if (epoch != daemon_epoch_ || !daemon_up_) {
      return;
    }
    WhenAwake([this] {
      if (stream_ == nullptr) RegisterNow();
    });
  });
}

void WorkerNode::RegisterNow() {
  session_ = std::max<uint64_t>(session_ + 1, static_cast<uint64_t>(world_.now_ms()));
  v1::RegisterRequest request;
  request.set_worker_id(id_);
  request.set_instance(Str("boot", instance_));
  request.set_boot(instance_);
  request.set_session(session_);
  request.set_host(id_);
  request.mutable_capacity()->set_cpus(plan_.cpus);
  request.mutable_capacity()->set_memory_bytes(uint64_t{1} << 33);
  for (const auto& [fence, task] : tasks_) {
    *request.add_tasks() = task->report;
  }
  const int64_t sent = world_.now_ms();
  network_.Send(id_, kCoordinator, [this, request, sent, epoch = daemon_epoch_] {
    coordinator_.OnRegister(request, [this, session = request.session(), sent, epoch](
                                         const state::Outcome& outcome, const StreamPtr& stream) {
      network_.Send(kCoordinator, id_, [this, session, sent, epoch, outcome, stream] {
        if (epoch != daemon_epoch_ || !daemon_up_) {
          return;
        }
        WhenAwake([this, session, sent, outcome, stream] {
          if (session == session_ && stream_ == nullptr) {
            heard_ms_ = sent;
            OnRegistered(session, outcome, stream);
          }
        });
      });
    });
  });
  RegisterSoon(world_.Between(1'500, 3'000));
}

void WorkerNode::OnRegistered(uint64_t session, const state::Outcome& outcome,
                              const StreamPtr& stream) {
  if (!outcome.status.ok() || stream->broken) {
    return;  // the loop of RegisterSoon tries again
  }
  stream_ = stream;
  beat_sent_ms_.clear();
  stream->on_break_down = [this, session] {
    if (session == session_) Disconnect();
  };
  for (auto& [fence, task] : tasks_) {
    task->contact_ms = std::max(task->contact_ms, heard_ms_);
  }
  for (const v1::RegisterReply::TaskDecision& decision : outcome.registration->tasks()) {
    const auto it = tasks_.find(decision.fence());
    if (it == tasks_.end()) {
      continue;
    }
    if (decision.verdict() == v1::TASK_VERDICT_KILL_FENCED) {
      OnKillFenced(decision.fence());
    } else if (decision.verdict() == v1::TASK_VERDICT_FORGET &&
               state::IsFinal(it->second->report.state())) {
      tasks_.erase(it);
    }
  }
  Beat(session);
  ResendLoop(session);
}

void WorkerNode::Disconnect() {
  if (stream_ == nullptr) {
    return;
  }
  stream_->on_break_down = nullptr;
  network_.Break(stream_);
  stream_ = nullptr;
  RegisterSoon(world_.Between(100, 1'500));
}

void WorkerNode::ToCoordinator(state::Event event) {
  if (stream_ == nullptr) {
    return;
  }
  WhenAwake([this, stream = stream_, event = std::move(event)] {
    if (stream != stream_) {
      return;
    }
    network_.SendOn(stream, true, [this, stream, event] {
      coordinator_.OnStream(stream);
      coordinator_.OnWorkerEvent(stream, event);
    });
  });
}

void WorkerNode::Beat(uint64_t session) {
  if (stream_ == nullptr || session != session_) {
    return;
  }
  if (awake_ms_ > world_.now_ms()) {
    world_.At(awake_ms_, [this, session] { Beat(session); });
    return;
  }
  if (beat_sent_ms_.size() >= kUnansweredBeatsMax) {
    Disconnect();
    return;
  }
  v1::Heartbeat heartbeat;
  heartbeat.set_n(++beat_);
  beat_sent_ms_[beat_] = world_.now_ms();
  for (const auto& [fence, task] : tasks_) {
    v1::Heartbeat::TaskBeat& beat = *heartbeat.add_tasks();
    beat.set_fence(fence);
    beat.set_step(task->report.step());
    for (const uint32_t rank : task->assign.ranks()) {
      if (!task->command() && task->RankLives(rank) && task->processes) {
        *beat.add_heads() = gangs_(task->assign).Head(rank);
      }
    }
  }
  network_.SendOn(stream_, true, [this, stream = stream_, heartbeat] {
    coordinator_.OnStream(stream);
    coordinator_.OnHeartbeat(stream, heartbeat);
  });
  const int64_t interval = plan_.policy.heartbeat_interval_ms;
  world_.After(static_cast<int64_t>(static_cast<double>(interval) * rate_),
               [this, session] { Beat(session); });
}

void WorkerNode::OnHeartbeatReply(const StreamPtr& stream, uint64_t n,
                                  const std::vector<v1::Permit>& permits, int64_t granted_ms) {
  if (stream != stream_ || !daemon_up_) {
    return;
  }
  WhenAwake([this, stream, n, permits, granted_ms] {
    if (stream == stream_) TakeHeartbeatReply(n, permits, granted_ms);
  });
}

void WorkerNode::TakeHeartbeatReply(uint64_t n, const std::vector<v1::Permit>& permits,
                                    int64_t granted_ms) {
  const auto sent = beat_sent_ms_.find(n);
  if (sent == beat_sent_ms_.end()) {
    return;
  }
  heard_ms_ = std::max(heard_ms_, sent->second);
  const int64_t from = plan_.mutant == Mutant::kPermitFromReceipt ? world_.now_ms() : sent->second;
  for (auto& [fence, task] : tasks_) {
    task->contact_ms = std::max(task->contact_ms, sent->second);
  }
  for (const v1::Permit& permit : permits) {
    if (SimTask* one = task(permit.fence()); one != nullptr) {
      const auto ttl = static_cast<int64_t>(static_cast<double>(permit.ttl_ms()) * rate_);
      one->permit_until_ms = std::max(one->permit_until_ms, from + ttl);
      checkers_.OnPermit(Fence{permit.fence()}, granted_ms, from + ttl);
    }
  }
  beat_sent_ms_.erase(beat_sent_ms_.begin(), std::next(sent));
}

// Reports until acknowledged, opens and seals until answered.
void WorkerNode::ResendLoop(uint64_t session) {
  if (stream_ == nullptr || session != session_) {
    return;
  }
  for (const auto& [fence, task] : tasks_) {
    Refresh(*task);
  }
  world_.After(3'000, [this, session] { ResendLoop(session); });
}

void WorkerNode::Refresh(SimTask& task) {
  if (task.report.seq() > task.acked_seq) {
    SendReport(task);
  }
  if (task.open.has_value()) {
    ToCoordinator(state::event::CheckpointOpened{id_, session_, *task.open, true});
  }
  for (const auto& [rank, seal] : task.seals) {
    ToCoordinator(state::event::ShardSealed{id_, session_, seal});
  }
}

// ---- commands ---------------------------------------------------------------------------------

SimTask* WorkerNode::task(uint64_t fence) {
  const auto it = tasks_.find(fence);
  return it == tasks_.end() ? nullptr : it->second.get();
}

void WorkerNode::OnEffect(const StreamPtr& stream, const state::Effect& effect) {
  if (stream != stream_ || !daemon_up_) {
    return;  // an old session's
  }
  WhenAwake([this, stream, effect] {
    if (stream == stream_) TakeEffect(effect);
  });
}

void WorkerNode::TakeEffect(const state::Effect& effect) {
  if (const auto* assign = std::get_if<state::effect::SendAssign>(&effect)) {
    OnAssign(assign->assign);
  } else if (const auto* start = std::get_if<state::effect::SendStart>(&effect)) {
    OnStart(start->start);
  } else if (const auto* stop = std::get_if<state::effect::SendStop>(&effect)) {
    OnStop(stop->stop);
  } else if (const auto* kill = std::get_if<state::effect::SendKillFenced>(&effect)) {
    OnKillFenced(kill->kill.fence());
  } else if (const auto* forget = std::get_if<state::effect::SendForget>(&effect)) {
    const auto it = tasks_.find(forget->forget.fence());
    if (it != tasks_.end() && state::IsFinal(it->second->report.state())) {
      tasks_.erase(it);
    }
  } else if (const auto* ack = std::get_if<state::effect::SendAck>(&effect)) {
    if (SimTask* one = task(ack->ack.fence()); one != nullptr) {
      one->acked_seq = std::max<uint64_t>(one->acked_seq, ack->ack.seq());
      if (ack->ack.seq() > one->report.seq()) {
        one->report.set_seq(ack->ack.seq());
        Report(*one);
      }
    }
  } else if (const auto* reply = std::get_if<state::effect::SendCheckpointReply>(&effect)) {
    OnCheckpointReply(reply->reply);
  } else if (const auto* collect = std::get_if<state::effect::CollectStacks>(&effect)) {
    OnCollectStacks(collect->collect);
  } else if (std::holds_alternative<state::effect::SendStale>(effect)) {
    Disconnect();
  }
}

void WorkerNode::OnCollectStacks(const v1::CollectStacks& collect) {
  v1::StackReport report;
  report.set_job(collect.job());
  report.set_fence(collect.fence());
  report.set_task(collect.task());
  if (const SimTask* one = task(collect.fence()); one != nullptr) {
    for (const uint32_t rank : one->assign.ranks()) {
      v1::RankStack& stack = *report.add_stacks();
      stack.set_rank(rank);
      stack.set_text("thread 1 sleeps");
    }
  }
  ToCoordinator(state::event::StacksReported{id_, session_, std::move(report)});
}

// Said once: an Assign that comes again is refused again.
void WorkerNode::Refuse(const v1::TaskAssignment& assign, const char* why) {
  v1::TaskReport report;
  report.set_job(assign.job());
  report.set_fence(assign.fence());
  report.set_task(assign.task());
  report.set_seq(1);
  report.set_state(v1::TASK_STATE_EXITED);
  report.set_detail(why);
  ToCoordinator(state::event::TaskReported{id_, session_, report});
}

void WorkerNode::OnAssign(const v1::TaskAssignment& assign) {
  if (SimTask* known = task(assign.fence()); known != nullptr) {
    SendReport(*known);
    return;
  }
  uint64_t& highest = highest_fence_[assign.job()];
  if (assign.fence() < highest) {
    Refuse(assign, "a newer fence was seen");
    return;
  }
  if (world_.Chance(plan_.refuse)) {
    highest = assign.fence() + 1;  // for good
    Refuse(assign, "no room on disk");
    return;
  }
  highest = assign.fence();
  auto fresh = std::make_unique<SimTask>();
  fresh->assign = assign;
  fresh->contact_ms = world_.now_ms();
  fresh->report.set_job(assign.job());
  fresh->report.set_fence(assign.fence());
  fresh->report.set_task(assign.task());
  fresh->report.set_state(v1::TASK_STATE_ASSIGNED);
  SimTask& task = *(tasks_[assign.fence()] = std::move(fresh));
  Spawn(task.fence());
}

// The folder is synced, then the shim spawns the ranks at once (T1, T2).
void WorkerNode::Spawn(uint64_t fence) {
  SimTask& task = *tasks_.at(fence);
  task.processes = true;
  task.report.set_acknowledged(true);
  checkers_.OnProcesses(id_, JobId{task.assign.job()}, Fence{fence},
                        task.assign.cpus_per_rank() * task.assign.ranks_size(), task.command(),
                        true);
  Gang& gang = gangs_(task.assign);
  for (const uint32_t rank : task.assign.ranks()) {
    gang.AddRank(rank, this);
  }
  WatchOrphan(fence);
  SetState(task, v1::TASK_STATE_PREPARING);
  world_.After(world_.Between(20, 800), [this, fence] {
    SimTask* one = this->task(fence);
    if (one != nullptr && one->processes && one->report.state() == v1::TASK_STATE_PREPARING) {
      one->report.set_data_address(id_);
      SetState(*one, v1::TASK_STATE_READY);
      TryStart(*one);
    }
  });
}

void WorkerNode::OnStart(const v1::StartTask& start) {
  SimTask* one = task(start.fence());
  if (one == nullptr) {
    return;
  }
  one->start_wanted = true;
  TryStart(*one);
}

void WorkerNode::TryStart(SimTask& task) {
  if (!task.start_wanted || task.started || !task.processes ||
      task.report.state() != v1::TASK_STATE_READY) {
    return;
  }
  task.started = true;
  SetState(task, v1::TASK_STATE_RUNNING);
  const uint64_t fence = task.fence();
  if (!task.command()) {
    Gang& gang = gangs_(task.assign);
    for (const uint32_t rank : task.assign.ranks()) {
      world_.After(world_.Between(5, 400), [&gang, rank] { gang.Join(rank); });
    }
    return;
  }
  const int64_t length = 200 * task.assign.config().training().max_steps();
  for (const uint32_t rank : task.assign.ranks()) {
    world_.After(length + world_.Between(0, 500), [this, fence, rank] {
      SimTask* one = this->task(fence);
      if (one == nullptr || !one->processes || !one->RankLives(rank)) {
        return;
      }
      v1::RankOutcome outcome;
      outcome.set_rank(rank);
      outcome.set_exit_code(0);
      outcome.set_at(world_.now_ms());
      RankExited(fence, std::move(outcome));
    });
  }
}

void WorkerNode::OnStop(const v1::StopTask& stop) {
  SimTask* one = task(stop.fence());
  if (one == nullptr) {
    return;
  }
  if (!one->processes) {
    SendReport(*one);
    return;
  }
  const bool harder = !one->stop.has_value() || (stop.kill_now() && !one->stop->kill_now());
  if (!harder) {
    SendReport(*one);
    return;
  }
  one->stop = stop;
  gangs_(one->assign).OnStop(stop);
  SetState(*one, v1::TASK_STATE_STOPPING);
  // The shim's ladder: grace, TERM, KILL.
  const int64_t kill_in = stop.kill_now() ? world_.Between(1, 2'000)
                                          : stop.stop().grace_ms() + world_.Between(1, 10'000);
  const uint64_t epoch = ++one->kill_epoch;
  world_.After(kill_in, [this, fence = stop.fence(), epoch] {
    SimTask* again = task(fence);
    if (again != nullptr && again->processes && again->kill_epoch == epoch) Kill(*again, "stop");
  });
}

void WorkerNode::OnKillFenced(uint64_t fence) {
  SimTask* one = task(fence);
  if (one == nullptr) {
    return;
  }
  one->permit_until_ms = 0;
  if (one->processes) {
    world_.After(world_.Chance(0.2) ? world_.Between(0, 3'000) : world_.Between(0, 100),
                 [this, fence] {
                   SimTask* again = task(fence);
                   if (again != nullptr && again->processes) Kill(*again, "fenced");
                 });
  } else {
    SendReport(*one);
  }
}

void WorkerNode::OnCheckpointReply(const v1::RankCheckpointReply& reply) {
  SimTask* one = task(reply.fence());
  if (one == nullptr) {
    return;
  }
  for (const uint32_t rank : reply.ranks()) {
    one = task(reply.fence());
    if (one == nullptr || !one->RankLives(rank)) {
      continue;
    }
    if (one->open.has_value() && rank == 0 &&
        one->open->open().request() == reply.reply().request()) {
      one->open.reset();
    }
    const auto seal = one->seals.find(rank);
    if (seal != one->seals.end() && seal->second.seal().step() == reply.reply().step()) {
      one->seals.erase(seal);
    }
    gangs_(one->assign).OnVerdict(rank, reply.reply());
  }
}

// ---- reports ----------------------------------------------------------------------------------

void WorkerNode::SendReport(const SimTask& task) {
  ToCoordinator(state::event::TaskReported{id_, session_, task.report});
}

void WorkerNode::Report(SimTask& task) {
  task.report.set_seq(task.report.seq() + 1);
  SendReport(task);
}

void WorkerNode::SetState(SimTask& task, v1::TaskState state) {
  task.report.set_state(state);
  Report(task);
}

void WorkerNode::EndProcesses(SimTask& task) {
  if (!task.processes) {
    return;
  }
  task.processes = false;
  task.open.reset();
  task.seals.clear();
  checkers_.OnProcesses(id_, JobId{task.assign.job()}, Fence{task.fence()},
                        task.assign.cpus_per_rank() * task.assign.ranks_size(), task.command(),
                        false);
}

void WorkerNode::Kill(SimTask& task, const char* why, const char* category) {
  for (const uint32_t rank : task.assign.ranks()) {
    if (task.RankLives(rank)) {
      v1::RankOutcome& exit = *task.report.add_exits();
      exit.set_rank(rank);
      exit.set_signal(9);
      exit.set_category(category);
      exit.set_detail(why);
      exit.set_at(world_.now_ms());
      exit.set_step(task.report.step());
    }
  }
  EndProcesses(task);
  gangs_(task.assign).OnDeath(task.assign.ranks(0));
  SetState(task, v1::TASK_STATE_EXITED);
}

void WorkerNode::WatchOrphan(uint64_t fence) {
  SimTask* one = task(fence);
  if (one == nullptr || !one->processes) {
    return;
  }
  const auto limit = static_cast<int64_t>(static_cast<double>(plan_.policy.max_orphan_ms) * rate_);
  if (world_.now_ms() - one->contact_ms >= limit) {
    world_.Trace(Str(id_, " orphan ", fence));
    Kill(*one, "orphan", "CONTROL_PLANE");
    return;
  }
  world_.At(one->contact_ms + limit, [this, fence] { WatchOrphan(fence); });
}

// ---- ranks ------------------------------------------------------------------------------------

bool WorkerNode::HoldsPermit(uint64_t fence) {
  const SimTask* one = task(fence);
  return one != nullptr && one->permit_until_ms > world_.now_ms();
}

void WorkerNode::RankJoined(uint64_t fence, uint32_t rank, uint64_t start_step) {
  SimTask* one = task(fence);
  if (one == nullptr || !one->processes || !one->RankLives(rank)) {
    return;
  }
  one->report.add_joined_ranks(rank);
  one->report.set_start_step(start_step);
  one->report.set_step(start_step);
  Report(*one);
}

void WorkerNode::RankExited(uint64_t fence, v1::RankOutcome outcome) {
  SimTask* one = task(fence);
  if (one == nullptr || !one->processes || !one->RankLives(outcome.rank())) {
    return;
  }
  const bool dies =
      outcome.signal() != 0 || (outcome.exit_code() != 0 && outcome.exit_code() != 85);
  const uint32_t rank = outcome.rank();
  *one->report.add_exits() = std::move(outcome);
  if (one->report.exits_size() == one->assign.ranks_size()) {
    EndProcesses(*one);
    SetState(*one, v1::TASK_STATE_EXITED);
  } else {
    Report(*one);
  }
  if (dies) {
    gangs_(one->assign).OnDeath(rank);
  }
}

void WorkerNode::SetStep(uint64_t fence, uint64_t step) {
  if (SimTask* one = task(fence); one != nullptr) {
    one->report.set_step(step);
  }
}

void WorkerNode::AskOpen(uint64_t fence, uint32_t rank, uint64_t step) {
  SimTask* one = task(fence);
  if (one == nullptr) {
    return;
  }
  v1::RankOpenCheckpoint open;
  open.set_job(one->assign.job());
  open.set_fence(fence);
  open.set_rank(rank);
  open.mutable_open()->set_request(step * 1000 + 999);
  open.mutable_open()->set_step(step);
  one->open = open;
  ToCoordinator(state::event::CheckpointOpened{id_, session_, open, !world_.Chance(0.02)});
}

void WorkerNode::Seal(uint64_t fence, v1::RankSealShard seal) {
  SimTask* one = task(fence);
  if (one == nullptr) {
    return;
  }
  one->seals[seal.rank()] = seal;
  ToCoordinator(state::event::ShardSealed{id_, session_, std::move(seal)});
}

void WorkerNode::ReportDamage(uint64_t fence, const v1::CheckpointRecord& record) {
  v1::DamageReport report;
  report.set_job(record.job());
  report.set_fence(fence);
  report.set_checkpoint_fence(record.fence());
  report.set_checkpoint_step(record.step());
  report.set_detail("a block does not match");
  if (SimTask* one = task(fence); one != nullptr) {
    report.set_job(one->assign.job());
  }
  ToCoordinator(state::event::CheckpointDamaged{id_, session_, report});
}

}  // namespace heddle::simulation
