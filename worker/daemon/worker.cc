#include "worker/daemon/worker.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include <boost/asio/post.hpp>

#include "base/log/log.h"
#include "worker/control/control_frame.h"
#include "worker/control/rank_page.h"

namespace heddle::worker {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr milliseconds kSettleStep{10};
constexpr int kSettleSteps = 200;
// Heartbeats without an answer after which the stream counts as dead (L11: SUSPECT at 3).
constexpr size_t kUnansweredBeatsMax = 3;

std::string HostName() {
  char host[256] = {};
  gethostname(host, sizeof(host) - 1);
  return host;
}

}  // namespace

Worker::Worker(boost::asio::io_context* io, const Clock* clock, const Options& options,
               WorkerState* state, std::shared_ptr<grpc::Channel> channel)
    : io_(io),
      clock_(clock),
      options_(options),
      state_(state),
      cgroups_(FindCgroupParents()),
      cpus_(CpuTable::DefaultPath(), GrantedCpus(), numa::ReadNodes()),
      gpus_(GpuTable::DefaultPath(), FindGpus(GpuSourcesHere(), options.gpus)),
      disk_(1),
      beat_timer_(*io),
      settle_timer_(*io),
      logs_(io, channel, state->worker_id()),
      link_(io, channel,
            {[this] { return MakeRegister(); },
             [this](const v1::RegisterReply& reply) { return OnRegistered(reply); },
             [this](const v1::CoordMsg& message) { OnMessage(message); },
             [this](const Status& why) { OnLost(why); }}) {}

Worker::~Worker() { disk_.join(); }

void Worker::Start() {
  AdoptTasks();
  RegisterWhenSettled(kSettleSteps);
}

void Worker::AdoptTasks() {
  for (const std::string& path : TaskFolder::List(state_->tasks_dir())) {
    StatusOr<TaskFolder> folder = TaskFolder::Open(path);
    if (!folder.ok()) {
      // Never whole, so never acknowledged and never started; or damaged since.
      HEDDLE_WARN("task folder removed", {"task", path}, {"why", Message(folder.status())});
      TaskFolder::EndProcesses(path);
      TaskFolder::Remove(path);
      continue;
    }
    logs_.Watch(*folder);
    if (folder->IsForgotten()) {
      ForgetFolder(*folder);
      continue;
    }
    const TaskKey key = folder->key();
    uint64_t& highest = highest_fence_[folder->assignment().job()];
    highest = std::max(highest, key.fence);
    const bool same = folder->instance() == state_->instance();
    TaskHost* const host = this;
    auto runner = std::make_shared<TaskRunner>(host, *std::move(folder));
    tasks_[key] = runner;
    runner->Adopt(same);
  }
}

// The first registration tells the truth about adopted tasks: it waits for their shims' replays, at
// most 2 s.
void Worker::RegisterWhenSettled(int looks_left) {
  const bool settled = std::all_of(tasks_.begin(), tasks_.end(),
                                   [](const auto& entry) { return entry.second->settled(); });
  if (settled || looks_left == 0) return link_.Start();
  settle_timer_.expires_after(kSettleStep);
  settle_timer_.async_wait([this, looks_left](const boost::system::error_code& error) {
    if (!error) RegisterWhenSettled(looks_left - 1);
  });
}

v1::RegisterRequest Worker::MakeRegister() {
  session_ = state_->NewSession();
  registered_at_ns_ = clock_->NowSteady();
  v1::RegisterRequest request;
  request.set_worker_id(state_->worker_id());
  request.set_instance(state_->instance());
  request.set_boot(state_->boot());
  request.set_session(session_);
  request.set_highest_term(state_->highest_term());
  request.set_host(HostName());
  *request.mutable_capacity() = MakeCapacity(options_, gpus_.devices());
  request.set_version(HEDDLE_VERSION);
  request.set_protocol(control::kProtocolVersion);
  request.set_cluster_id(state_->cluster_id());
  for (const auto& [key, runner] : tasks_) *request.add_tasks() = runner->NewestReport();
  return request;
}

Status Worker::OnRegistered(const v1::RegisterReply& reply) {
  RETURN_IF_ERROR(state_->Accept(reply.cluster_id(), reply.term()));
  HEDDLE_INFO("registered", {"worker", state_->worker_id()}, {"term", reply.term()},
              {"tasks", tasks_.size()});
  if (reply.heartbeat_interval_ms() > 0) {
    heartbeat_interval_ns_ = reply.heartbeat_interval_ms() * 1'000'000;
  }
  if (reply.permit_ttl_ms() > 0) permit_ttl_ns_ = reply.permit_ttl_ms() * 1'000'000;
  if (reply.max_orphan_ms() > 0) max_orphan_ns_ = reply.max_orphan_ms() * 1'000'000;
  checkpoint_root_ = reply.checkpoint_root();
  for (const auto& [key, runner] : tasks_) {
    runner->RefreshContact(registered_at_ns_, max_orphan_ns_);
  }
  for (const v1::RegisterReply::TaskDecision& decision : reply.tasks()) {
    TaskRunner* const runner = Find(decision.fence(), decision.task());
    if (runner == nullptr) continue;
    switch (decision.verdict()) {
      case v1::TASK_VERDICT_ADOPT:
        runner->OnAssignedAgain();
        break;
      case v1::TASK_VERDICT_STOP: {
        // The order with its grace follows on the stream; this is its forerunner.
        HEDDLE_INFO("task is to stop", {"task", ToText(runner->key())},
                    {"reason", decision.reason()});
        break;
      }
      case v1::TASK_VERDICT_KILL_FENCED:
        runner->OnKill(Str("KILL_FENCED: ", decision.reason()));
        break;
      case v1::TASK_VERDICT_FORGET:
        Forget(runner->key());
        break;
    }
  }
  sent_beats_.clear();
  Beat();
  for (const auto& [key, runner] : tasks_) runner->Resend();
  logs_.Connect();
  return OkStatus();
}

void Worker::OnLost(const Status&) {
  beat_timer_.cancel();
  sent_beats_.clear();
  DrainTasks();
}

// ---- heartbeats -------------------------------------------------------------------------------

void Worker::Beat() {
  if (!link_.connected()) return;
  if (sent_beats_.size() >= kUnansweredBeatsMax) {
    return link_.Restart(DeadlineExceeded(Str(sent_beats_.size(), " heartbeats unanswered")));
  }
  v1::WorkerMsg message;
  v1::Heartbeat* beat = message.mutable_heartbeat();
  beat->set_n(++heartbeat_);
  for (const auto& [key, runner] : tasks_) *beat->add_tasks() = runner->Beat();
  beat->set_free_disk_bytes(FreeDiskBytes(state_->dir()));
  sent_beats_.emplace_back(heartbeat_, clock_->NowSteady());
  Send(std::move(message));
  BeatLater();
}

void Worker::BeatLater() {
  beat_timer_.expires_after(nanoseconds(heartbeat_interval_ns_));
  beat_timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) Beat();
  });
}

void Worker::OnHeartbeatReply(const v1::HeartbeatReply& reply) {
  int64_t sent_at_ns = 0;
  while (!sent_beats_.empty() && sent_beats_.front().first <= reply.n()) {
    if (sent_beats_.front().first == reply.n()) sent_at_ns = sent_beats_.front().second;
    sent_beats_.pop_front();
  }
  if (sent_at_ns == 0) return;  // of another stream
  for (const auto& [key, runner] : tasks_) {
    runner->RefreshContact(sent_at_ns, max_orphan_ns_);
    if (!reply.nothing_kept()) runner->OnHeartbeatReply(reply.n());
  }
  for (const v1::Permit& permit : reply.permits()) {
    const int64_t ttl_ns = permit.ttl_ms() > 0 ? permit.ttl_ms() * 1'000'000 : permit_ttl_ns_;
    for (const auto& [key, runner] : tasks_) {
      // Counted from when the question left: an answer that was under way for long grants less.
      if (key.fence == permit.fence()) runner->PublishPermit(sent_at_ns + ttl_ns);
    }
  }
}

// ---- messages ---------------------------------------------------------------------------------

void Worker::OnMessage(const v1::CoordMsg& message) {
  if (message.has_term() && message.term() < state_->highest_term()) {
    HEDDLE_WARN("message of an old term ignored", {"term", message.term()});
    return;
  }
  if (message.has_session() && message.session() != session_ && !message.has_stale()) return;
  if (message.has_heartbeat()) return OnHeartbeatReply(message.heartbeat());
  if (message.has_assign()) return OnAssign(message.assign());
  if (message.has_forget()) return Forget({message.forget().fence(), message.forget().task()});
  if (message.has_stale()) {
    return link_.Restart(Aborted(Str("stale session: ", message.stale().reason())));
  }
  if (message.has_start()) {
    TaskRunner* const runner = Find(message.start().fence(), message.start().task());
    if (runner != nullptr) runner->OnStart(message.start());
  } else if (message.has_stop()) {
    TaskRunner* const runner = Find(message.stop().fence(), message.stop().task());
    if (runner != nullptr) runner->OnStop(message.stop());
  } else if (message.has_collect_stacks()) {
    const v1::CollectStacks& collect = message.collect_stacks();
    TaskRunner* const runner = Find(collect.fence(), collect.task());
    if (runner != nullptr) runner->OnCollectStacks();
  } else if (message.has_kill_fenced()) {
    const v1::KillFenced& kill = message.kill_fenced();
    TaskRunner* const runner = Find(kill.fence(), kill.task());
    if (runner != nullptr) runner->OnKill(Str("KILL_FENCED by ", kill.current_fence()));
  } else if (message.has_ack()) {
    TaskRunner* const runner = Find(message.ack().fence(), message.ack().task());
    if (runner != nullptr) runner->OnReportAck(message.ack().seq());
  } else if (message.has_checkpoint()) {
    for (const auto& [key, runner] : tasks_) {
      if (key.fence == message.checkpoint().fence())
        runner->OnCheckpointReply(message.checkpoint());
    }
  } else if (message.has_rendezvous()) {
    for (const auto& [key, runner] : tasks_) {
      if (key.fence == message.rendezvous().fence())
        runner->OnRendezvousReply(message.rendezvous());
    }
  }
}

void Worker::OnAssign(const v1::TaskAssignment& assignment) {
  const TaskKey key{assignment.fence(), assignment.task()};
  TaskRunner* const known = Find(key.fence, key.task);
  if (known != nullptr) return known->OnAssignedAgain();
  if (assignment.ranks().empty()) return Refuse(assignment, "an assignment without ranks");
  if (draining_) return Refuse(assignment, "the worker is leaving");
  uint64_t& highest = highest_fence_[assignment.job()];
  if (key.fence < highest) {
    return Refuse(assignment, Str("fence ", key.fence, " is below ", highest));
  }
  highest = key.fence;
  TaskFolder::Origin origin;
  origin.checkpoint_root = checkpoint_root_;
  origin.instance = state_->instance();
  StatusOr<TaskFolder> folder =
      TaskFolder::Create(state_->tasks_dir(), assignment, origin, max_orphan_ns_);
  if (!folder.ok()) {
    if (folder.status().code() != StatusCode::kAlreadyExists) {
      TaskFolder::Remove(Str(state_->tasks_dir(), "/", ToText(key)));
    }
    // For good: the coordinator may have sent it twice and be done with it after the first word.
    highest = key.fence + 1;
    return Refuse(assignment, Message(folder.status()));
  }
  TaskHost* const host = this;
  HEDDLE_INFO("task assigned", {"task", ToText(key)}, {"ranks", assignment.ranks_size()});
  logs_.Watch(*folder);
  auto runner = std::make_shared<TaskRunner>(host, *std::move(folder));
  tasks_[key] = runner;
  runner->Launch();
}

// EXITED and never acknowledged: the coordinator places the attempt elsewhere (A2).
void Worker::Refuse(const v1::TaskAssignment& assignment, const std::string& why) {
  HEDDLE_WARN("assignment refused", {"fence", assignment.fence()}, {"why", why});
  v1::WorkerMsg message;
  v1::TaskReport* report = message.mutable_report();
  report->set_fence(assignment.fence());
  report->set_task(assignment.task());
  report->set_job(assignment.job());
  report->set_seq(1);
  report->set_state(v1::TASK_STATE_EXITED);
  report->set_acknowledged(false);
  report->set_detail(why);
  Send(std::move(message));
}

void Worker::Forget(const TaskKey& key) {
  const auto found = tasks_.find(key);
  if (found == tasks_.end()) return;
  const std::shared_ptr<TaskRunner> runner = found->second;
  // Told to forget what still runs: it must end first.
  if (!runner->ended()) return runner->OnKill("the coordinator does not know this task");
  HEDDLE_INFO("task forgotten", {"task", ToText(key)});
  runner->Detach();
  runner->folder().MarkForgotten();
  ForgetFolder(runner->folder());
  tasks_.erase(found);
  DrainTasks();
}

void Worker::ForgetFolder(const TaskFolder& folder) {
  logs_.Finish(folder.key(), [path = folder.path(), this] {
    RunOnDisk(
        [path] {
          TaskFolder::Remove(path);
          return OkStatus();
        },
        [](const Status&) {});
  });
}

TaskRunner* Worker::Find(uint64_t fence, uint32_t task) {
  const auto found = tasks_.find({fence, task});
  return found == tasks_.end() ? nullptr : found->second.get();
}

// ---- services for runners ---------------------------------------------------------------------

std::string Worker::data_address() {
  if (data_address_.empty()) {
    StatusOr<std::string> address = FindDataAddress(options_);
    if (address.ok()) {
      data_address_ = *std::move(address);
    } else {
      HEDDLE_ERROR("no data address", {"why", Message(address.status())});
      return "127.0.0.1";
    }
  }
  return data_address_;
}

void Worker::RunOnDisk(std::function<Status()> work, std::function<void(Status)> done) {
  boost::asio::post(disk_, [io = io_, work = std::move(work), done = std::move(done)] {
    boost::asio::post(*io, [done, status = work()] { done(status); });
  });
}

bool Worker::Send(v1::WorkerMsg message) {
  if (!link_.connected()) return false;
  message.set_cluster_id(state_->cluster_id());
  message.set_term(state_->highest_term());
  message.set_session(session_);
  message.set_worker_id(state_->worker_id());
  return link_.Send(std::move(message));
}

void Worker::LogsMayHaveGrown(const TaskKey& key) {
  TaskRunner* const runner = Find(key.fence, key.task);
  if (runner == nullptr) return;
  for (const auto& [rank, outcome] : runner->exits()) {
    if (outcome.exit_code() != 0 || outcome.signal() != 0) logs_.Add(runner->folder(), rank);
  }
  logs_.Poke(key);
  if (draining_) boost::asio::post(*io_, [this] { DrainTasks(); });
}

// ---- end --------------------------------------------------------------------------------------

void Worker::Stop(std::function<void()> done) {
  stopped_ = std::move(done);
  if (draining_ || options_.on_term == OnTerm::kDetach) return Finish();
  draining_ = true;
  HEDDLE_INFO("draining", {"tasks", tasks_.size()});
  for (const auto& [key, runner] : tasks_) {
    v1::StopTask stop;
    stop.set_job(runner->folder().assignment().job());
    stop.set_fence(key.fence);
    stop.set_task(key.task);
    stop.mutable_stop()->set_mode(v1::STOP_MODE_CHECKPOINT_AND_EXIT);
    stop.mutable_stop()->set_grace_ms(options_.drain_grace.count());
    stop.mutable_stop()->set_reason("DRAINED");
    runner->OnStop(stop);
  }
  DrainTasks();
}

// Leaves once no task is left that the coordinator must hear about.
void Worker::DrainTasks() {
  if (!draining_ || stopping_) return;
  const bool heard = !link_.connected();
  const bool over = std::all_of(tasks_.begin(), tasks_.end(), [heard](const auto& entry) {
    return entry.second->ended() && heard;
  });
  if (!tasks_.empty() && !over) return;
  v1::WorkerMsg message;
  message.mutable_leave()->set_reason("SIGTERM");
  Send(std::move(message));
  Finish();
}

void Worker::Finish() {
  if (stopping_) return;
  stopping_ = true;
  beat_timer_.cancel();
  settle_timer_.cancel();
  for (const auto& [key, runner] : tasks_) runner->Detach();
  link_.Stop(/*flush=*/true, [this] { logs_.Stop([this] { stopped_(); }); });
}

}  // namespace heddle::worker
