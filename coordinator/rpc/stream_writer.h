// A server stream fed from the state thread: frames wait in a bounded queue, gRPC pulls them. The
// object keeps itself alive until gRPC is done with it; feeders hold it by weak_ptr.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace heddle::rpc {

template <typename Frame>
class StreamWriter : public grpc::ServerWriteReactor<Frame> {
 public:
  static std::shared_ptr<StreamWriter> Make() {
    std::shared_ptr<StreamWriter> writer(new StreamWriter);
    writer->self_ = writer;
    return writer;
  }

  // Queues a frame. False: the stream is over. Any thread.
  bool Push(Frame frame) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) {
      return false;
    }
    queue_.push_back(std::move(frame));
    WriteNext();
    return true;
  }

  size_t queued() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return queue_.size();
  }

  // Ends the stream after what is queued; later calls do nothing.
  void Close(const grpc::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (finished_ || closing_) {
      return;
    }
    closing_ = true;
    close_status_ = status;
    WriteNext();
  }

  bool open() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !finished_ && !closing_;
  }

  // Called once, when the queue fell to empty after having been full enough to stop a feeder; see
  // Watch. Set before the first Push.
  std::function<void()> on_drained;

  void OnWriteDone(bool ok) override {
    std::function<void()> drained;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      queue_.pop_front();
      if (!ok) {
        queue_.clear();
        Finished(grpc::Status(grpc::StatusCode::CANCELLED, "the reader went away"));
        return;
      }
      WriteNext();
      if (queue_.empty() && !finished_) {
        drained = on_drained;
      }
    }
    if (drained) {
      drained();
    }
  }

  void OnCancel() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    close_status_ = grpc::Status::CANCELLED;
    if (!writing_) {
      queue_.clear();
      WriteNext();
    }
  }

  void OnDone() override {
    // Frees this object once no feeder holds it; must be the last use.
    std::shared_ptr<StreamWriter> last = std::move(self_);
  }

 private:
  StreamWriter() = default;

  // REQUIRES: mutex_ is held.
  void WriteNext() {
    if (writing_ || finished_) {
      return;
    }
    if (!queue_.empty()) {
      writing_ = true;
      this->StartWrite(&queue_.front());
    } else if (closing_) {
      Finished(close_status_);
    }
  }
  void Finished(const grpc::Status& status) {
    if (!finished_) {
      finished_ = true;
      this->Finish(status);
    }
  }

  mutable std::mutex mutex_;
  std::deque<Frame> queue_;  // front is being written while writing_
  bool writing_ = false;
  bool closing_ = false;
  bool finished_ = false;
  grpc::Status close_status_;
  std::shared_ptr<StreamWriter> self_;
};

}  // namespace heddle::rpc
