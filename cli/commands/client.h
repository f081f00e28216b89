// The coordinator as the command line sees it: one call per RPC, deadlines and retries inside, no
// gRPC in this header. A call that meets a restarting coordinator is repeated for some seconds;
// mutating requests carry a request id, so a repeat has no second effect (control-plane section
// 12).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "base/status/status.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::cli {

struct CommandContext;

class Client {
 public:
  // Resolves the address (--coordinator, HEDDLE_COORDINATOR, the context that `heddle up` wrote)
  // and opens a channel; connects with the first call. UNAVAILABLE: no address is known.
  static StatusOr<std::unique_ptr<Client>> Open(const CommandContext& context);
  virtual ~Client() = default;

  // UNAVAILABLE after the retries; else the server's answer.
  virtual StatusOr<v1::SubmitReply> Submit(const v1::SubmitRequest& request) = 0;
  virtual StatusOr<v1::PlanReply> Plan(const v1::SubmitRequest& request) = 0;
  virtual StatusOr<v1::Job> Get(const std::string& job) = 0;
  virtual StatusOr<v1::ListReply> List(const v1::ListRequest& request) = 0;
  virtual StatusOr<v1::WhyReply> Why(const std::string& job) = 0;
  virtual StatusOr<v1::DoctorReply> Doctor(const std::string& job) = 0;
  virtual StatusOr<v1::Job> Stop(const v1::StopRequest& request) = 0;
  virtual StatusOr<v1::Job> Hold(const v1::HoldRequest& request) = 0;
  virtual StatusOr<v1::Job> Release(const v1::ReleaseRequest& request) = 0;
  virtual StatusOr<v1::Job> Resume(const v1::ResumeRequest& request) = 0;
  virtual StatusOr<v1::CheckpointList> Checkpoints(const std::string& job) = 0;
  virtual StatusOr<v1::CheckpointDetail> GetCheckpoint(const std::string& checkpoint) = 0;
  virtual StatusOr<v1::VerifyReply> VerifyCheckpoint(const std::string& checkpoint) = 0;
  virtual StatusOr<v1::Checkpoint> Pin(const v1::PinRequest& request) = 0;
  virtual StatusOr<v1::NodeList> Nodes() = 0;
  virtual StatusOr<v1::Node> GetNode(const std::string& node) = 0;
  virtual StatusOr<v1::Node> Administer(const v1::NodeAdminRequest& request) = 0;
  virtual StatusOr<v1::StatusReply> ClusterStatus() = 0;

  // Server streams. `on_frame` returns false to end the stream (then OK). Without a deadline.
  // UNAVAILABLE: the connection broke; the caller goes on from where it stood.
  virtual Status Watch(const v1::WatchRequest& request,
                       const std::function<bool(const v1::WatchFrame&)>& on_frame) = 0;
  virtual Status Logs(const v1::LogsRequest& request,
                      const std::function<bool(const v1::LogLine&)>& on_line) = 0;
  virtual Status Metrics(const v1::MetricsRequest& request,
                         const std::function<bool(const v1::MetricPoint&)>& on_point) = 0;
  // Ends streams that run on other threads; they return OK.
  virtual void CancelStreams() = 0;
};

// 128 random bits in hex: one per call of a mutating verb, kept over retries.
std::string NewRequestId();

}  // namespace heddle::cli
