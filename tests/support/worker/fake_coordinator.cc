#include "tests/support/worker/fake_coordinator.h"

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <utility>

#include "base/net/grpc_channel.h"
#include "heddle/v1/worker_link.grpc.pb.h"

namespace heddle::test {

using Stream = grpc::ServerReaderWriter<v1::CoordMsg, v1::WorkerMsg>;

class FakeCoordinator::Service final : public v1::WorkerLink::Service {
 public:
  explicit Service(FakeCoordinator* owner) : owner_(owner) {
    grpc::ServerBuilder builder;
    net::ConfigureServer(&builder);
    builder.AddListeningPort("unix:" + owner->socket_path_, grpc::InsecureServerCredentials());
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    EXPECT_NE(server_, nullptr);
  }
  ~Service() override {
    gpr_timespec now = gpr_now(GPR_CLOCK_MONOTONIC);
    server_->Shutdown(now);  // streams are cut, as by a kill
    server_->Wait();
  }

  grpc::Status Register(grpc::ServerContext*, const v1::RegisterRequest* request,
                        v1::RegisterReply* reply) override {
    std::lock_guard<std::mutex> lock(owner_->mutex_);
    owner_->registrations_.push_back(*request);
    session_number_ = request->session();
    reply->set_cluster_id("fake-cluster");
    reply->set_term(owner_->term);
    reply->set_heartbeat_interval_ms(owner_->heartbeat_interval_ms);
    reply->set_permit_ttl_ms(owner_->permit_ttl_ms);
    reply->set_max_orphan_ms(owner_->max_orphan_ms);
    reply->set_checkpoint_root(owner_->checkpoint_root);
    for (const v1::TaskReport& report : request->tasks()) {
      owner_->Take(report);
      v1::RegisterReply::TaskDecision* decision = reply->add_tasks();
      decision->set_fence(report.fence());
      decision->set_task(report.task());
      const bool over = report.state() >= v1::TASK_STATE_EXITED;
      decision->set_verdict(owner_->verdict ? owner_->verdict(report)
                            : over          ? v1::TASK_VERDICT_FORGET
                                            : v1::TASK_VERDICT_ADOPT);
    }
    owner_->changed_.notify_all();
    return grpc::Status::OK;
  }

  grpc::Status Session(grpc::ServerContext*, Stream* stream) override {
    {
      std::lock_guard<std::mutex> lock(owner_->mutex_);
      stream_ = stream;
      ++owner_->sessions_;
    }
    owner_->changed_.notify_all();
    v1::WorkerMsg message;
    while (stream->Read(&message)) Hear(message);
    std::lock_guard<std::mutex> lock(owner_->mutex_);
    if (stream_ == stream) stream_ = nullptr;
    return grpc::Status::OK;
  }

  grpc::Status AppendLogs(grpc::ServerContext*,
                          grpc::ServerReaderWriter<v1::LogAck, v1::LogChunk>* stream) override {
    v1::LogChunk chunk;
    while (stream->Read(&chunk)) {
      v1::LogAck ack;
      ack.set_job(chunk.job());
      ack.set_fence(chunk.fence());
      ack.set_rank(chunk.rank());
      {
        std::lock_guard<std::mutex> lock(owner_->mutex_);
        std::string& log = owner_->logs_[{chunk.fence(), chunk.rank()}];
        if (chunk.offset() < log.size()) {
          owner_->log_bytes_repeated_ +=
              std::min<uint64_t>(chunk.data().size(), log.size() - chunk.offset());
        }
        if (chunk.offset() <= log.size() && chunk.offset() + chunk.data().size() > log.size()) {
          const uint64_t room = owner_->log_bytes_max - log.size();
          log += chunk.data().substr(log.size() - chunk.offset(), room);
        }
        uint64_t& lost = owner_->logs_lost_[{chunk.fence(), chunk.rank()}];
        lost = std::max(lost, chunk.lost());
        ack.set_next_offset(log.size());
      }
      owner_->changed_.notify_all();
      if (!stream->Write(ack)) break;
    }
    return grpc::Status::OK;
  }

  // REQUIRES: the owner's lock is held.
  bool Send(v1::CoordMsg message) {
    if (stream_ == nullptr) return false;
    message.set_cluster_id("fake-cluster");
    message.set_term(owner_->term);
    message.set_session(session_number_);
    return stream_->Write(message);
  }

 private:
  void Hear(const v1::WorkerMsg& message) {
    std::function<void(const v1::WorkerMsg&)> react;
    {
      std::lock_guard<std::mutex> lock(owner_->mutex_);
      owner_->messages_.push_back(message);
      v1::CoordMsg answer;
      if (message.has_report()) {
        const v1::TaskReport& report = message.report();
        v1::TaskReport& known = owner_->reports_[report.fence()];
        if (!owner_->numbers_may_fall) {
          EXPECT_GE(report.seq(), known.seq()) << "a report number fell";
        }
        answer.mutable_ack()->set_fence(report.fence());
        answer.mutable_ack()->set_task(report.task());
        answer.mutable_ack()->set_seq(std::max<uint64_t>(report.seq(), known.seq()));
        owner_->Take(report);
        if (owner_->acknowledge_reports) Send(answer);
      } else if (message.has_heartbeat() && owner_->answer_heartbeats) {
        answer.mutable_heartbeat()->set_n(message.heartbeat().n());
        for (const uint64_t fence : owner_->permitted) {
          v1::Permit* permit = answer.mutable_heartbeat()->add_permits();
          permit->set_fence(fence);
          permit->set_ttl_ms(owner_->permit_ttl_ms);
        }
        Send(answer);
      }
      react = owner_->on_message;
    }
    if (react) react(message);
    owner_->changed_.notify_all();
  }

  FakeCoordinator* const owner_;
  uint64_t session_number_ = 0;
  Stream* stream_ = nullptr;
  std::unique_ptr<grpc::Server> server_;
};

void FakeCoordinator::Take(const v1::TaskReport& report) {
  v1::TaskReport& known = reports_[report.fence()];
  if (report.seq() >= known.seq() || report.state() >= v1::TASK_STATE_EXITED) known = report;
}

FakeCoordinator::FakeCoordinator(std::string socket_path) : socket_path_(std::move(socket_path)) {}
FakeCoordinator::~FakeCoordinator() { Stop(); }

void FakeCoordinator::Start() { service_ = std::make_unique<Service>(this); }
void FakeCoordinator::Stop() {
  service_.reset();
  unlink(socket_path_.c_str());
}

std::vector<v1::RegisterRequest> FakeCoordinator::registrations() {
  std::lock_guard<std::mutex> lock(mutex_);
  return registrations_;
}
std::vector<v1::WorkerMsg> FakeCoordinator::messages() {
  std::lock_guard<std::mutex> lock(mutex_);
  return messages_;
}
std::optional<v1::TaskReport> FakeCoordinator::Report(uint64_t fence) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = reports_.find(fence);
  if (found == reports_.end()) return std::nullopt;
  return found->second;
}
std::string FakeCoordinator::Log(uint64_t fence, uint32_t rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return logs_[{fence, rank}];
}
uint64_t FakeCoordinator::LogLost(uint64_t fence, uint32_t rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return logs_lost_[{fence, rank}];
}
uint64_t FakeCoordinator::log_bytes_repeated() {
  std::lock_guard<std::mutex> lock(mutex_);
  return log_bytes_repeated_;
}
size_t FakeCoordinator::sessions() {
  std::lock_guard<std::mutex> lock(mutex_);
  return sessions_;
}

bool FakeCoordinator::WaitFor(const std::function<bool()>& condition,
                              std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (std::chrono::steady_clock::now() > deadline) return false;
    changed_.wait_for(lock, std::chrono::milliseconds(5));
  }
  return true;
}
bool FakeCoordinator::WaitForSessions(size_t count) {
  return WaitFor([&] { return sessions() >= count; });
}
bool FakeCoordinator::WaitForState(uint64_t fence, v1::TaskState state) {
  return WaitFor([&] {
    const std::optional<v1::TaskReport> report = Report(fence);
    // A short task may be past the state when its report is looked at.
    return report.has_value() &&
           (report->state() == state || (state < v1::TASK_STATE_EXITED && report->state() > state));
  });
}

bool FakeCoordinator::Send(v1::CoordMsg message) {
  std::lock_guard<std::mutex> lock(mutex_);
  return service_ != nullptr && service_->Send(std::move(message));
}

void FakeCoordinator::Assign(const v1::TaskAssignment& assignment) {
  v1::CoordMsg message;
  *message.mutable_assign() = assignment;
  EXPECT_TRUE(Send(message));
}
void FakeCoordinator::StartTask(const v1::TaskAssignment& assignment) {
  v1::CoordMsg message;
  message.mutable_start()->set_job(assignment.job());
  message.mutable_start()->set_fence(assignment.fence());
  message.mutable_start()->set_task(assignment.task());
  message.mutable_start()->mutable_start()->set_world_size(assignment.world_size());
  EXPECT_TRUE(Send(message));
}
void FakeCoordinator::StopTask(uint64_t fence, int64_t grace_ms, bool kill_now) {
  v1::CoordMsg message;
  message.mutable_stop()->set_fence(fence);
  message.mutable_stop()->set_task(0);
  message.mutable_stop()->set_kill_now(kill_now);
  message.mutable_stop()->mutable_stop()->set_mode(v1::STOP_MODE_CHECKPOINT_AND_EXIT);
  message.mutable_stop()->mutable_stop()->set_grace_ms(grace_ms);
  EXPECT_TRUE(Send(message));
}
void FakeCoordinator::Forget(uint64_t fence) {
  v1::CoordMsg message;
  message.mutable_forget()->set_fence(fence);
  message.mutable_forget()->set_task(0);
  EXPECT_TRUE(Send(message));
}

}  // namespace heddle::test
