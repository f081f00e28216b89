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

  // Queues a frame, counted as `bytes` in queued_bytes(). False: the stream is over. Any thread.
  bool Push(Frame frame, size_t bytes = 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) {
      return false;
    }
    queued_bytes_ += bytes;
    queue_.push_back({std::move(frame), bytes});
    WriteNext();
    return true;
  }

  size_t queued() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return queue_.size();
  }

  // Feeders of large streams stop at a bound of it (P10).
  size_t queued_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return queued_bytes_;
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

  // Called whenever the queue falls to empty. Set before the first Push. What it holds is released
  // when gRPC is done with the stream.
  void OnDrained(std::function<void()> drained) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!done_) {
      on_drained_ = std::move(drained);
    }
  }

  void OnWriteDone(bool ok) override {
    std::function<void()> drained;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      queued_bytes_ -= queue_.front().bytes;
      queue_.pop_front();
      if (!ok) {
        Clear();
        Finished(grpc::Status(grpc::StatusCode::CANCELLED, "the reader went away"));
        return;
      }
      WriteNext();
      if (queue_.empty() && !finished_) {
        drained = on_drained_;
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
      Clear();
      WriteNext();
    }
  }

  void OnDone() override {
    // Frees this object once no feeder holds it; must be the last use.
    std::shared_ptr<StreamWriter> last = std::move(self_);
    std::function<void()> drained;
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    drained.swap(on_drained_);
  }

 private:
  struct Queued {
    Frame frame;
    size_t bytes = 0;
  };
  StreamWriter() = default;

  // REQUIRES: mutex_ is held.
  void WriteNext() {
    if (writing_ || finished_) {
      return;
    }
    if (!queue_.empty()) {
      writing_ = true;
      this->StartWrite(&queue_.front().frame);
    } else if (closing_) {
      Finished(close_status_);
    }
  }
  void Clear() {
    queue_.clear();
    queued_bytes_ = 0;
  }
  void Finished(const grpc::Status& status) {
    if (!finished_) {
      finished_ = true;
      this->Finish(status);
    }
  }

  mutable std::mutex mutex_;
  std::deque<Queued> queue_;  // front is being written while writing_
  size_t queued_bytes_ = 0;
  std::function<void()> on_drained_;
  bool writing_ = false;
  bool closing_ = false;
  bool finished_ = false;
  bool done_ = false;
  grpc::Status close_status_;
  std::shared_ptr<StreamWriter> self_;
};

}  // namespace heddle::rpc
