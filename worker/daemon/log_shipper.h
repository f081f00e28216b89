// Sends what shims write into logs/ to the coordinator, by offset (control-plane X8, O4). The
// coordinator says where it stands, so a restart of either side loses and repeats nothing. What the
// shim lost, or what the coordinator does not take in time, is told as a number. inotify says when
// there is more; nothing polls. State thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/io_context.hpp>

#include "worker/daemon/task_folder.h"

namespace grpc {
class Channel;
}

namespace heddle::worker {

class LogShipper {
 public:
  // `timeout`: how long a coordinator that answers may take none of the bytes that are left of a
  // task that is over.
  LogShipper(boost::asio::io_context* io, std::shared_ptr<grpc::Channel> channel,
             std::string worker_id,
             std::chrono::milliseconds timeout = std::chrono::milliseconds(30'000));
  ~LogShipper();
  LogShipper(const LogShipper&) = delete;
  LogShipper& operator=(const LogShipper&) = delete;

  // Ships the logs of this task's ranks; above 64 ranks of the attempt only rank 0 (and Add).
  void Watch(const TaskFolder& folder);
  // One more rank, because it failed.
  void Add(const TaskFolder& folder, uint32_t rank);
  // Look at the task's files now.
  void Poke(const TaskKey& key);
  // `done` when everything written so far has arrived, or the coordinator knows how much will not;
  // then the task is dropped.
  void Finish(const TaskKey& key, std::function<void()> done);
  // The coordinator is there (again); `term` to say so.
  void Connect();
  void Stop(std::function<void()> done);

 private:
  class Impl;
  // Shared: gRPC callbacks that are under way hold it.
  std::shared_ptr<Impl> impl_;
};

}  // namespace heddle::worker
