#include "worker/daemon/task_runner.h"

#include <signal.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <boost/asio/post.hpp>

#include "base/ids/ids.h"
#include "base/log/log.h"

namespace heddle::worker {
namespace {

using control::Frame;
using control::FrameType;

constexpr std::chrono::milliseconds kAttachRetry{100};
constexpr int kAttachAttemptsMax = 20;
constexpr std::chrono::milliseconds kLostRetry{100};
constexpr std::chrono::milliseconds kKillDeadline{15'000};
constexpr size_t kUnackedPointsMax = 4096;
// Ranks that did not join yet have nothing to save.
constexpr int64_t kNotJoinedGraceMs = 1'000;

template <typename T>
bool Parse(const Frame& frame, T* message) {
  if (message->ParseFromString(frame.payload)) return true;
  HEDDLE_WARN("malformed frame of a rank", {"type", control::ToText(frame.header.type)},
              {"rank", frame.header.rank});
  return false;
}

// An end that came upon the rank at some place; verdicts and ends by agreement did not.
bool NeedsPlace(const v1::RankOutcome& outcome) {
  const std::string& category = outcome.category();
  return outcome.signal() != 0 || outcome.exit_code() == 1 || outcome.exit_code() == 86 ||
         category == "UNKNOWN" || category == "OOM_HOST" || category == "OOM_GPU";
}

}  // namespace

TaskRunner::TaskRunner(TaskHost* host, TaskFolder folder)
    : host_(host),
      folder_(std::move(folder)),
      watch_(&folder_),
      command_(IsCommand(folder_.assignment())),
      timer_(host->io()),
      kill_timer_(host->io()),
      cpus_(static_cast<size_t>(folder_.assignment().ranks_size())) {
  seq_ = folder_.LoadSeq();
}

// ---- launch and adoption ----------------------------------------------------------------------

void TaskRunner::Launch() {
  launched_ = true;
  const v1::TaskAssignment& assignment = folder_.assignment();
  const uint32_t ranks = static_cast<uint32_t>(assignment.ranks_size());
  // A fraction of a CPU cannot be bound to one.
  const uint32_t count = assignment.cpus_per_rank() >= 1 ? ThreadsPerRank(assignment) : uint32_t{0};
  cpus_ = host_->cpus().Take(folder_.path(), ranks, count);
  StatusOr<std::vector<std::vector<std::string>>> gpus = host_->gpus().Take(
      folder_.path(), ranks, {assignment.gpu_indices().begin(), assignment.gpu_indices().end()});
  if (!gpus.ok()) return FailLaunch(gpus.status());
  LaunchInput input;
  input.trainer = host_->options().trainer;
  input.cgroups = host_->cgroups();
  input.cpus = cpus_;
  input.gpus = *std::move(gpus);
  const Status written = folder_.WriteLaunch(MakeLaunch(folder_, input));
  if (!written.ok()) return FailLaunch(written);
  // The ranks load LibTorch while the disk syncs; only the acknowledgement waits for it.
  StartShim();
  syncing_ = true;
  host_->RunOnDisk([path = folder_.path()] { return TaskFolder::Sync(path); },
                   [self = shared_from_this()](const Status& status) {
                     self->syncing_ = false;
                     if (!status.ok()) return self->FailLaunch(status);
                     self->acknowledged_ = true;
                     if (self->state_ == v1::TASK_STATE_ASSIGNED) {
                       self->MoveTo(v1::TASK_STATE_PREPARING);
                     }
                     self->ReportSoon();
                   });
}

void TaskRunner::StartShim() {
  shim_ = MakeConnection();
  shim_->Start(host_->options().shim);
}

std::shared_ptr<ShimConnection> TaskRunner::MakeConnection() {
  ShimConnection::Handlers handlers;
  handlers.on_started = [this](const Status& status) { OnShimStarted(status); };
  handlers.on_frame = [this](const Frame& frame, uint64_t number) { OnFrame(frame, number); };
  handlers.on_closed = [this](const Status& status) { OnShimClosed(status); };
  return std::make_shared<ShimConnection>(&host_->io(), folder_.path(), std::move(handlers));
}

void TaskRunner::OnShimStarted(const Status& status) {
  // ALREADY_EXISTS: the shim of a daemon that died between start and attach.
  if (!status.ok() && status.code() != StatusCode::kAlreadyExists) {
    shim_.reset();
    return FailLaunch(status);
  }
  Attach();
}

void TaskRunner::FailLaunch(const Status& status) {
  if (ended()) return ReportSoon();
  HEDDLE_WARN("task not started", {"task", ToText(key())}, {"why", Message(status)});
  detail_ = Message(status);
  // Ranks that run already, or will once the shim is up, end by order; their exits make the report.
  if (shim_ != nullptr) return OnKill(detail_);
  for (const uint32_t rank : folder_.assignment().ranks()) {
    if (exits_.contains(rank)) continue;
    v1::RankOutcome& outcome = exits_[rank];
    outcome.set_rank(rank);
    outcome.set_exit_code(127);
    outcome.set_detail(detail_);
    outcome.set_at(host_->clock().NowWallMs());
  }
  MoveTo(v1::TASK_STATE_EXITED);
}

void TaskRunner::Adopt(bool same_instance) {
  acknowledged_ = folder_.Shim().has_value();
  if (!folder_.ExitFrames().empty()) {
    launched_ = true;
    return ReadExitFile();
  }
  if (!folder_.Shim().has_value()) {
    // The daemon died before the shim began: the coordinator says whether it is still wanted.
    state_ = v1::TASK_STATE_ASSIGNED;
    if (same_instance) return;
    detail_ = "the machine restarted";
    return MoveTo(v1::TASK_STATE_GONE);
  }
  launched_ = true;
  if (!same_instance) {
    detail_ = "the machine or container restarted";
    return MoveTo(v1::TASK_STATE_GONE);
  }
  state_ = v1::TASK_STATE_PREPARING;
  settled_ = false;
  // Refreshed now: the ranks must not end because this daemon was away.
  Attach();
}

void TaskRunner::Attach() {
  // Frames are numbered anew on each connection.
  for (auto& [question_key, question] : questions_) question.number = 0;
  damages_.clear();
  shim_ = MakeConnection();
  const Status connected = shim_->Connect();
  if (connected.ok()) {
    attach_attempts_ = 0;
    HEDDLE_INFO("attached to shim", {"task", ToText(key())});
    return ApplyStop();
  }
  OnShimClosed(connected);
}

void TaskRunner::OnShimClosed(const Status& status) {
  if (ended()) return;
  if (!folder_.ExitFrames().empty()) return ReadExitFile();
  if (folder_.ShimIsAlive() && ++attach_attempts_ < kAttachAttemptsMax) {
    timer_.expires_after(kAttachRetry);
    timer_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
      if (!error) self->Attach();
    });
    return;
  }
  HEDDLE_WARN("shim lost", {"task", ToText(key())}, {"why", Message(status)});
  OnShimLost();
}

// The shim was killed. Its ranks died with it (PDEATHSIG); what they had started may not have.
void TaskRunner::OnShimLost() {
  if (ended()) return;
  const std::optional<control::ShimIdentity> shim = folder_.Shim();
  const int killed = KillLeftovers(folder_.path(), shim.has_value() ? shim->cgroup : "");
  if (killed > 0) {
    // Gone only when a look finds nothing: a new attempt must not meet the old one.
    timer_.expires_after(kLostRetry);
    timer_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
      if (!error) self->OnShimLost();
    });
    return;
  }
  if (!folder_.ExitFrames().empty()) return ReadExitFile();
  detail_ = "SHIM_LOST: the process that owned the ranks was killed";
  for (const uint32_t rank : folder_.assignment().ranks()) {
    if (exits_.contains(rank)) continue;
    v1::RankOutcome& outcome = exits_[rank];
    outcome.set_rank(rank);
    outcome.set_signal(9);
    outcome.set_category("CONTROL_PLANE");
    outcome.set_detail(detail_);
    outcome.set_at(host_->clock().NowWallMs());
    outcome.set_step(step_);
  }
  MoveTo(v1::TASK_STATE_EXITED);
}

void TaskRunner::ReadExitFile() {
  for (const Frame& frame : folder_.ExitFrames()) {
    if (frame.header.type != FrameType::kTaskState) OnFrame(frame, 0);
  }
  Settle();
  FinishIfAllExited();
  if (!ended()) OnShimLost();
}

// ---- frames of the shim -----------------------------------------------------------------------

void TaskRunner::OnFrame(const Frame& frame, uint64_t number) {
  if (frame.header.fence != key().fence) return;
  if (frame.header.type == FrameType::kTaskState) {
    control::TaskStatePod pod;
    if (control::Unpack(frame.payload, &pod)) replay_left_ = pod.replay;
    if (replay_left_ == 0) Settle();
    return;
  }
  if (LocalIndex(frame.header.rank).has_value()) OnRankFrame(frame, number);
  if (number != 0 && replay_left_ > 0 && --replay_left_ == 0) Settle();
}

void TaskRunner::OnRankFrame(const Frame& frame, uint64_t number) {
  const uint32_t rank = frame.header.rank;
  switch (frame.header.type) {
    case FrameType::kSpawned:
      return OnSpawned(frame);
    case FrameType::kHello:
      return OnHello(rank, frame);
    case FrameType::kReady:
      ready_.insert(rank);
      if (ready_.size() == cpus_.size() && state_ < v1::TASK_STATE_READY) {
        MoveTo(v1::TASK_STATE_READY);
      }
      return;
    case FrameType::kJoined: {
      v1::RankJoined joined;
      if (!Parse(frame, &joined)) return;
      joined_.insert(rank);
      start_step_ = joined.start_step();
      if (joined_.size() == cpus_.size() && state_ < v1::TASK_STATE_RUNNING) {
        return MoveTo(v1::TASK_STATE_RUNNING);
      }
      return ReportSoon();
    }
    case FrameType::kProgress:
      return OnProgress(frame);
    case FrameType::kOpenCheckpoint:
    case FrameType::kSeal:
    case FrameType::kRendezvous:
      return Ask(rank, frame, number);
    case FrameType::kDamage: {
      v1::DamageReport damage;
      if (!Parse(frame, &damage)) return Acknowledge(number);
      damage.set_job(folder_.assignment().job());
      damage.set_fence(key().fence);
      v1::WorkerMsg message;
      *message.mutable_damage() = damage;
      damages_.push_back({host_->last_heartbeat(), number, std::move(damage)});
      host_->Send(std::move(message));
      return;
    }
    case FrameType::kExit: {
      v1::RankExit exit;
      if (Parse(frame, &exit)) last_words_[rank] = exit;
      return;
    }
    case FrameType::kRankExited:
      return OnExited(frame);
    default:
      return;
  }
}

void TaskRunner::OnSpawned(const Frame& frame) {
  control::SpawnedPod pod;
  if (!control::Unpack(frame.payload, &pod)) return;
  spawned_.insert(frame.header.rank);
  watch_.OnSpawned(*LocalIndex(frame.header.rank), pod.pid);
  if (!command_) return;
  hello_ms_[frame.header.rank] = pod.at_ms;
  if (spawned_.size() == cpus_.size() && state_ < v1::TASK_STATE_READY) {
    MoveTo(v1::TASK_STATE_READY);
  }
}

void TaskRunner::OnHello(uint32_t rank, const Frame& frame) {
  v1::RankHello hello;
  if (!Parse(frame, &hello)) return;
  hello_ms_[rank] = hello.at_ms();
  const size_t local = *LocalIndex(rank);
  const v1::RankSpec spec = MakeSpec(folder_, local, host_->data_address(), cpus_[local]);
  Deliver(FrameType::kSpec, rank, spec);
}

void TaskRunner::OnProgress(const Frame& frame) {
  v1::RankProgress progress;
  if (!Parse(frame, &progress)) return;
  step_ = std::max(step_, progress.step());
  if (progress.points().empty()) return;
  SentPoints sent;
  sent.heartbeat = host_->last_heartbeat();
  sent.points.set_job(folder_.assignment().job());
  sent.points.set_fence(key().fence);
  *sent.points.mutable_points() = progress.points();
  for (v1::MetricPoint& point : *sent.points.mutable_points()) {
    point.set_attempt(folder_.assignment().attempt());
  }
  v1::WorkerMsg message;
  *message.mutable_points() = sent.points;
  host_->Send(std::move(message));
  // Kept until a later heartbeat is answered: a coordinator that dies takes what it did not store.
  points_.push_back(std::move(sent));
  if (points_.size() > kUnackedPointsMax) points_.pop_front();
}

void TaskRunner::Ask(uint32_t rank, const Frame& frame, uint64_t number) {
  Question question;
  question.number = number;
  uint64_t request = 0;
  const auto fill = [&](auto* body) {
    body->set_job(folder_.assignment().job());
    body->set_fence(key().fence);
    body->set_rank(rank);
    return body;
  };
  bool parsed = false;
  if (frame.header.type == FrameType::kOpenCheckpoint) {
    v1::OpenCheckpoint* open = fill(question.message.mutable_open_checkpoint())->mutable_open();
    parsed = Parse(frame, open);
    request = open->request();
  } else if (frame.header.type == FrameType::kSeal) {
    v1::SealShard* seal = fill(question.message.mutable_seal_shard())->mutable_seal();
    parsed = Parse(frame, seal);
    request = seal->request();
  } else {
    v1::RendezvousRequest* ask = fill(question.message.mutable_rendezvous())->mutable_request();
    parsed = Parse(frame, ask);
    request = ask->n();
  }
  if (!parsed) return Acknowledge(number);
  const QuestionKey question_key{rank, frame.header.type, request};
  // The rank asked again before the first answer: one of the two frames is enough.
  const auto known = questions_.find(question_key);
  if (known != questions_.end()) Acknowledge(known->second.number);
  host_->Send(question.message);
  questions_[question_key] = std::move(question);
}

void TaskRunner::Acknowledge(uint64_t number) {
  if (number == 0 || shim_ == nullptr) return;
  control::AckPod ack;
  ack.number = number;
  shim_->Send(FrameType::kAck, key().fence, 0, control::AsBytes(ack));
}

void TaskRunner::Deliver(FrameType type, uint32_t rank,
                         const google::protobuf::MessageLite& message) {
  const std::string payload = message.SerializeAsString();
  if (payload.size() > control::kMaxPayloadBytes) {
    HEDDLE_ERROR("message to a rank is too long", {"type", control::ToText(type)},
                 {"bytes", payload.size()});
    return;
  }
  if (shim_ != nullptr) shim_->Send(type, key().fence, rank, payload);
}

void TaskRunner::OnExited(const Frame& frame) {
  control::RankExitedPod pod;
  if (!control::Unpack(frame.payload, &pod)) return;
  watch_.OnEnded(*LocalIndex(frame.header.rank));
  exits_[frame.header.rank] = OutcomeOf(pod);
  const v1::RankOutcome& outcome = exits_[frame.header.rank];
  HEDDLE_INFO("rank ended", {"task", ToText(key())}, {"rank", outcome.rank()},
              {"code", outcome.exit_code()}, {"signal", outcome.signal()},
              {"detail", outcome.detail()});
  host_->LogsMayHaveGrown(key());
  // Ahead of the report of the exit: a collective that the ranks launched differently explains it.
  if (outcome.exit_code() != 0 || outcome.signal() != 0) SendHeads();
  FinishIfAllExited();
  if (!ended()) ReportSoon();
}

v1::RankOutcome TaskRunner::OutcomeOf(const control::RankExitedPod& exited) const {
  v1::RankOutcome outcome;
  outcome.set_rank(exited.rank);
  outcome.set_at(exited.at_ms);
  outcome.set_oom(exited.oom != 0);
  outcome.set_step(step_);
  if (exited.signal != 0) {
    outcome.set_signal(exited.signal);
  } else {
    outcome.set_exit_code(exited.code);
  }
  const auto words = last_words_.find(exited.rank);
  if (words != last_words_.end()) {
    outcome.set_category(words->second.category());
    outcome.set_detail(words->second.detail());
    outcome.set_step(std::max(step_, words->second.step()));
    if (words->second.has_rollback_to_step()) {
      outcome.set_rollback_to_step(words->second.rollback_to_step());
      *outcome.mutable_skip() = words->second.skip();
    }
    *outcome.mutable_memory() = words->second.memory();
  }
  if (exited.launch_step != 0) {
    const auto step = static_cast<control::LaunchStep>(exited.launch_step);
    const v1::TaskAssignment& assignment = folder_.assignment();
    const std::string program = command_ && assignment.config().command().argv_size() > 0
                                    ? assignment.config().command().argv(0)
                                    : host_->options().trainer;
    outcome.set_detail(
        Str("cannot ", control::ToText(step), " ", program, ": ", strerror(exited.launch_errno)));
    outcome.set_exit_code(127);
    // A program that is not there will not be there on the next try either.
    if (command_ && step == control::LaunchStep::kExec) outcome.set_category("USER_CONFIG");
  } else if (exited.by_shim != 0 && outcome.detail().empty()) {
    outcome.set_detail(Str("ended by the shim: ",
                           control::ToText(static_cast<control::KillReason>(exited.by_shim))));
  } else if (NeedsPlace(outcome)) {
    const size_t local = *LocalIndex(exited.rank);
    const std::string doing = watch_.Doing(local);
    outcome.set_step(std::max<uint64_t>(outcome.step(), watch_.step(local)));
    outcome.set_detail(
        Str(outcome.detail(), outcome.detail().empty() || doing.empty() ? "" : "; ", doing));
  }
  AddMemory(exited, &outcome);
  return outcome;
}

// What ran out of memory cannot always tell: the kernel's kill leaves no time for words.
void TaskRunner::AddMemory(const control::RankExitedPod& exited, v1::RankOutcome* outcome) const {
  const bool told = std::any_of(outcome->memory().begin(), outcome->memory().end(),
                                [](const v1::MemoryUse& use) { return use.name() == "resident"; });
  if (told || (!outcome->oom() && outcome->category() != "OOM_HOST")) return;
  // Whom the limit of its cgroup ended had reached it, though nobody may have looked just then.
  const uint64_t limit = outcome->oom() ? folder_.assignment().memory_per_rank() : 0;
  const uint64_t peak = std::max(watch_.peak_bytes(*LocalIndex(exited.rank)), limit);
  if (peak == 0) return;
  v1::MemoryUse* use = outcome->add_memory();
  use->set_name("resident");
  use->set_actual(peak);
}

void TaskRunner::FinishIfAllExited() {
  if (ended() || exits_.size() < cpus_.size()) return;
  MoveTo(v1::TASK_STATE_EXITED);
}

// ---- orders of the coordinator ----------------------------------------------------------------

void TaskRunner::OnAssignedAgain() {
  if (!launched_ && !ended()) Launch();
  ReportSoon();
}

void TaskRunner::OnStart(const v1::StartTask& start) {
  if (ended()) return ReportSoon();
  if (command_) {
    // Nobody joins anything: it runs since it was spawned (A5).
    if (state_ == v1::TASK_STATE_READY) MoveTo(v1::TASK_STATE_RUNNING);
    return;
  }
  for (const uint32_t rank : folder_.assignment().ranks()) {
    Deliver(FrameType::kStart, rank, start.start());
  }
}

void TaskRunner::OnStop(const v1::StopTask& stop) {
  if (ended()) return ReportSoon();
  const bool harder = !stop_.has_value() || (stop.kill_now() && !stop_->kill_now()) ||
                      stop.stop().grace_ms() < stop_->stop().grace_ms();
  if (harder) {
    HEDDLE_INFO("stopping task", {"task", ToText(key())}, {"reason", stop.stop().reason()},
                {"grace_ms", stop.stop().grace_ms()}, {"kill_now", stop.kill_now()});
    stop_ = stop;
    ApplyStop();
    if (stop.kill_now()) KillShimLater();
  }
  if (state_ != v1::TASK_STATE_STOPPING) {
    MoveTo(v1::TASK_STATE_STOPPING);
  } else {
    ReportSoon();
  }
}

void TaskRunner::OnKill(const std::string& reason) {
  if (ended()) return ReportSoon();
  HEDDLE_INFO("killing task", {"task", ToText(key())}, {"reason", reason});
  kill_ = reason;
  if (!launched_) {
    if (folder_.ForbidShim()) {
      detail_ = reason;
      return MoveTo(v1::TASK_STATE_GONE);
    }
    // Started by a daemon that died, and late.
    launched_ = true;
    return Attach();
  }
  ApplyStop();
  KillShimLater();
}

// A shim that does not act (stopped, stuck) ends its ranks by ending itself. Counted from the first
// order: the coordinator repeats it until the task has ended.
void TaskRunner::KillShimLater() {
  if (kill_due_) return;
  kill_due_ = true;
  kill_timer_.expires_after(kKillDeadline);
  kill_timer_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
    self->kill_due_ = false;
    if (error || self->ended() || !self->folder_.ShimIsAlive()) return;
    HEDDLE_WARN("the shim does not kill its ranks: killed", {"task", ToText(self->key())});
    kill(self->folder_.Shim()->pid, SIGKILL);
  });
}

// Sends the ladder that is due to the shim; called again after each attach.
void TaskRunner::ApplyStop() {
  if (shim_ == nullptr || !shim_->connected()) return;
  control::StopTaskPod order;
  if (kill_.has_value() || (stop_.has_value() && stop_->kill_now())) {
    order.mode = static_cast<uint32_t>(control::StopTaskMode::kKill);
  } else if (!stop_.has_value()) {
    return;
  } else if (command_) {
    order.mode = static_cast<uint32_t>(control::StopTaskMode::kTerm);
    order.grace_ms = stop_->stop().grace_ms();
  } else {
    const bool joined = joined_.size() == cpus_.size();
    order.mode = static_cast<uint32_t>(control::StopTaskMode::kGraceful);
    order.grace_ms =
        joined ? stop_->stop().grace_ms() : std::min(kNotJoinedGraceMs, stop_->stop().grace_ms());
    for (const uint32_t rank : folder_.assignment().ranks()) {
      if (!exits_.contains(rank)) Deliver(FrameType::kStop, rank, stop_->stop());
    }
  }
  shim_->Send(FrameType::kStopTask, key().fence, 0, control::AsBytes(order));
}

void TaskRunner::OnCheckpointReply(const v1::RankCheckpointReply& reply) {
  std::vector<uint32_t> ranks(reply.ranks().begin(), reply.ranks().end());
  if (ranks.empty()) {
    ranks.assign(folder_.assignment().ranks().begin(), folder_.assignment().ranks().end());
  }
  for (const uint32_t rank : ranks) {
    if (!LocalIndex(rank).has_value()) continue;
    v1::CheckpointReply answer = reply.reply();
    uint64_t number = 0;
    bool asked = false;
    for (const FrameType type : {FrameType::kOpenCheckpoint, FrameType::kSeal}) {
      const auto question = questions_.find({rank, type, answer.request()});
      if (answer.request() == 0 || question == questions_.end()) continue;
      asked = true;
      number = question->second.number;
      questions_.erase(question);
      break;
    }
    // The number belongs to one rank; the others get it as news.
    if (!asked && ranks.size() > 1) answer.set_request(0);
    Deliver(FrameType::kCheckpointReply, rank, answer);
    Acknowledge(number);
  }
}

void TaskRunner::OnRendezvousReply(const v1::RankRendezvousReply& reply) {
  const auto question = questions_.find({reply.rank(), FrameType::kRendezvous, reply.reply().n()});
  if (question == questions_.end()) return;
  const uint64_t number = question->second.number;
  questions_.erase(question);
  Deliver(FrameType::kRendezvousReply, reply.rank(), reply.reply());
  Acknowledge(number);
}

void TaskRunner::OnReportAck(uint64_t seq) {
  acked_seq_ = std::max(acked_seq_, seq);
  if (seq <= seq_) return;
  // It has heard higher numbers than our folder kept (its disk was full): what comes under lower
  // ones is no news to it.
  seq_ = seq;
  ReportSoon();
}

void TaskRunner::OnHeartbeatReply(uint64_t n) {
  while (!points_.empty() && points_.front().heartbeat < n) points_.pop_front();
  while (!damages_.empty() && damages_.front().heartbeat < n) {
    Acknowledge(damages_.front().number);
    damages_.pop_front();
  }
}

void TaskRunner::PublishPermit(int64_t deadline_ns) {
  control::Permit permit;
  permit.fence = key().fence;
  permit.deadline_ns = deadline_ns;
  for (size_t i = 0; i < cpus_.size(); ++i) folder_.page(i)->PublishPermit(permit);
}

void TaskRunner::RefreshContact(int64_t contact_ns, int64_t max_orphan_ns) {
  if (max_orphan_ns > 0) folder_.contact()->SetMaxOrphan(max_orphan_ns);
  folder_.contact()->Refresh(contact_ns);
}

void TaskRunner::Resend() {
  // The report is posted: an end goes last.
  if (seq_ > acked_seq_ || report_wanted_) ReportSoon();
  for (const auto& [question_key, question] : questions_) host_->Send(question.message);
  for (SentDamage& sent : damages_) {
    sent.heartbeat = host_->last_heartbeat();
    v1::WorkerMsg message;
    *message.mutable_damage() = sent.report;
    host_->Send(std::move(message));
  }
  for (SentPoints& sent : points_) {
    sent.heartbeat = host_->last_heartbeat();
    v1::WorkerMsg message;
    *message.mutable_points() = sent.points;
    host_->Send(std::move(message));
  }
}

void TaskRunner::Detach() {
  timer_.cancel();
  kill_timer_.cancel();
  if (shim_ != nullptr) shim_->Close();
}

// ---- state and reports ------------------------------------------------------------------------

void TaskRunner::Settle() {
  replay_left_ = 0;
  settled_ = true;
  if (report_wanted_) ReportSoon();
}

void TaskRunner::MoveTo(v1::TaskState state) {
  if (ended() || state == state_) return;
  // STOPPING stays STOPPING whatever the ranks still say.
  if (state_ == v1::TASK_STATE_STOPPING && state < v1::TASK_STATE_STOPPING) return ReportSoon();
  HEDDLE_INFO("task state", {"task", ToText(key())}, {"job", JobId{folder_.assignment().job()}},
              {"state", v1::TaskState_Name(state)});
  if (state >= v1::TASK_STATE_EXITED) state_before_end_ = state_;
  state_ = state;
  if (ended()) OnEnded();
  ReportSoon();
}

void TaskRunner::OnEnded() {
  settled_ = true;
  timer_.cancel();
  kill_timer_.cancel();
  host_->cpus().Release(folder_.path());
  host_->gpus().Release(folder_.path());
  host_->LogsMayHaveGrown(key());
  // Answers have nobody to go to; a last seal still counts, so it is sent until answered.
  std::erase_if(questions_, [](const auto& entry) {
    return std::get<control::FrameType>(entry.first) != FrameType::kSeal;
  });
}

// Changes that come together make one report.
void TaskRunner::ReportSoon() {
  report_wanted_ = true;
  // A replay is old news in pieces; one report follows at its end. Nothing is reported before the
  // folder is on disk: every report acknowledges the task (T1).
  if (report_due_ || !settled_ || syncing_) return;
  report_due_ = true;
  boost::asio::post(host_->io(), [self = shared_from_this()] {
    self->report_due_ = false;
    self->CountReport();
    v1::WorkerMsg message;
    *message.mutable_report() = self->Report();
    self->host_->Send(std::move(message));
  });
}

void TaskRunner::CountReport() {
  report_wanted_ = false;
  ++seq_;
  folder_.StoreSeq(seq_);
}

v1::TaskReport TaskRunner::NewestReport() {
  if (ended() && WordsWait()) {  // the end follows them on the stream
    v1::TaskReport report = Report();
    report.set_state(state_before_end_);
    report.clear_exits();
    report_wanted_ = true;
    return report;
  }
  // A task found ended at the start of the daemon, say: under its old number that was no news.
  if (report_wanted_ && settled_ && !syncing_) CountReport();
  return Report();
}

bool TaskRunner::WordsWait() const {
  if (!points_.empty() || !damages_.empty()) return true;
  return std::any_of(questions_.begin(), questions_.end(), [](const auto& entry) {
    return std::get<control::FrameType>(entry.first) == FrameType::kSeal;
  });
}

v1::TaskReport TaskRunner::Report() const {
  v1::TaskReport report;
  report.set_fence(key().fence);
  report.set_task(key().task);
  report.set_job(folder_.assignment().job());
  report.set_seq(seq_);
  // A registration while the folder is being synced: known, not yet acknowledged.
  report.set_state(syncing_ ? v1::TASK_STATE_ASSIGNED : state_);
  report.set_acknowledged(acknowledged_);
  report.set_step(step_);
  if (state_ >= v1::TASK_STATE_READY) report.set_data_address(host_->data_address());
  if (!detail_.empty()) report.set_detail(detail_);
  if (start_step_.has_value()) report.set_start_step(*start_step_);
  for (const uint32_t rank : joined_) report.add_joined_ranks(rank);
  for (const auto& [rank, at_ms] : hello_ms_) report.add_hello_ms(at_ms);
  for (const auto& [rank, outcome] : exits_) *report.add_exits() = outcome;
  return report;
}

v1::Heartbeat::TaskBeat TaskRunner::Beat() {
  v1::Heartbeat::TaskBeat beat;
  beat.set_fence(key().fence);
  beat.set_task(key().task);
  beat.set_seq(seq_);
  beat.set_step(step_);
  if (ended()) return beat;
  for (v1::RankHead& head : watch_.Heads()) *beat.add_heads() = std::move(head);
  return beat;
}

void TaskRunner::SendHeads() {
  v1::WorkerMsg message;
  v1::StackReport* report = message.mutable_stacks();
  report->set_job(folder_.assignment().job());
  report->set_fence(key().fence);
  report->set_task(key().task);
  for (v1::RankHead& head : watch_.Heads()) *report->add_heads() = std::move(head);
  if (report->heads_size() > 0) host_->Send(std::move(message));
}

void TaskRunner::OnCollectStacks() {
  auto stacks = std::make_shared<std::vector<v1::RankStack>>();
  // `self` keeps the pages mapped while the disk thread looks at them.
  host_->RunOnDisk(
      [self = shared_from_this(), targets = watch_.Targets(), stacks] {
        for (const RankTarget& target : targets) {
          v1::RankStack& stack = stacks->emplace_back();
          stack.set_rank(target.rank);
          stack.set_text(DescribeStacks(target));
        }
        return OkStatus();
      },
      [self = shared_from_this(), stacks](const Status&) {
        v1::WorkerMsg message;
        v1::StackReport* report = message.mutable_stacks();
        report->set_job(self->folder_.assignment().job());
        report->set_fence(self->key().fence);
        report->set_task(self->key().task);
        for (v1::RankHead& head : self->watch_.Heads()) *report->add_heads() = std::move(head);
        for (v1::RankStack& stack : *stacks) *report->add_stacks() = std::move(stack);
        self->host_->Send(std::move(message));
      });
}

std::optional<size_t> TaskRunner::LocalIndex(uint32_t rank) const {
  const auto& ranks = folder_.assignment().ranks();
  const auto found = std::find(ranks.begin(), ranks.end(), rank);
  if (found == ranks.end()) return std::nullopt;
  return static_cast<size_t>(found - ranks.begin());
}

}  // namespace heddle::worker
