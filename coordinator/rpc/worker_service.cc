// Service WorkerLink: registration, the session stream, logs.
#include <grpcpp/support/server_callback.h>

#include <deque>
#include <mutex>

#include "base/net/grpc_channel.h"
#include "coordinator/rpc/core.h"
#include "coordinator/rpc/log_files.h"
#include "coordinator/rpc/services.h"
#include "heddle/v1/worker_link.grpc.pb.h"

namespace heddle::rpc {
namespace {

using Context = grpc::CallbackServerContext;

// Version of control frames and worker messages that this coordinator speaks (control-plane X11);
// worker/control kProtocolVersion is the worker's.
constexpr uint32_t kProtocol = 1;

// One worker's stream. Alive until gRPC is done; the core reaches it through a weak_ptr.
class SessionStream final : public grpc::ServerBidiReactor<v1::WorkerMsg, v1::CoordMsg> {
 public:
  static SessionStream* Start(Core* core) {
    std::shared_ptr<SessionStream> stream(new SessionStream(core));
    stream->self_ = stream;
    stream->weak_self_ = stream;
    stream->StartRead(&stream->incoming_);
    return stream.get();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Close(grpc::Status::OK);
      return;
    }
    core_->Post([stream = self_, message = std::move(incoming_)] { stream->Handle(message); });
    incoming_ = v1::WorkerMsg();
    StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    queue_.pop_front();
    if (!ok) {
      queue_.clear();
      closing_ = true;
    }
    WriteNext();
  }

  void OnCancel() override { Close(grpc::Status::CANCELLED); }

  void OnDone() override {
    core_->Post([stream = self_] { stream->Detach(); });
    std::shared_ptr<SessionStream> last = std::move(self_);
  }

 private:
  explicit SessionStream(Core* core) : core_(core) {}

  // State thread.
  void Handle(const v1::WorkerMsg& message) {
    if (worker_.empty()) {
      worker_ = message.worker_id();
      session_ = message.session();
      core_->AttachWorker(worker_, session_, [weak = weak_self_](const v1::CoordMsg& out) {
        if (const std::shared_ptr<SessionStream> stream = weak.lock(); stream != nullptr) {
          stream->Send(out);
        }
      });
    }
    if (message.worker_id() != worker_ || message.session() != session_) {
      Close(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT,
                         "one stream carries one worker and one session"));
      return;
    }
    core_->OnWorkerMessage(message);
  }

  void Detach() {
    if (!worker_.empty()) {
      core_->DetachWorker(worker_, session_);
    }
  }

  void Send(const v1::CoordMsg& message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) {
      return;
    }
    if (queue_.size() >= kQueueMax) {  // a worker that does not read registers anew
      queue_.erase(queue_.begin() + (writing_ ? 1 : 0), queue_.end());
      CloseLocked(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the worker does not read"));
      return;
    }
    queue_.push_back(message);
    const bool stale = message.has_stale();
    WriteNext();
    if (stale) {
      CloseLocked(grpc::Status(grpc::StatusCode::ABORTED, "stale session: register anew"));
    }
  }

  void Close(const grpc::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    CloseLocked(status);
  }
  void CloseLocked(const grpc::Status& status) {
    if (!closing_) {
      closing_ = true;
      status_ = status;
    }
    WriteNext();
  }
  void WriteNext() {
    if (writing_ || finished_) {
      return;
    }
    if (!queue_.empty()) {
      writing_ = true;
      StartWrite(&queue_.front());
    } else if (closing_) {
      finished_ = true;
      Finish(status_);
    }
  }

  static constexpr size_t kQueueMax = 65536;
  Core* const core_;
  std::string worker_;                      // state thread
  uint64_t session_ = 0;                    // state thread
  std::weak_ptr<SessionStream> weak_self_;  // never written after Start, unlike self_
  v1::WorkerMsg incoming_;
  std::mutex mutex_;
  std::deque<v1::CoordMsg> queue_;  // guarded by mutex_
  bool writing_ = false;
  bool closing_ = false;
  bool finished_ = false;
  grpc::Status status_;
  std::shared_ptr<SessionStream> self_;
};

// Chunks of many ranks in, the next wanted offset of each out. One chunk at a time: a worker that
// is ahead of the disk waits in its own send buffer.
class LogStream final : public grpc::ServerBidiReactor<v1::LogChunk, v1::LogAck> {
 public:
  LogStream(Core* core, LogFiles* logs) : core_(core), logs_(logs) { StartRead(&chunk_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::OK);
      return;
    }
    core_->Post([this] { Judge(); });
  }
  void OnWriteDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::CANCELLED);
      return;
    }
    StartRead(&chunk_);
  }
  void OnDone() override { delete this; }

 private:
  // State thread. Bytes that belong to no attempt we know are taken and dropped, so that a worker
  // with leftovers of another life does not offer them for ever.
  void Judge() {
    const v1::AttemptRecord* attempt =
        core_->state().attempt(JobId{chunk_.job()}, chunk_.attempt());
    if (attempt == nullptr || attempt->fence() != chunk_.fence()) {
      Acknowledge(chunk_.offset() + chunk_.data().size());
      return;
    }
    core_->PostFileWork([this] { Acknowledge(logs_->Append(chunk_)); });
  }

  void Acknowledge(const StatusOr<uint64_t>& next) {
    if (!next.ok()) {
      Finish(net::ToGrpc(next.status()));
      return;
    }
    ack_.set_job(chunk_.job());
    ack_.set_fence(chunk_.fence());
    ack_.set_rank(chunk_.rank());
    ack_.set_next_offset(*next);
    StartWrite(&ack_);
  }

  Core* const core_;
  LogFiles* const logs_;
  v1::LogChunk chunk_;
  v1::LogAck ack_;
};

class WorkerService final : public v1::WorkerLink::CallbackService {
 public:
  WorkerService(Core* core, LogFiles* logs) : core_(core), logs_(logs) {}

  grpc::ServerUnaryReactor* Register(Context* context, const v1::RegisterRequest* request,
                                     v1::RegisterReply* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (request->protocol() != kProtocol) {
      reactor->Finish(net::ToGrpc(FailedPrecondition(
          Str("worker ", request->host(), " speaks protocol ", request->protocol(),
              ", this coordinator speaks ", kProtocol, ": install the same version on both"))));
      return reactor;
    }
    core_->Post([this, reactor, request, reply] {
      state::event::WorkerRegistered event;
      event.request = *request;
      core_->Execute(std::move(event), [this, reactor, reply](const state::Outcome& outcome) {
        if (outcome.registration.has_value()) {
          *reply = *outcome.registration;
          reply->set_checkpoint_root(core_->checkpoint_root());
        }
        reactor->Finish(net::ToGrpc(outcome.status));
      });
    });
    return reactor;
  }

  grpc::ServerBidiReactor<v1::WorkerMsg, v1::CoordMsg>* Session(Context*) override {
    return SessionStream::Start(core_);
  }

  grpc::ServerBidiReactor<v1::LogChunk, v1::LogAck>* AppendLogs(Context*) override {
    return new LogStream(core_, logs_);
  }

 private:
  Core* const core_;
  LogFiles* const logs_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeWorkerService(Core* core, LogFiles* logs) {
  return std::make_unique<WorkerService>(core, logs);
}

}  // namespace heddle::rpc
