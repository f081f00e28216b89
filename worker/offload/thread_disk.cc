#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "worker/offload/disk.h"

namespace heddle::offload {
namespace {

class ThreadDisk : public Disk {
 public:
  explicit ThreadDisk(int threads) {
    HEDDLE_CHECK(threads > 0);
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { Work(); });
    }
  }

  ~ThreadDisk() override {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  ThreadDisk(const ThreadDisk&) = delete;
  ThreadDisk& operator=(const ThreadDisk&) = delete;

  void Submit(const DiskRequest& request) override {
    {
      const std::lock_guard lock(mutex_);
      requests_.push_back(request);
    }
    work_.notify_one();
  }

  void Wait(std::vector<DiskReply>& replies) override {
    std::unique_lock lock(mutex_);
    replied_.wait(lock, [this] { return woken_ || !replies_.empty(); });
    woken_ = false;
    replies.insert(replies.end(), replies_.begin(), replies_.end());
    replies_.clear();
  }

  void Wake() override {
    {
      const std::lock_guard lock(mutex_);
      woken_ = true;
    }
    replied_.notify_one();
  }

  std::string_view Name() const override { return "threads"; }

 private:
  static int64_t Run(const DiskRequest& request) {
    const auto bytes = static_cast<size_t>(request.bytes);
    ssize_t result = -1;
    do {
      result = request.write ? pwrite(request.fd, request.data, bytes, request.offset)
                             : pread(request.fd, request.data, bytes, request.offset);
    } while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
  }

  void Work() {
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stopped_ || !requests_.empty(); });
      if (stopped_) return;
      const DiskRequest request = requests_.front();
      requests_.pop_front();
      lock.unlock();
      const int64_t result = Run(request);
      lock.lock();
      replies_.push_back({request.tag, result});
      replied_.notify_one();
    }
  }

  std::mutex mutex_;  // guards all below but the threads
  std::condition_variable work_;
  std::condition_variable replied_;
  std::deque<DiskRequest> requests_;
  std::vector<DiskReply> replies_;
  bool woken_ = false;
  bool stopped_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Disk> MakeThreadDisk(int threads) { return std::make_unique<ThreadDisk>(threads); }

}  // namespace heddle::offload
