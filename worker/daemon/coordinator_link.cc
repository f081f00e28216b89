#include "worker/daemon/coordinator_link.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include <grpcpp/channel.h>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

#include "base/log/log.h"
#include "heddle/v1/worker_link.grpc.pb.h"
#include "worker/daemon/grpc_stream.h"

namespace heddle::worker {
namespace {

using Stream = GrpcStream<v1::WorkerMsg, v1::CoordMsg>;
using std::chrono::milliseconds;

constexpr milliseconds kRegisterDeadline{5'000};
constexpr milliseconds kFirstBackoff{50};
constexpr milliseconds kBackoffMax{1'000};
constexpr milliseconds kFlushStep{10};
constexpr int kFlushSteps = 100;

}  // namespace

class CoordinatorLink::Impl : public std::enable_shared_from_this<Impl> {
 public:
  Impl(boost::asio::io_context* io, std::shared_ptr<grpc::Channel> channel, Handlers handlers)
      : io_(io),
        stub_(v1::WorkerLink::NewStub(std::move(channel))),
        handlers_(std::move(handlers)),
        timer_(*io) {}

  void Register() {
    if (stopping_) return CheckStopped();
    auto call = std::make_shared<Unary>();
    call->request = handlers_.make_request();
    call->context.set_deadline(std::chrono::system_clock::time_point(DeadlineWall()));
    registering_ = call;
    stub_->async()->Register(&call->context, &call->request, &call->reply,
                             [self = shared_from_this(), call](const grpc::Status& status) {
                               boost::asio::post(*self->io_,
                                                 [self, call, result = net::FromGrpc(status)] {
                                                   self->OnRegistered(*call, result);
                                                 });
                             });
  }

  bool Send(v1::WorkerMsg message) {
    if (stream_ == nullptr) return false;
    stream_->Send(std::move(message));
    return true;
  }

  bool connected() const { return stream_ != nullptr; }

  void Restart(const Status& why) {
    if (stream_ == nullptr) return;
    HEDDLE_WARN("registering anew", {"why", Message(why)});
    stream_->Cancel();  // on_done follows
  }

  void Stop(bool flush, std::function<void()> done) {
    if (stopping_) return;
    stopping_ = true;
    stopped_ = std::move(done);
    timer_.cancel();
    if (registering_ != nullptr) registering_->context.TryCancel();
    Drain(flush ? kFlushSteps : 0);
  }

 private:
  struct Unary {
    grpc::ClientContext context;
    v1::RegisterRequest request;
    v1::RegisterReply reply;
  };

  // gRPC's deadline type counts on the wall clock only at this border.
  static std::chrono::system_clock::time_point DeadlineWall() {
    timespec now = {};
    clock_gettime(CLOCK_REALTIME, &now);
    return std::chrono::system_clock::time_point(
        std::chrono::duration_cast<std::chrono::system_clock::duration>(
            std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec) +
            kRegisterDeadline));
  }

  void OnRegistered(const Unary& call, const Status& result) {
    registering_.reset();
    if (stopping_) return CheckStopped();
    Status status = result;
    if (status.ok()) {
      auto stream = std::make_shared<Stream>(
          io_, Stream::Handlers{
                   [self = shared_from_this()](const v1::CoordMsg& message) {
                     if (!self->stopping_) self->handlers_.on_message(message);
                   },
                   [self = shared_from_this()](const Status& why) { self->OnStreamDone(why); }});
      stub_->async()->Session(stream->context(), stream.get());
      stream_ = stream;
      stream->Start();
      status = handlers_.on_registered(call.reply);
      if (status.ok()) {
        backoff_ = kFirstBackoff;
        last_failure_.clear();
        return;
      }
      stream->Cancel();
    }
    // The same reason is logged once, not every second.
    if (Message(status) != last_failure_) {
      last_failure_ = Message(status);
      HEDDLE_WARN("not registered", {"why", last_failure_});
    }
    if (stream_ == nullptr) RetryLater();
  }

  void OnStreamDone(const Status& why) {
    stream_.reset();
    if (stopping_) return CheckStopped();
    HEDDLE_WARN("stream to the coordinator ended", {"why", Message(why)});
    handlers_.on_lost(why);
    RetryLater();
  }

  void RetryLater() {
    timer_.expires_after(backoff_);
    backoff_ = std::min(backoff_ * 2, kBackoffMax);
    timer_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
      if (!error) self->Register();
    });
  }

  void Drain(int steps_left) {
    if (stream_ == nullptr) return CheckStopped();
    if (steps_left == 0 || stream_->queued() == 0) return stream_->Cancel();
    timer_.expires_after(kFlushStep);
    timer_.async_wait(
        [self = shared_from_this(), steps_left](const boost::system::error_code& error) {
          if (!error) self->Drain(steps_left - 1);
        });
  }

  void CheckStopped() {
    if (stream_ != nullptr || registering_ != nullptr || !stopped_) return;
    boost::asio::post(*io_, std::exchange(stopped_, nullptr));
  }

  boost::asio::io_context* const io_;
  const std::unique_ptr<v1::WorkerLink::Stub> stub_;
  const Handlers handlers_;
  boost::asio::steady_timer timer_;
  std::shared_ptr<Unary> registering_;
  std::shared_ptr<Stream> stream_;
  milliseconds backoff_ = kFirstBackoff;
  std::string last_failure_;
  bool stopping_ = false;
  std::function<void()> stopped_;
};

CoordinatorLink::CoordinatorLink(boost::asio::io_context* io,
                                 std::shared_ptr<grpc::Channel> channel, Handlers handlers)
    : impl_(std::make_shared<Impl>(io, std::move(channel), std::move(handlers))) {}
CoordinatorLink::~CoordinatorLink() = default;
void CoordinatorLink::Start() { impl_->Register(); }
bool CoordinatorLink::Send(v1::WorkerMsg message) { return impl_->Send(std::move(message)); }
bool CoordinatorLink::connected() const { return impl_->connected(); }
void CoordinatorLink::Restart(const Status& why) { impl_->Restart(why); }
void CoordinatorLink::Stop(bool flush, std::function<void()> done) {
  impl_->Stop(flush, std::move(done));
}

}  // namespace heddle::worker
