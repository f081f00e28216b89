// Cluster.Status, Nodes and Checkpoints: small services.
#include <grpcpp/support/server_callback.h>
#include <unistd.h>

#include "base/net/grpc_channel.h"
#include "checkpoint/format/verify.h"
#include "coordinator/rpc/core.h"
#include "coordinator/rpc/request.h"
#include "coordinator/rpc/services.h"
#include "coordinator/rpc/views.h"
#include "heddle/v1/jobs.grpc.pb.h"

namespace heddle::rpc {
namespace {

using Context = grpc::CallbackServerContext;
using Reactor = grpc::ServerUnaryReactor;

// Sends a reply that was computed now, once all that it may show is durable (P8).
void FinishDurably(Core* core, Reactor* reactor, const Status& status) {
  core->AfterDurable([reactor, status](const Status& durable) {
    reactor->Finish(net::ToGrpc(status.ok() ? durable : status));
  });
}

// Computes a reply on the state thread.
template <typename Compute>
Reactor* Read(Core* core, Context* context, Compute compute) {
  Reactor* reactor = context->DefaultReactor();
  core->Post(
      [core, reactor, compute = std::move(compute)] { FinishDurably(core, reactor, compute()); });
  return reactor;
}

class ClusterService final : public v1::Cluster::CallbackService {
 public:
  explicit ClusterService(Core* core) : core_(core) {}

  Reactor* Status(Context* context, const v1::StatusRequest*, v1::StatusReply* reply) override {
    return Read(core_, context, [this, reply] {
      Fill(reply);
      return OkStatus();
    });
  }

 private:
  void Fill(v1::StatusReply* reply) const {
    const state::State& state = core_->state();
    const CoreFigures figures = core_->Figures();
    reply->set_cluster_id(state.meta().cluster_id());
    reply->set_term(state.meta().term());
    reply->set_role(figures.read_only ? "READ_ONLY" : "LEADER");
    reply->set_version(core_->version());
    reply->set_uptime_seconds(core_->uptime_seconds());
    reply->set_pid(getpid());
    reply->set_checkpoint_root(core_->checkpoint_root());
    FillJobs(state, reply->mutable_jobs());
    v1::StatusReply::NodeCounts* nodes = reply->mutable_nodes();
    nodes->set_connected(0);
    nodes->set_suspect(0);
    nodes->set_lost(0);
    nodes->set_left(0);
    for (const auto& [id, node] : state.nodes()) {
      Count(node.record->state(), nodes);
    }
    v1::StatusReply::Scheduler* scheduler = reply->mutable_scheduler();
    scheduler->set_last_pass_ms(figures.last_pass_ms);
    scheduler->set_p99_ms(figures.pass_p99_ms);
    scheduler->set_placed(figures.placed);
    scheduler->set_dropped_decisions(figures.dropped_decisions);
    scheduler->set_queued(static_cast<uint32_t>(state.queue().size()));
    v1::StatusReply::Store* store = reply->mutable_store();
    store->set_commit_p50_ms(figures.commit_p50_ms);
    store->set_commit_p99_ms(figures.commit_p99_ms);
    store->set_commits(figures.commits);
    store->set_events(state.next_seq() - 1);
    store->set_free_disk_bytes(figures.free_disk_bytes);
    store->set_read_only(figures.read_only);
  }

  static void FillJobs(const state::State& state, v1::StatusReply::JobCounts* jobs) {
    const auto count = [&](v1::JobState which) {
      const auto found = state.job_counts().find(which);
      return found == state.job_counts().end() ? 0U : static_cast<uint32_t>(found->second);
    };
    jobs->set_held(count(v1::JOB_STATE_HELD));
    jobs->set_waiting(count(v1::JOB_STATE_WAITING));
    jobs->set_queued(count(v1::JOB_STATE_QUEUED));
    jobs->set_active(count(v1::JOB_STATE_ACTIVE));
    jobs->set_backoff(count(v1::JOB_STATE_BACKOFF));
    jobs->set_paused(count(v1::JOB_STATE_PAUSED));
    jobs->set_stopping(count(v1::JOB_STATE_STOPPING));
    jobs->set_done(count(v1::JOB_STATE_DONE));
  }

  static void Count(v1::WorkerState which, v1::StatusReply::NodeCounts* nodes) {
    switch (which) {
      case v1::WORKER_STATE_CONNECTED:
        nodes->set_connected(nodes->connected() + 1);
        break;
      case v1::WORKER_STATE_SUSPECT:
        nodes->set_suspect(nodes->suspect() + 1);
        break;
      case v1::WORKER_STATE_LOST:
        nodes->set_lost(nodes->lost() + 1);
        break;
      case v1::WORKER_STATE_LEFT:
        nodes->set_left(nodes->left() + 1);
        break;
    }
  }

  Core* const core_;
};

// A node by its id or an unambiguous beginning of it.
StatusOr<std::string> FindNode(const state::State& state, const std::string& text) {
  if (state.nodes().contains(text)) {
    return text;
  }
  std::string found;
  for (const auto& [id, node] : state.nodes()) {
    if (!text.empty() && (id.rfind(text, 0) == 0 || node.record->host() == text)) {
      if (!found.empty()) {
        return InvalidArgument(Str("node ", text, ": ", found, " and ", id, " both match"));
      }
      found = id;
    }
  }
  if (found.empty()) {
    return NotFound(Str("node ", text, ": no such node"));
  }
  return found;
}

class NodesService final : public v1::Nodes::CallbackService {
 public:
  explicit NodesService(Core* core) : core_(core) {}

  Reactor* List(Context* context, const v1::NodesListRequest*, v1::NodeList* reply) override {
    return Read(core_, context, [this, reply] {
      for (const auto& [id, node] : core_->state().nodes()) {
        *reply->add_nodes() = NodeView(*core_, node);
      }
      return OkStatus();
    });
  }

  Reactor* Get(Context* context, const v1::NodeRef* request, v1::Node* reply) override {
    return Read(core_, context, [this, request, reply]() -> heddle::Status {
      ASSIGN_OR_RETURN(const std::string id, FindNode(core_->state(), request->node()));
      *reply = NodeView(*core_, core_->state().nodes().at(id));
      return OkStatus();
    });
  }

  Reactor* Administer(Context* context, const v1::NodeAdminRequest* request,
                      v1::Node* reply) override {
    Reactor* reactor = context->DefaultReactor();
    state::event::NodeAdministered event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    event.verb = request->verb();
    event.reason = request->reason();
    if (request->has_grace_ms()) {
      event.grace_ms = request->grace_ms();
    }
    core_->Post([this, reactor, reply, event = std::move(event), text = request->node()]() mutable {
      const StatusOr<std::string> id = FindNode(core_->state(), text);
      if (!id.ok()) {
        reactor->Finish(net::ToGrpc(id.status()));
        return;
      }
      event.node = *id;
      core_->Execute(std::move(event),
                     [this, reactor, reply, id = *id](const state::Outcome& outcome) {
                       const auto node = core_->state().nodes().find(id);
                       if (outcome.status.ok() && node != core_->state().nodes().end()) {
                         *reply = NodeView(*core_, node->second);
                       }
                       FinishDurably(core_, reactor, outcome.status);
                     });
    });
    return reactor;
  }

 private:
  Core* const core_;
};

class CheckpointsService final : public v1::Checkpoints::CallbackService {
 public:
  explicit CheckpointsService(Core* core) : core_(core) {}

  Reactor* List(Context* context, const v1::JobRef* request, v1::CheckpointList* reply) override {
    return Read(core_, context, [this, request, reply]() -> heddle::Status {
      ASSIGN_OR_RETURN(const JobId job, FindJob(core_->state(), request->job()));
      for (const state::CheckpointPtr& record : core_->state().CheckpointsOf(job)) {
        *reply->add_checkpoints() = CheckpointView(*record);
      }
      return OkStatus();
    });
  }

  Reactor* Get(Context* context, const v1::CheckpointRef* request,
               v1::CheckpointDetail* reply) override {
    return Read(core_, context, [this, request, reply]() -> heddle::Status {
      ASSIGN_OR_RETURN(const v1::CheckpointRecord* record,
                       FindCheckpoint(core_->state(), request->checkpoint()));
      *reply->mutable_checkpoint() = CheckpointView(*record);
      *reply->mutable_record() = *record;
      reply->set_root(core_->checkpoint_root());
      return OkStatus();
    });
  }

  // Reads every byte on the file pool; a damaged checkpoint is flagged before the reply (K8).
  Reactor* Verify(Context* context, const v1::CheckpointRef* request,
                  v1::VerifyReply* reply) override {
    Reactor* reactor = context->DefaultReactor();
    core_->Post([this, reactor, request, reply] {
      const StatusOr<const v1::CheckpointRecord*> record =
          FindCheckpoint(core_->state(), request->checkpoint());
      if (!record.ok()) {
        reactor->Finish(net::ToGrpc(record.status()));
        return;
      }
      core_->PostLongFileWork(
          [this, reactor, reply, record = **record] { VerifyFiles(record, reactor, reply); });
    });
    return reactor;
  }

  Reactor* Pin(Context* context, const v1::PinRequest* request, v1::Checkpoint* reply) override {
    Reactor* reactor = context->DefaultReactor();
    state::event::CheckpointPinned event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    event.pinned = request->pinned();
    core_->Post([this, reactor, request, reply, event = std::move(event)]() mutable {
      const StatusOr<const v1::CheckpointRecord*> record =
          FindCheckpoint(core_->state(), request->checkpoint());
      if (!record.ok()) {
        reactor->Finish(net::ToGrpc(record.status()));
        return;
      }
      event.key = {JobId{(*record)->job()}, Fence{(*record)->fence()}, (*record)->step()};
      const state::CheckpointKey key = event.key;
      core_->Execute(std::move(event), [this, reactor, reply, key](const state::Outcome& outcome) {
        if (const v1::CheckpointRecord* now = core_->state().checkpoint(key); now != nullptr) {
          *reply = CheckpointView(*now);
        }
        FinishDurably(core_, reactor, outcome.status);
      });
    });
    return reactor;
  }

 private:
  void VerifyFiles(const v1::CheckpointRecord& record, Reactor* reactor, v1::VerifyReply* reply) {
    const checkpoint::VerifyReport report =
        checkpoint::VerifyCheckpoint(record, core_->checkpoint_root());
    reply->set_ok(report.good());
    reply->set_files(report.files);
    reply->set_bytes(report.bytes);
    std::string first;
    for (const checkpoint::VerifyProblem& problem : report.problems) {
      reply->add_problems(checkpoint::ToText(problem));
      first = first.empty() ? checkpoint::ToText(problem) : first;
    }
    core_->Post([this, reactor, ok = report.good(), first, record] {
      state::event::CheckpointVerified event;
      event.key = {JobId{record.job()}, Fence{record.fence()}, record.step()};
      event.ok = ok;
      event.detail = first;
      core_->Execute(std::move(event), [reactor](const state::Outcome&) {
        reactor->Finish(grpc::Status::OK);  // the reply tells what was found
      });
    });
  }

  Core* const core_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeClusterService(Core* core) {
  return std::make_unique<ClusterService>(core);
}
std::unique_ptr<grpc::Service> MakeNodesService(Core* core) {
  return std::make_unique<NodesService>(core);
}
std::unique_ptr<grpc::Service> MakeCheckpointsService(Core* core) {
  return std::make_unique<CheckpointsService>(core);
}

}  // namespace heddle::rpc
