// One bidirectional gRPC stream of the client, with gRPC's callbacks turned into posts to the state
// thread. Included only by the two files that open streams (gRPC headers are heavy).
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>

#include "base/net/grpc_channel.h"
#include "base/status/status.h"

namespace heddle::worker {

// Shared: gRPC holds it until OnDone.
template <typename Request, typename Response>
class GrpcStream : public grpc::ClientBidiReactor<Request, Response>,
                   public std::enable_shared_from_this<GrpcStream<Request, Response>> {
 public:
  struct Handlers {  // run on the state thread
    std::function<void(Response)> on_message;
    std::function<void(Status)> on_done;  // last; comes exactly once
  };

  GrpcStream(boost::asio::io_context* io, Handlers handlers)
      : io_(io), handlers_(std::move(handlers)) {}

  grpc::ClientContext* context() { return &context_; }

  // After the stub's async call was made with this reactor.
  void Start() {
    self_ = this->shared_from_this();
    // Send() starts writes from outside gRPC's reactions; the hold keeps OnDone away until the
    // reads ended, after which Send() starts none.
    this->AddHold();
    this->StartRead(&incoming_);
    this->StartCall();
  }

  void Send(Request request) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (done_) return;
    queue_.push_back(std::move(request));
    if (queue_.size() == 1) this->StartWrite(&queue_.front());
  }

  size_t queued() {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.size();
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        done_ = true;
      }
      return this->RemoveHold();
    }
    boost::asio::post(*io_,
                      [self = this->shared_from_this(), message = std::move(incoming_)]() mutable {
                        self->handlers_.on_message(std::move(message));
                      });
    incoming_ = Response();
    this->StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!ok) {
      done_ = true;
      return;
    }
    queue_.pop_front();
    if (!queue_.empty() && !done_) this->StartWrite(&queue_.front());
  }

  void OnDone(const grpc::Status& status) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    boost::asio::post(*io_, [self = std::move(self_), result = net::FromGrpc(status)] {
      self->handlers_.on_done(result);
    });
  }

 private:
  boost::asio::io_context* const io_;
  const Handlers handlers_;
  grpc::ClientContext context_;
  Response incoming_;
  std::shared_ptr<GrpcStream> self_;
  std::mutex mutex_;
  std::deque<Request> queue_;
  bool done_ = false;
};

}  // namespace heddle::worker
