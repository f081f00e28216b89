// Service Jobs: submit, read, stop, resume, streams.
#include <grpcpp/support/server_callback.h>

#include "base/net/grpc_channel.h"
#include "base/settings/settings.h"
#include "coordinator/rpc/core.h"
#include "coordinator/rpc/doctor.h"
#include "coordinator/rpc/feeds.h"
#include "coordinator/rpc/log_files.h"
#include "coordinator/rpc/plan.h"
#include "coordinator/rpc/request.h"
#include "coordinator/rpc/resume_fit.h"
#include "coordinator/rpc/services.h"
#include "coordinator/rpc/views.h"
#include "coordinator/state/rollback.h"
#include "heddle/v1/jobs.grpc.pb.h"
#include "model/model_plan.h"
#include "model/training_plan.h"

namespace heddle::rpc {
namespace {

using Context = grpc::CallbackServerContext;
using Reactor = grpc::ServerUnaryReactor;

constexpr size_t kConfigBytesMax = 256 * 1024;
constexpr size_t kListMax = 1000;
constexpr int kEventsInDetail = 200;

// Checks that need no state; on the gRPC thread.
Status CheckConfig(const v1::SubmitRequest& request) {
  if (request.config().ByteSizeLong() > kConfigBytesMax) {
    return InvalidArgument(Str("the configuration has ", request.config().ByteSizeLong(),
                               " bytes, at most ", kConfigBytesMax, " are accepted"));
  }
  RETURN_IF_ERROR(settings::Validate(request.config()));
  RETURN_IF_ERROR(settings::CheckImplemented(request.config()));
  // A model that the trainer would refuse at its start is refused here.
  if (request.config().kind() != v1::RunConfig::KIND_TRAIN) return OkStatus();
  return model::PlanModel(request.config().model()).status();
}

// Memory a rank needs, where the config leaves it to us.
void PlanMemory(v1::RunConfig* config) {
  if (config->parallel().memory_per_rank() > 0 || config->kind() != v1::RunConfig::KIND_TRAIN) {
    return;
  }
  config->mutable_parallel()->set_memory_per_rank(model::DefaultReservation(*config));
}

// [ok:|any:|failed:]JOB
StatusOr<v1::DependencyRecord> ParseAfter(const state::State& state, const std::string& text) {
  v1::DependencyRecord record;
  std::string job = text;
  const std::pair<const char*, v1::DependencyKind> kinds[] = {
      {"ok:", v1::DEPENDENCY_KIND_OK},
      {"any:", v1::DEPENDENCY_KIND_ANY},
      {"failed:", v1::DEPENDENCY_KIND_FAILED}};
  record.set_kind(v1::DEPENDENCY_KIND_OK);
  for (const auto& [prefix, kind] : kinds) {
    if (text.rfind(prefix, 0) == 0) {
      record.set_kind(kind);
      job = text.substr(std::string(prefix).size());
    }
  }
  ASSIGN_OR_RETURN(const JobId id, FindJob(state, job));
  record.set_job(id.value);
  return record;
}

void AddLogLosses(const std::vector<LogFile>& files, v1::Job* job) {
  for (v1::Attempt& attempt : *job->mutable_attempts()) {
    for (const LogFile& file : files) {
      if (file.attempt != attempt.number()) continue;
      v1::LogLoss* loss = attempt.add_log_losses();
      loss->set_rank(file.rank);
      loss->set_over_limit(file.dropped);
      loss->set_lost(file.lost);
    }
  }
}

class JobsService final : public v1::Jobs::CallbackService {
 public:
  JobsService(Core* core, LogFiles* logs) : core_(core), logs_(logs) {}

  Reactor* Submit(Context* context, const v1::SubmitRequest* request,
                  v1::SubmitReply* reply) override {
    Reactor* reactor = context->DefaultReactor();
    heddle::Status bad = CheckConfig(*request);
    if (bad.ok()) bad = model::CheckReservation(request->config());
    if (!bad.ok()) {
      reactor->Finish(net::ToGrpc(bad));
      return reactor;
    }
    state::event::JobSubmitted event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    event.config = request->config();
    event.hold = request->hold();
    PlanMemory(&event.config);
    core_->Post([this, reactor, request, reply, event = std::move(event)]() mutable {
      if (const heddle::Status ready = FinishSubmit(*request, &event);
          !ready.ok() || request->dry_run()) {
        reactor->Finish(net::ToGrpc(ready));
        return;
      }
      core_->Execute(std::move(event), [reactor, reply](const state::Outcome& outcome) {
        reply->set_id(ToText(outcome.job));
        reactor->Finish(net::ToGrpc(outcome.status));
      });
    });
    return reactor;
  }

  Reactor* Plan(Context* context, const v1::SubmitRequest* request, v1::PlanReply* reply) override {
    if (const heddle::Status bad = CheckConfig(*request); !bad.ok()) {
      Reactor* reactor = context->DefaultReactor();
      reactor->Finish(net::ToGrpc(bad));
      return reactor;
    }
    return Read(context, [this, request, reply]() -> heddle::Status {
      state::event::JobSubmitted unused;  // names of other jobs and checkpoints must be right
      unused.config = request->config();
      RETURN_IF_ERROR(Resolve(*request, true, &unused));
      PlanJob(*core_, request->config(), reply);
      return OkStatus();
    });
  }

  Reactor* Get(Context* context, const v1::JobRef* request, v1::Job* reply) override {
    Reactor* reactor = context->DefaultReactor();
    core_->Post([this, reactor, request, reply] {
      const StatusOr<JobId> id = FindJob(core_->state(), request->job());
      heddle::Status status = id.status();
      if (id.ok()) {
        *reply = JobDetailView(*core_, *core_->state().job(*id));
        status = AddEvents(*id, reply);
      }
      core_->AfterDurable([this, reactor, reply, id, status](const heddle::Status& durable) {
        if (!status.ok() || !durable.ok()) {
          reactor->Finish(net::ToGrpc(status.ok() ? durable : status));
          return;
        }
        core_->PostFileWork([this, reactor, reply, id] {
          AddLogLosses(logs_->Losses(*id), reply);
          reactor->Finish(grpc::Status::OK);
        });
      });
    });
    return reactor;
  }

  Reactor* List(Context* context, const v1::ListRequest* request, v1::ListReply* reply) override {
    return Read(context, [this, request, reply]() -> heddle::Status {
      uint64_t from = 0;
      if (!request->page_token().empty()) {
        ASSIGN_OR_RETURN(const JobId id, ParseJobId(request->page_token()));
        from = id.value;
      }
      const size_t limit =
          request->limit() > 0 ? std::min<size_t>(request->limit(), kListMax) : kListMax;
      const auto& jobs = core_->state().jobs();
      for (auto job = jobs.lower_bound(from); job != jobs.end(); ++job) {
        if (!request->all() && job->second->state() == v1::JOB_STATE_DONE) {
          continue;
        }
        if (static_cast<size_t>(reply->jobs_size()) == limit) {
          reply->set_next_page_token(ToText(JobId{job->first}));
          break;
        }
        *reply->add_jobs() = JobView(*core_, *job->second);
      }
      return OkStatus();
    });
  }

  Reactor* Why(Context* context, const v1::JobRef* request, v1::WhyReply* reply) override {
    return Read(context, [this, request, reply]() -> heddle::Status {
      ASSIGN_OR_RETURN(const JobId id, FindJob(core_->state(), request->job()));
      const v1::Job job = JobView(*core_, *core_->state().job(id));
      const schedule::WaitReason why = schedule::Explain(core_->state(), id, core_->Now());
      reply->set_id(job.id());
      reply->set_state(job.state());
      reply->set_reason(why.code);
      reply->set_text(why.text);
      reply->set_advice(why.advice);
      if (why.eta_ms > 0) {
        const state::Time now = core_->Now();
        reply->set_eta_ms(now.wall_ms + why.eta_ms - now.ms);
      }
      for (const auto& [constraint, nodes] : why.funnel) {
        v1::WhyReply::Funnel* step = reply->add_funnel();
        step->set_constraint(constraint);
        step->set_nodes(nodes);
      }
      for (const JobId& blocker : why.blocking) {
        reply->add_blocking(ToText(blocker));
      }
      return OkStatus();
    });
  }

  Reactor* Doctor(Context* context, const v1::JobRef* request, v1::DoctorReply* reply) override {
    return Read(context, [this, request, reply]() -> heddle::Status {
      ASSIGN_OR_RETURN(const JobId id, FindJob(core_->state(), request->job()));
      *reply = DoctorView(*core_, *core_->state().job(id));
      return OkStatus();
    });
  }

  Reactor* Stop(Context* context, const v1::StopRequest* request, v1::Job* reply) override {
    state::event::JobStopped event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    event.verb = request->verb();
    event.reason = request->reason();
    if (request->has_grace_ms()) {
      event.grace_ms = request->grace_ms();
    }
    return Change(context, request->job(), std::move(event), reply);
  }

  Reactor* Hold(Context* context, const v1::HoldRequest* request, v1::Job* reply) override {
    state::event::JobHeld event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    return Change(context, request->job(), std::move(event), reply);
  }

  Reactor* Release(Context* context, const v1::ReleaseRequest* request, v1::Job* reply) override {
    state::event::JobReleased event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    return Change(context, request->job(), std::move(event), reply);
  }

  Reactor* Resume(Context* context, const v1::ResumeRequest* request, v1::Job* reply) override {
    Reactor* reactor = context->DefaultReactor();
    state::event::JobResumed event;
    event.request = MakeClientRequest(*context, *request, request->request_id());
    core_->Post([this, reactor, request, reply, event = std::move(event)]() mutable {
      if (const heddle::Status ready = FinishResume(*request, &event); !ready.ok()) {
        reactor->Finish(net::ToGrpc(ready));
        return;
      }
      const JobId job = event.job;
      core_->Execute(std::move(event), Answer(reactor, job, reply));
    });
    return reactor;
  }

  grpc::ServerWriteReactor<v1::WatchFrame>* Watch(Context*,
                                                  const v1::WatchRequest* request) override {
    return StartWatch(core_, *request);
  }
  grpc::ServerWriteReactor<v1::LogLine>* Logs(Context*, const v1::LogsRequest* request) override {
    return StartLogs(core_, logs_, *request);
  }
  grpc::ServerWriteReactor<v1::MetricPoint>* Metrics(Context*,
                                                     const v1::MetricsRequest* request) override {
    return StartMetrics(core_, *request);
  }

 private:
  template <typename Compute>
  Reactor* Read(Context* context, Compute compute) {
    Reactor* reactor = context->DefaultReactor();
    core_->Post([this, reactor, compute = std::move(compute)] {
      const heddle::Status status = compute();
      core_->AfterDurable([reactor, status](const heddle::Status& durable) {
        reactor->Finish(net::ToGrpc(status.ok() ? durable : status));
      });
    });
    return reactor;
  }

  std::function<void(const state::Outcome&)> Answer(Reactor* reactor, JobId job, v1::Job* reply) {
    return [this, reactor, job, reply](const state::Outcome& outcome) {
      if (const v1::JobRecord* record = core_->state().job(job); record != nullptr) {
        *reply = JobView(*core_, *record);
      }
      // The view may show a later change that is not durable yet (P8).
      core_->AfterDurable([reactor, status = outcome.status](const heddle::Status& durable) {
        reactor->Finish(net::ToGrpc(status.ok() ? durable : status));
      });
    };
  }

  // Finds the job, then applies `event` to it.
  template <typename Event>
  Reactor* Change(Context* context, const std::string& text, Event event, v1::Job* reply) {
    Reactor* reactor = context->DefaultReactor();
    core_->Post([this, reactor, text, reply, event = std::move(event)]() mutable {
      const StatusOr<JobId> job = FindJob(core_->state(), text);
      if (!job.ok()) {
        reactor->Finish(net::ToGrpc(job.status()));
        return;
      }
      event.job = *job;
      core_->Execute(std::move(event), Answer(reactor, *job, reply));
    });
    return reactor;
  }

  heddle::Status FinishSubmit(const v1::SubmitRequest& request, state::event::JobSubmitted* event) {
    if (core_->read_only()) {
      return ResourceExhausted(
          "the coordinator is READ_ONLY: its disk is nearly full or its store failed (heddle "
          "status, and "
          "its log, tell which); submit again when it is LEADER");
    }
    event->id = core_->NewJobId();
    return Resolve(request, request.dry_run(), event);
  }

  // Jobs and checkpoints that the request names. `only_asks`: no event will follow to judge what
  // may have changed since the request was first sent.
  heddle::Status Resolve(const v1::SubmitRequest& request, bool only_asks,
                         state::event::JobSubmitted* event) {
    for (const std::string& after : request.after()) {
      ASSIGN_OR_RETURN(v1::DependencyRecord record, ParseAfter(core_->state(), after));
      event->after.push_back(std::move(record));
    }
    for (const std::string& after : event->config.schedule().after()) {
      ASSIGN_OR_RETURN(v1::DependencyRecord record, ParseAfter(core_->state(), after));
      event->after.push_back(std::move(record));
    }
    const std::string& from = request.resume_from().empty()
                                  ? event->config.checkpoint().resume_from()
                                  : request.resume_from();
    if (!from.empty()) {
      ASSIGN_OR_RETURN(const v1::CheckpointRecord* record, FindCheckpoint(core_->state(), from));
      if (only_asks) RETURN_IF_ERROR(state::CheckResumeFrom(core_->state(), *record));
      // A run that its ranks would refuse is refused before any of them starts.
      RETURN_IF_ERROR(CheckFits(*record, event->config));
      event->resume_from = {JobId{record->job()}, Fence{record->fence()}, record->step()};
    }
    return OkStatus();
  }

  heddle::Status FinishResume(const v1::ResumeRequest& request, state::event::JobResumed* event) {
    ASSIGN_OR_RETURN(event->job, FindJob(core_->state(), request.job()));
    if (request.overrides().empty()) {
      return OkStatus();
    }
    const v1::JobRecord& record = *core_->state().job(event->job);
    v1::RunConfig config = record.config();
    RETURN_IF_ERROR(settings::ApplyOverrides(
        std::vector<std::string>(request.overrides().begin(), request.overrides().end()), &config));
    event->config = std::move(config);
    event->request.expect_version = record.version();
    return OkStatus();
  }

  heddle::Status AddEvents(JobId id, v1::Job* reply) {
    ASSIGN_OR_RETURN(const std::vector<v1::EventRecord> events,
                     core_->ReadLastEvents(id.value, kEventsInDetail));
    for (const v1::EventRecord& event : events) {
      *reply->add_events() = EventView(event);
    }
    return OkStatus();
  }

  Core* const core_;
  LogFiles* const logs_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeJobsService(Core* core, LogFiles* logs) {
  return std::make_unique<JobsService>(core, logs);
}

}  // namespace heddle::rpc
