#include "cli/commands/client.h"

#include <grpc/support/time.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <chrono>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "base/clock/clock.h"
#include "base/net/grpc_channel.h"
#include "cli/commands/context.h"
#include "cli/commands/verb.h"
#include "heddle/v1/jobs.grpc.pb.h"

namespace heddle::cli {
namespace {

using std::chrono::milliseconds;

constexpr int64_t kCallTimeoutMs = 30'000;
// How long a call is repeated while nobody answers: a restarting coordinator takes less.
constexpr int64_t kRetryMs = 3'000;
constexpr int64_t kRetryPauseMs = 50;

class GrpcClient : public Client {
 public:
  GrpcClient(std::shared_ptr<grpc::Channel> channel, std::string address, int64_t timeout_ms)
      : jobs_(v1::Jobs::NewStub(channel)),
        checkpoints_(v1::Checkpoints::NewStub(channel)),
        nodes_(v1::Nodes::NewStub(channel)),
        cluster_(v1::Cluster::NewStub(channel)),
        channel_(channel),
        address_(std::move(address)),
        timeout_ms_(timeout_ms > 0 ? timeout_ms : kCallTimeoutMs) {}

  StatusOr<v1::SubmitReply> Submit(const v1::SubmitRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::Submit, request);
  }
  StatusOr<v1::PlanReply> Plan(const v1::SubmitRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::Plan, request);
  }
  StatusOr<v1::Job> Get(const std::string& job) override {
    return Call(*jobs_, &v1::Jobs::Stub::Get, Ref(job));
  }
  StatusOr<v1::ListReply> List(const v1::ListRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::List, request);
  }
  StatusOr<v1::WhyReply> Why(const std::string& job) override {
    return Call(*jobs_, &v1::Jobs::Stub::Why, Ref(job));
  }
  StatusOr<v1::DoctorReply> Doctor(const std::string& job) override {
    return Call(*jobs_, &v1::Jobs::Stub::Doctor, Ref(job));
  }
  StatusOr<v1::Job> Stop(const v1::StopRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::Stop, request);
  }
  StatusOr<v1::Job> Hold(const v1::HoldRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::Hold, request);
  }
  StatusOr<v1::Job> Release(const v1::ReleaseRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::Release, request);
  }
  StatusOr<v1::Job> Resume(const v1::ResumeRequest& request) override {
    return Call(*jobs_, &v1::Jobs::Stub::Resume, request);
  }
  StatusOr<v1::CheckpointList> Checkpoints(const std::string& job) override {
    return Call(*checkpoints_, &v1::Checkpoints::Stub::List, Ref(job));
  }
  StatusOr<v1::CheckpointDetail> GetCheckpoint(const std::string& checkpoint) override {
    return Call(*checkpoints_, &v1::Checkpoints::Stub::Get, CheckpointRef(checkpoint));
  }
  StatusOr<v1::VerifyReply> VerifyCheckpoint(const std::string& checkpoint) override {
    return Call(*checkpoints_, &v1::Checkpoints::Stub::Verify, CheckpointRef(checkpoint));
  }
  StatusOr<v1::Checkpoint> Pin(const v1::PinRequest& request) override {
    return Call(*checkpoints_, &v1::Checkpoints::Stub::Pin, request);
  }
  StatusOr<v1::NodeList> Nodes() override {
    return Call(*nodes_, &v1::Nodes::Stub::List, v1::NodesListRequest());
  }
  StatusOr<v1::Node> GetNode(const std::string& node) override {
    v1::NodeRef ref;
    ref.set_node(node);
    return Call(*nodes_, &v1::Nodes::Stub::Get, ref);
  }
  StatusOr<v1::Node> Administer(const v1::NodeAdminRequest& request) override {
    return Call(*nodes_, &v1::Nodes::Stub::Administer, request);
  }
  StatusOr<v1::StatusReply> ClusterStatus() override {
    return Call(*cluster_, &v1::Cluster::Stub::Status, v1::StatusRequest());
  }

  Status Watch(const v1::WatchRequest& request,
               const std::function<bool(const v1::WatchFrame&)>& on_frame) override {
    return Stream<v1::WatchFrame>(
        [&](grpc::ClientContext* context) { return jobs_->Watch(context, request); }, on_frame);
  }
  Status Logs(const v1::LogsRequest& request,
              const std::function<bool(const v1::LogLine&)>& on_line) override {
    return Stream<v1::LogLine>(
        [&](grpc::ClientContext* context) { return jobs_->Logs(context, request); }, on_line);
  }
  Status Metrics(const v1::MetricsRequest& request,
                 const std::function<bool(const v1::MetricPoint&)>& on_point) override {
    return Stream<v1::MetricPoint>(
        [&](grpc::ClientContext* context) { return jobs_->Metrics(context, request); }, on_point);
  }

  void CancelStreams() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
    for (grpc::ClientContext* context : streams_) {
      context->TryCancel();
    }
  }

 private:
  static v1::JobRef Ref(const std::string& job) {
    v1::JobRef ref;
    ref.set_job(job);
    return ref;
  }
  static v1::CheckpointRef CheckpointRef(const std::string& checkpoint) {
    v1::CheckpointRef ref;
    ref.set_checkpoint(checkpoint);
    return ref;
  }

  static gpr_timespec After(int64_t ms) {
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_nanos(ms * 1'000'000, GPR_TIMESPAN));
  }

  // One unary call, repeated on UNAVAILABLE: the transport makes that code too, so its outcome is
  // unknown and the request id settles it (reliability R12).
  template <typename Stub, typename Request, typename Reply>
  StatusOr<Reply> Call(Stub& stub,
                       grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Reply*),
                       const Request& request) {
    const SystemClock clock;
    const int64_t start = clock.NowSteady();
    while (true) {
      // Waiting here polls the connection; a loop of failing calls would leave that to a background
      // thread that looks every 5 s only.
      channel_->WaitForConnected(After(std::min(kRetryMs, timeout_ms_)));
      grpc::ClientContext context;
      context.set_deadline(
          gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                       gpr_time_from_nanos(timeout_ms_ * 1'000'000, GPR_TIMESPAN)));
      Reply reply;
      const grpc::Status status = (stub.*method)(&context, request, &reply);
      if (status.ok()) {
        return reply;
      }
      const int64_t waited = (clock.NowSteady() - start) / 1'000'000;
      if (status.error_code() != grpc::StatusCode::UNAVAILABLE ||
          waited + kRetryPauseMs > std::min(kRetryMs, timeout_ms_)) {
        return Explain(status);
      }
      std::this_thread::sleep_for(milliseconds(kRetryPauseMs));
    }
  }

  Status Explain(const grpc::Status& status) const {
    Status ours = net::FromGrpc(status);
    if (ours.code() == StatusCode::kUnavailable || ours.code() == StatusCode::kDeadlineExceeded) {
      return Annotate(ours, Str("coordinator ", address_, " does not answer"));
    }
    return ours;
  }

  template <typename Frame, typename Open>
  Status Stream(Open open, const std::function<bool(const Frame&)>& on_frame) {
    grpc::ClientContext context;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (cancelled_) {
        return OkStatus();
      }
      streams_.insert(&context);
    }
    auto reader = open(&context);
    Frame frame;
    bool stopped = false;
    while (!stopped && reader->Read(&frame)) {
      stopped = !on_frame(frame);
    }
    if (stopped) {
      context.TryCancel();
    }
    const grpc::Status status = reader->Finish();
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.erase(&context);
    return stopped || cancelled_ || status.ok() ? OkStatus() : Explain(status);
  }

  const std::unique_ptr<v1::Jobs::Stub> jobs_;
  const std::unique_ptr<v1::Checkpoints::Stub> checkpoints_;
  const std::unique_ptr<v1::Nodes::Stub> nodes_;
  const std::unique_ptr<v1::Cluster::Stub> cluster_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::string address_;
  const int64_t timeout_ms_;
  std::mutex mutex_;
  std::set<grpc::ClientContext*> streams_;  // guarded by mutex_
  bool cancelled_ = false;                  // guarded by mutex_
};

}  // namespace

StatusOr<std::unique_ptr<Client>> Client::Open(const CommandContext& context) {
  ASSIGN_OR_RETURN(const std::string address, CoordinatorAddress(context));
  ASSIGN_OR_RETURN(const net::Endpoint endpoint, net::ParseEndpoint(address));
  const net::Security security{.tls = context.tls, .insecure_loopback = context.insecure_loopback};
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, net::OpenChannel(endpoint, security));
  return std::unique_ptr<Client>(
      std::make_unique<GrpcClient>(std::move(channel), address, context.timeout_ms));
}

std::string NewRequestId() {
  unsigned char bytes[16] = {};
  std::ifstream("/dev/urandom", std::ios::binary).read(reinterpret_cast<char*>(bytes), 16);
  static const char* const kDigits = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace heddle::cli
