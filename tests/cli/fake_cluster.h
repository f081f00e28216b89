// A coordinator that answers from canned replies over a unix socket, and a way to run command lines
// against it in this process. gRPC stays in the .cc file.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::cli {

// What a command line printed and returned.
struct Outcome {
  int status = -1;
  std::string out;
  std::string err;
};

class FakeCluster {
 public:
  FakeCluster();
  ~FakeCluster();
  FakeCluster(const FakeCluster&) = delete;
  FakeCluster& operator=(const FakeCluster&) = delete;

  // Runs `heddle WORDS...` with HEDDLE_HOME in this fake's folder and, unless `bare`, its address
  // as the context's coordinator.
  Outcome Run(const std::vector<std::string>& words, bool bare = false) const;

  const std::string& folder() const { return folder_; }
  std::string address() const { return "unix:" + folder_ + "/fake.sock"; }

  // The state of the cluster, set by tests before Run.
  v1::Job job;  // the one job; other ids are NOT_FOUND
  // Successive answers to Get, each once, before `job`.
  std::deque<v1::Job> history;
  v1::CheckpointDetail checkpoint;
  v1::VerifyReply verify;
  v1::Node node;
  v1::WhyReply why;
  v1::DoctorReply doctor;
  v1::PlanReply plan;  // with the request's configuration
  v1::StatusReply status;
  std::vector<v1::Event> events;
  std::vector<v1::LogLine> lines;
  std::vector<v1::MetricPoint> points;
  // Every call fails with this while it is not OK; `failures` counts it down (-1: for ever).
  Status failure;
  int failures = -1;
  // So many streams of logs and metrics break after their frames.
  int broken_streams = 0;

  // What arrived.
  std::vector<v1::SubmitRequest> submits;
  std::vector<v1::SubmitRequest> plans;
  std::vector<v1::StopRequest> stops;
  std::vector<v1::ResumeRequest> resumes;
  std::vector<v1::NodeAdminRequest> admins;
  v1::LogsRequest logs_request;
  v1::MetricsRequest metrics_request;
  v1::WatchRequest watch_request;

 private:
  struct Server;
  std::string folder_;
  std::unique_ptr<Server> server_;
};

}  // namespace heddle::cli
