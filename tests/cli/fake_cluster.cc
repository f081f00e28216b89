#include "tests/cli/fake_cluster.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>

#include "base/net/grpc_channel.h"
#include "cli/commands/parser.h"
#include "cli/commands/verbs.h"
#include "heddle/v1/jobs.grpc.pb.h"

namespace heddle::cli {
namespace {

using grpc::ServerContext;

}  // namespace

struct FakeCluster::Server {
  explicit Server(FakeCluster* fake) : jobs(fake), checkpoints(fake), nodes(fake), cluster(fake) {}

  // The injected failure of this call, if any.
  static grpc::Status Gate(FakeCluster* fake) {
    if (fake->failure.ok() || fake->failures == 0) {
      return grpc::Status::OK;
    }
    fake->failures -= fake->failures > 0 ? 1 : 0;
    return net::ToGrpc(fake->failure);
  }
  static grpc::Status Known(FakeCluster* fake, const std::string& id) {
    grpc::Status gate = Gate(fake);
    return !gate.ok() || id == fake->job.id() || id.rfind(fake->job.id() + "@", 0) == 0
               ? gate
               : net::ToGrpc(NotFound(Str("no job ", id)));
  }

  static bool Broken(FakeCluster* fake) {
    return fake->broken_streams > 0 && fake->broken_streams-- > 0;
  }

  struct Jobs : v1::Jobs::Service {
    explicit Jobs(FakeCluster* owner) : fake(owner) {}
    grpc::Status Submit(ServerContext*, const v1::SubmitRequest* request,
                        v1::SubmitReply* reply) override {
      fake->submits.push_back(*request);
      reply->set_id(fake->job.id());
      return Gate(fake);
    }
    grpc::Status Plan(ServerContext*, const v1::SubmitRequest* request,
                      v1::PlanReply* reply) override {
      fake->plans.push_back(*request);
      *reply = fake->plan;
      *reply->mutable_config() = request->config();
      return Gate(fake);
    }
    grpc::Status Get(ServerContext*, const v1::JobRef* request, v1::Job* reply) override {
      *reply = fake->job;
      if (!fake->history.empty()) {
        *reply = fake->history.front();
        fake->history.pop_front();
      }
      return Known(fake, request->job());
    }
    grpc::Status List(ServerContext*, const v1::ListRequest* request,
                      v1::ListReply* reply) override {
      // Two pages: the CLI must ask for both.
      if (request->all() || fake->job.state() != "DONE") {
        *reply->add_jobs() = fake->job;
        reply->mutable_jobs(0)->set_name(fake->job.name() +
                                         (request->page_token().empty() ? "" : "-2"));
      }
      if (request->page_token().empty()) {
        reply->set_next_page_token("2");
      }
      return Gate(fake);
    }
    grpc::Status Why(ServerContext*, const v1::JobRef* request, v1::WhyReply* reply) override {
      *reply = fake->why;
      return Known(fake, request->job());
    }
    grpc::Status Doctor(ServerContext*, const v1::JobRef* request,
                        v1::DoctorReply* reply) override {
      *reply = fake->doctor;
      return Known(fake, request->job());
    }
    grpc::Status Stop(ServerContext*, const v1::StopRequest* request, v1::Job* reply) override {
      fake->stops.push_back(*request);
      *reply = fake->job;
      return Known(fake, request->job());
    }
    grpc::Status Hold(ServerContext*, const v1::HoldRequest* request, v1::Job* reply) override {
      *reply = fake->job;
      reply->set_state("HELD");
      return Known(fake, request->job());
    }
    grpc::Status Release(ServerContext*, const v1::ReleaseRequest* request,
                         v1::Job* reply) override {
      *reply = fake->job;
      reply->set_state("QUEUED");
      return Known(fake, request->job());
    }
    grpc::Status Resume(ServerContext*, const v1::ResumeRequest* request, v1::Job* reply) override {
      fake->resumes.push_back(*request);
      *reply = fake->job;
      return Known(fake, request->job());
    }
    grpc::Status Watch(ServerContext*, const v1::WatchRequest* request,
                       grpc::ServerWriter<v1::WatchFrame>* writer) override {
      fake->watch_request = *request;
      for (const v1::Event& event : fake->events) {
        v1::WatchFrame frame;
        frame.set_kind(v1::WatchFrame::KIND_EVENT);
        *frame.mutable_event() = event;
        writer->Write(frame);
      }
      return Gate(fake);
    }
    grpc::Status Logs(ServerContext*, const v1::LogsRequest* request,
                      grpc::ServerWriter<v1::LogLine>* writer) override {
      fake->logs_request = *request;
      for (const v1::LogLine& line : fake->lines) {
        writer->Write(line);
      }
      return Broken(fake) ? net::ToGrpc(Unavailable("restarting")) : Known(fake, request->job());
    }
    grpc::Status Metrics(ServerContext*, const v1::MetricsRequest* request,
                         grpc::ServerWriter<v1::MetricPoint>* writer) override {
      fake->metrics_request = *request;
      for (const v1::MetricPoint& point : fake->points) {
        if (point.step() >= request->from_step()) {
          writer->Write(point);
        }
      }
      return Broken(fake) ? net::ToGrpc(Unavailable("restarting")) : Known(fake, request->job());
    }
    FakeCluster* fake;
  };

  struct Checkpoints : v1::Checkpoints::Service {
    explicit Checkpoints(FakeCluster* owner) : fake(owner) {}
    grpc::Status List(ServerContext*, const v1::JobRef* request,
                      v1::CheckpointList* reply) override {
      *reply->add_checkpoints() = fake->checkpoint.checkpoint();
      return Known(fake, request->job());
    }
    grpc::Status Get(ServerContext*, const v1::CheckpointRef* request,
                     v1::CheckpointDetail* reply) override {
      *reply = fake->checkpoint;
      return Known(fake, request->checkpoint());
    }
    grpc::Status Verify(ServerContext*, const v1::CheckpointRef* request,
                        v1::VerifyReply* reply) override {
      *reply = fake->verify;
      return Known(fake, request->checkpoint());
    }
    grpc::Status Pin(ServerContext*, const v1::PinRequest* request,
                     v1::Checkpoint* reply) override {
      *reply = fake->checkpoint.checkpoint();
      reply->set_pinned(request->pinned());
      return Known(fake, request->checkpoint());
    }
    FakeCluster* fake;
  };

  struct Nodes : v1::Nodes::Service {
    explicit Nodes(FakeCluster* owner) : fake(owner) {}
    grpc::Status List(ServerContext*, const v1::NodesListRequest*, v1::NodeList* reply) override {
      *reply->add_nodes() = fake->node;
      return Gate(fake);
    }
    grpc::Status Get(ServerContext*, const v1::NodeRef*, v1::Node* reply) override {
      *reply = fake->node;
      return Gate(fake);
    }
    grpc::Status Administer(ServerContext*, const v1::NodeAdminRequest* request,
                            v1::Node* reply) override {
      fake->admins.push_back(*request);
      *reply = fake->node;
      return Gate(fake);
    }
    FakeCluster* fake;
  };

  struct Cluster : v1::Cluster::Service {
    explicit Cluster(FakeCluster* owner) : fake(owner) {}
    grpc::Status Status(ServerContext*, const v1::StatusRequest*, v1::StatusReply* reply) override {
      *reply = fake->status;
      return Gate(fake);
    }
    FakeCluster* fake;
  };

  Jobs jobs;
  Checkpoints checkpoints;
  Nodes nodes;
  Cluster cluster;
  std::unique_ptr<grpc::Server> server;
};

FakeCluster::FakeCluster() {
  std::string pattern = (std::filesystem::temp_directory_path() / "hcli-XXXXXX").string();
  folder_ = mkdtemp(pattern.data());
  server_ = std::make_unique<Server>(this);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address(), grpc::InsecureServerCredentials());
  builder.RegisterService(&server_->jobs);
  builder.RegisterService(&server_->checkpoints);
  builder.RegisterService(&server_->nodes);
  builder.RegisterService(&server_->cluster);
  server_->server = builder.BuildAndStart();
  job.set_id("j-7k2");
  job.set_name("demo");
  job.set_state("ACTIVE");
  job.set_phase("RUNNING");
  job.set_kind("train");
}

FakeCluster::~FakeCluster() {
  server_->server->Shutdown();
  std::filesystem::remove_all(folder_);
}

Outcome FakeCluster::Run(const std::vector<std::string>& words, bool bare) const {
  CommandContext context;
  context.home = folder_;
  context.program_dir = folder_;
  std::vector<std::string> all = {"heddle"};
  all.insert(all.end(), words.begin(), words.end());
  if (!bare) {
    setenv("HEDDLE_COORDINATOR", address().c_str(), 1);
  } else {
    unsetenv("HEDDLE_COORDINATOR");
  }
  std::vector<const char*> argv;
  for (const std::string& word : all) {
    argv.push_back(word.c_str());
  }
  Outcome outcome;
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  outcome.status = ParseAndRun(static_cast<int>(argv.size()), argv.data(), AllVerbs(), &context);
  outcome.out = ::testing::internal::GetCapturedStdout();
  outcome.err = ::testing::internal::GetCapturedStderr();
  return outcome;
}

}  // namespace heddle::cli
