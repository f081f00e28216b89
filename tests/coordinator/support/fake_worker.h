// A worker daemon that starts nothing: it registers, beats, and says what a test tells it to say,
// over real gRPC.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/worker_link.grpc.pb.h"

namespace heddle::test {

struct FakeWorkerOptions {
  std::string id = "worker-1";
  double cpus = 4;
  uint64_t memory_bytes = uint64_t{64} << 30;
  uint32_t protocol = 1;
  std::string instance = "boot-1";
};

class FakeWorker {
 public:
  FakeWorker(std::shared_ptr<grpc::Channel> channel, FakeWorkerOptions options);
  ~FakeWorker();

  // Registers with a new session, telling of `tasks`, and opens the stream. Retries while the
  // coordinator is not reachable, at most 20 s.
  StatusOr<v1::RegisterReply> Connect(const std::vector<v1::TaskReport>& tasks = {});
  // Ends the stream; the coordinator sees it closed.
  void Disconnect();

  void Beat();
  void Report(v1::TaskReport report);
  void Send(v1::WorkerMsg message);
  // Takes the first message for which `want` holds, waiting at most `patience_ms`; others stay.
  StatusOr<v1::CoordMsg> Take(const std::function<bool(const v1::CoordMsg&)>& want,
                              int patience_ms = 20'000);

  // The ordinary life of a task up to RUNNING and JOINED, for the assignment this worker gets.
  StatusOr<v1::TaskAssignment> RunAssigned(uint64_t start_step = 0);
  // Exits of all ranks with one code.
  void Exit(const v1::TaskAssignment& task, int code, const std::string& category = "");
  // Opens a checkpoint of `step`, writes a small real shard for every rank of the task and seals
  // it; the last verdict.
  StatusOr<v1::CheckpointReply> Save(const v1::TaskAssignment& task, uint64_t step);

  uint64_t session() const { return session_; }

 private:
  void ReadLoop();
  StatusOr<std::vector<v1::ShardFile>> WriteShard(const v1::TaskAssignment& task, uint64_t step,
                                                  uint32_t rank);
  v1::TaskReport Next(const v1::TaskAssignment& task, v1::TaskState state);

  std::shared_ptr<grpc::Channel> channel_;
  const FakeWorkerOptions options_;
  std::unique_ptr<v1::WorkerLink::Stub> stub_;
  std::string cluster_id_;
  std::string checkpoint_root_;
  uint64_t term_ = 0;
  uint64_t session_ = 0;
  uint64_t beats_ = 0;
  uint64_t seq_ = 0;
  uint64_t request_ = 0;

  struct Stream;
  std::unique_ptr<Stream> stream_;
  std::thread reader_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<v1::CoordMsg> inbox_;  // guarded by mutex_
};

}  // namespace heddle::test
