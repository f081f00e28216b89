// The daemon's end of one shim: starts it, connects, cuts and sends frames. Lives on the state
// thread; every callback comes from there and never from inside a call.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>

#include "base/status/status.h"
#include "worker/control/control_frame.h"

namespace heddle::worker {

// Shared: asynchronous operations hold it until they end.
class ShimConnection : public std::enable_shared_from_this<ShimConnection> {
 public:
  struct Handlers {
    // Once after Start: OK, or what the shim said. ALREADY_EXISTS: another shim runs this task.
    std::function<void(const Status&)> on_started;
    // `number` counts reliable frames of this connection from 1; 0 for the others.
    std::function<void(const control::Frame&, uint64_t number)> on_frame;
    // The connection ended; no more callbacks come.
    std::function<void(const Status&)> on_closed;
  };

  ShimConnection(boost::asio::io_context* io, std::string task_dir, Handlers handlers);

  // Runs `shim run TASK_DIR` and waits for its word.
  void Start(const std::string& shim);
  // Connects to shim.sock; the error if nobody listens.
  Status Connect();
  // Ends quietly: no callback after it.
  void Close();
  bool connected() const { return socket_.is_open(); }

  void Send(control::FrameType type, uint64_t fence, uint32_t rank, std::string_view payload);

 private:
  void ReadWord();
  void Read();
  void Write();
  void Fail(const Status& status);

  boost::asio::io_context* const io_;
  const std::string task_dir_;
  Handlers handlers_;
  boost::asio::posix::stream_descriptor word_pipe_;
  std::string word_;
  int shim_pid_ = -1;
  boost::asio::local::stream_protocol::socket socket_;
  control::FrameReader reader_;
  std::string buffer_;
  std::deque<std::string> queue_;
  bool writing_ = false;
  bool closed_ = false;
  uint64_t received_ = 0;
};

}  // namespace heddle::worker
