// A disk with faults in front of a real one. Counts are of requests, from 1; 0: never.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "worker/offload/blocks.h"
#include "worker/offload/disk.h"

namespace heddle::offload {

struct DiskFaults {
  int read_error_at = 0;   // EIO
  int write_error_at = 0;  // ENOSPC
  int short_read_at = 0;   // the first half of the pages only
  int short_write_at = 0;
  int end_at_read = 0;                 // 100 bytes, as at the end of a file
  int flip_before_read = 0;            // one bit in the file, in the middle of what is read
  int again_at_read = 0;               // EAGAIN
  std::chrono::milliseconds delay{0};  // of every reply
  std::atomic<int>* reads_seen = nullptr;
};

class FaultyDisk : public Disk {
 public:
  FaultyDisk(std::unique_ptr<Disk> inner, const DiskFaults& faults)
      : inner_(std::move(inner)), faults_(faults) {}
  ~FaultyDisk() override {
    for (std::thread& timer : timers_) timer.join();
  }

  void Submit(const DiskRequest& request) override {
    DiskRequest changed = request;
    const int number = request.write ? ++writes_ : ++reads_;
    if (request.write) {
      if (number == faults_.write_error_at) return Reply({request.tag, -ENOSPC});
      if (number == faults_.short_write_at) changed.bytes = Half(request.bytes);
    } else {
      if (faults_.reads_seen != nullptr) *faults_.reads_seen = number;
      if (number == faults_.read_error_at) return Reply({request.tag, -EIO});
      if (number == faults_.again_at_read) return Reply({request.tag, -EAGAIN});
      if (number == faults_.end_at_read) return Reply({request.tag, 100});
      if (number == faults_.short_read_at) changed.bytes = Half(request.bytes);
      if (number == faults_.flip_before_read) FlipBit(request);
    }
    inner_->Submit(changed);
  }

  void Wait(std::vector<DiskReply>& replies) override {
    if (TakeOwn(replies)) return;
    if (faults_.delay.count() == 0) return inner_->Wait(replies);
    std::vector<DiskReply> early;
    inner_->Wait(early);
    for (const DiskReply& reply : early) {
      timers_.emplace_back([this, reply] {
        std::this_thread::sleep_for(faults_.delay);
        Reply(reply);
      });
    }
    TakeOwn(replies);
  }

  void Wake() override { inner_->Wake(); }
  std::string_view Name() const override { return inner_->Name(); }

 private:
  static int64_t Half(int64_t bytes) { return bytes / kPageBytes / 2 * kPageBytes; }

  void Reply(const DiskReply& reply) {
    {
      const std::lock_guard lock(mutex_);
      own_.push_back(reply);
    }
    inner_->Wake();
  }

  bool TakeOwn(std::vector<DiskReply>& replies) {
    const std::lock_guard lock(mutex_);
    replies.insert(replies.end(), own_.begin(), own_.end());
    return !std::exchange(own_, {}).empty();
  }

  static void FlipBit(const DiskRequest& request) {
    void* page = nullptr;
    if (posix_memalign(&page, kPageBytes, kPageBytes) != 0) abort();
    const int64_t at = request.offset + request.bytes / kPageBytes / 2 * kPageBytes;
    if (pread(request.fd, page, kPageBytes, at) != kPageBytes) abort();
    static_cast<unsigned char*>(page)[17] ^= 4;
    if (pwrite(request.fd, page, kPageBytes, at) != kPageBytes) abort();
    free(page);
  }

  const std::unique_ptr<Disk> inner_;
  const DiskFaults faults_;
  int reads_ = 0;
  int writes_ = 0;
  std::vector<std::thread> timers_;
  std::mutex mutex_;  // guards own_
  std::vector<DiskReply> own_;
};

}  // namespace heddle::offload
