// What workers say on their session stream.
#include "base/log/log.h"
#include "coordinator/runtime/coordinator.h"
#include "coordinator/runtime/records.h"
#include "coordinator/state/diagnosis.h"

namespace heddle::runtime {
namespace {

constexpr int64_t kPoisonedRetryMs = 200;
constexpr uint32_t kRanksLookedAtEachTime = 64;
constexpr int64_t kDiagnoseAgainMs = 500;

}  // namespace

void Coordinator::AttachWorker(const std::string& worker, uint64_t session,
                               rpc::WorkerSender sender) {
  const auto send_away = [this](uint64_t old_session, const rpc::WorkerSender& send) {
    v1::CoordMsg stale;
    stale.set_cluster_id(state_.meta().cluster_id());
    stale.set_term(state_.meta().term());
    stale.set_session(old_session);
    stale.mutable_stale()->set_reason("the worker has registered anew");
    send(stale);
  };
  const v1::WorkerRecord* record = state_.worker(worker);
  if (record == nullptr || record->session() != session) {
    send_away(session, sender);  // a zombie's stream takes nobody's place
    return;
  }
  if (const auto former = streams_.find(worker);
      former != streams_.end() && former->second.session != session) {
    send_away(former->second.session, former->second.send);
  }
  streams_[worker] = {.session = session, .send = std::move(sender)};
  leases_->Heard(worker, session, Now().ms);
}

void Coordinator::DetachWorker(const std::string& worker, uint64_t session) {
  if (const auto stream = streams_.find(worker);
      stream != streams_.end() && stream->second.session == session) {
    streams_.erase(stream);
    leases_->StreamClosed(worker, session, Now().ms);
    ArmTimer();
  }
}

int64_t Coordinator::HeardAgeMs(const std::string& worker) const {
  return leases_->AgeMs(worker, Now().ms);
}

void Coordinator::OnWorkerMessage(const v1::WorkerMsg& message) {
  const std::string& worker = message.worker_id();
  const uint64_t session = message.session();
  const v1::WorkerRecord* record = state_.worker(worker);
  if (record == nullptr || record->session() != session ||
      message.cluster_id() != state_.meta().cluster_id()) {
    RunEffect(state::effect::SendStale{
        .worker = worker, .session = session, .reason = "not the session of this coordinator"});
    return;
  }
  if (record->state() == v1::WORKER_STATE_LOST || record->state() == v1::WORKER_STATE_LEFT) {
    // Stopped for longer than its lease, say, and its stream held: it must hear of it, since
    // answers to its heartbeats would keep tasks alive that are given up.
    RunEffect(state::effect::SendStale{
        .worker = worker, .session = session, .reason = "it was given up"});
    return;
  }
  leases_->Heard(worker, session, Now().ms);
  const auto ignore = [](const state::Outcome&) {};
  switch (message.body_case()) {
    case v1::WorkerMsg::kHeartbeat:
      return OnHeartbeat(message);
    case v1::WorkerMsg::kReport:
      return Execute(state::event::TaskReported{worker, session, message.report()}, ignore);
    case v1::WorkerMsg::kPoints:
      return OnPoints(message.points());
    case v1::WorkerMsg::kOpenCheckpoint:
      return Execute(state::event::CheckpointOpened{worker, session, message.open_checkpoint(),
                                                    !figures_.read_only},
                     ignore);
    case v1::WorkerMsg::kSealShard:
      return Execute(state::event::ShardSealed{worker, session, message.seal_shard()}, ignore);
    case v1::WorkerMsg::kRendezvous:
      return OnRendezvous(worker, message.rendezvous());
    case v1::WorkerMsg::kDamage:
      return Execute(state::event::CheckpointDamaged{worker, session, message.damage()}, ignore);
    case v1::WorkerMsg::kStacks:
      return OnStacks(message);
    case v1::WorkerMsg::kLeave:
      // Only a node that is LEFT needs no lease: else nothing would ever find it lost.
      return Execute(state::event::WorkerLeft{worker, session, message.leave().reason()},
                     [this, worker](const state::Outcome& outcome) {
                       if (outcome.status.ok()) leases_->Remove(worker);
                     });
    case v1::WorkerMsg::BODY_NOT_SET:
      return;
  }
}

void Coordinator::OnHeartbeat(const v1::WorkerMsg& message) {
  const state::Time now = Now();
  for (const v1::Heartbeat::TaskBeat& beat : message.heartbeat().tasks()) {
    state_.NoteProgress(Fence{beat.fence()}, beat.step(), now, options_.policy);
    state_.NoteHeads(Fence{beat.fence()}, beat.heads(), now);
  }
  for (const v1::Heartbeat::TaskBeat& beat : message.heartbeat().tasks()) {
    if (!beat.heads().empty()) Diagnose(Fence{beat.fence()}, /*at_once=*/false);
  }
  const std::string worker = message.worker_id();
  v1::HeartbeatReply reply;
  reply.set_n(message.heartbeat().n());
  if (poisoned_ || stopping_) reply.set_nothing_kept(true);
  for (const v1::Permit& permit : state::PermitsFor(state_, worker, options_.policy)) {
    *reply.add_permits() = permit;
  }
  AfterDurable([this, worker, reply](const Status& status) {
    if (status.ok()) {
      leases_->PermitSent(worker, Now().ms);
      SendTo(worker, [&](v1::CoordMsg* out) { *out->mutable_heartbeat() = reply; });
    }
  });
}

void Coordinator::Diagnose(Fence fence, bool at_once) {
  const v1::AttemptRecord* attempt = state_.attempt_of(fence);
  if (attempt == nullptr || state_.observed(fence) == nullptr) {
    diagnosed_ms_.erase(fence.value);
    return;
  }
  // Every look goes over all ranks: with many of them not at each of their workers' heartbeats.
  int64_t& last = diagnosed_ms_[fence.value];
  if (!at_once && attempt->world_size() > kRanksLookedAtEachTime &&
      Now().ms - last < kDiagnoseAgainMs) {
    return;
  }
  last = Now().ms;
  std::optional<state::event::RanksDiagnosed> found = state::Diagnose(state_, fence, Now());
  if (found.has_value()) Execute(*std::move(found), [](const state::Outcome&) {});
}

void Coordinator::OnStacks(const v1::WorkerMsg& message) {
  const v1::StackReport& report = message.stacks();
  state_.NoteHeads(Fence{report.fence()}, report.heads(), Now());
  Diagnose(Fence{report.fence()}, /*at_once=*/true);
  if (report.stacks().empty()) return;
  Execute(state::event::StacksReported{message.worker_id(), message.session(), report},
          [](const state::Outcome&) {});
}

uint64_t Coordinator::LastStep(uint64_t job, uint32_t attempt) {
  const auto [place, first] = last_steps_.try_emplace({job, attempt}, 0);
  if (first) {
    if (const StatusOr<v1::MetricPoint> point = ReadLastPoint(*log_, job, attempt); point.ok()) {
      place->second = point->step();
    }
  }
  return place->second;
}

// Points come at least once: a worker repeats what it does not know to have arrived.
void Coordinator::OnPoints(const v1::RankPoints& points) {
  const v1::AttemptRecord* attempt = state_.attempt_of(Fence{points.fence()});
  if (poisoned_ || attempt == nullptr || attempt->job() != points.job() ||
      attempt->state() == v1::ATTEMPT_STATE_FENCING ||
      attempt->outcome() == v1::ATTEMPT_OUTCOME_LOST) {
    return;  // a fenced attempt's steps are not the job's
  }
  const state::Time now = Now();
  store::Batch batch;
  std::vector<v1::MetricPoint> fresh;
  uint64_t last = LastStep(points.job(), attempt->number());
  for (v1::MetricPoint point : points.points()) {
    if (point.step() <= last) {
      continue;
    }
    last = point.step();
    point.set_attempt(attempt->number());
    batch.Put(store::Family::kSeries, PointKey(points.job(), attempt->number(), point.step()),
              point.SerializeAsString());
    fresh.push_back(std::move(point));
  }
  if (fresh.empty()) {
    return;
  }
  last_steps_[{points.job(), attempt->number()}] = last;
  state_.NoteProgress(Fence{points.fence()}, last, now, options_.policy);
  last_points_[points.job()] = fresh.back();
  if (const Status kept = log_->AppendVolatile(std::move(batch)); !kept.ok()) {
    HEDDLE_WARN("metric points dropped", {"job", JobId{points.job()}}, {"points", fresh.size()},
                {"error", kept});
  }
  for (const v1::MetricPoint& point : fresh) {
    std::erase_if(point_sinks_,
                  [&](const rpc::PointSink& sink) { return !sink(points.job(), point); });
  }
}

void Coordinator::OnRendezvous(const std::string& worker, const v1::RankRendezvous& request) {
  if (poisoned_) {  // the rank waits for its answer; the store is back in a moment or with space
    PostAfter(kPoisonedRetryMs, [this, worker, request] { OnRendezvous(worker, request); });
    return;
  }
  const v1::AttemptRecord* attempt = state_.attempt_of(Fence{request.fence()});
  const bool alive = attempt != nullptr && attempt->state() != v1::ATTEMPT_STATE_FENCING &&
                     attempt->state() != v1::ATTEMPT_STATE_ENDED;
  const uint64_t fence = request.fence();
  const uint32_t rank = request.rank();
  const auto reply = [this, worker, fence, rank](const v1::RendezvousReply& answer) {
    SendTo(worker, [&](v1::CoordMsg* out) {
      v1::RankRendezvousReply* body = out->mutable_rendezvous();
      body->set_fence(fence);
      body->set_rank(rank);
      *body->mutable_reply() = answer;
    });
  };
  if (!alive) {
    v1::RendezvousReply refused;
    refused.set_n(request.request().n());
    refused.set_code(static_cast<int32_t>(StatusCode::kAborted));
    refused.set_message("the attempt has ended");
    reply(refused);
    return;
  }
  rendezvous_.Handle(Fence{fence}, rank, request.request(), Now().ms, reply);
  ArmTimer();
}

}  // namespace heddle::runtime
