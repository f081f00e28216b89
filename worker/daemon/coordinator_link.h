// The conversation with the coordinator: register, then one stream; after any loss the same again
// with a back-off of at most 1 s. State thread only; gRPC's threads never touch our state.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include <boost/asio/io_context.hpp>

#include "base/status/status.h"
#include "heddle/v1/worker_link.pb.h"

namespace grpc {
class Channel;
}

namespace heddle::worker {

class CoordinatorLink {
 public:
  struct Handlers {
    // What to register with now; called before each attempt.
    std::function<v1::RegisterRequest()> make_request;
    // Accepted. An error (stale term, other cluster) makes the link try again later.
    std::function<Status(const v1::RegisterReply&)> on_registered;
    std::function<void(const v1::CoordMsg&)> on_message;
    // The stream that on_registered announced is gone.
    std::function<void(const Status&)> on_lost;
  };

  CoordinatorLink(boost::asio::io_context* io, std::shared_ptr<grpc::Channel> channel,
                  Handlers handlers);
  ~CoordinatorLink();
  CoordinatorLink(const CoordinatorLink&) = delete;
  CoordinatorLink& operator=(const CoordinatorLink&) = delete;

  void Start();
  // Queues on the open stream; false without one.
  bool Send(v1::WorkerMsg message);
  bool connected() const;
  // The stream is useless (no answers, stale session): drop it and register again.
  void Restart(const Status& why);
  // Ends everything. `done` when gRPC holds nothing of ours any more. `flush`: close the stream
  // after what is queued was sent, at most 1 s.
  void Stop(bool flush, std::function<void()> done);

 private:
  class Impl;
  // Shared: gRPC callbacks that are under way hold it.
  std::shared_ptr<Impl> impl_;
};

}  // namespace heddle::worker
