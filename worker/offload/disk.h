// Reads and writes of files that run while the caller does something else: io_uring, or a few
// threads with pread and pwrite where io_uring is forbidden (most container runtimes). Beneath the
// spill files, so that tests can put a disk with faults in its place.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::offload {

struct DiskRequest {
  bool write = false;
  int fd = -1;
  std::byte* data = nullptr;
  int64_t bytes = 0;
  int64_t offset = 0;
  uint64_t tag = 0;  // comes back with the reply; below 2^63
};

struct DiskReply {
  uint64_t tag = 0;
  int64_t result = 0;  // bytes moved, which may be fewer than asked for, or -errno
};

// Submit and Wait belong to one thread; Wake is for any thread. Before the end every request must
// have been answered.
class Disk {
 public:
  virtual ~Disk() = default;
  // Starts a request. Never fails itself: errors are replies. At most kDiskRequests at a time.
  virtual void Submit(const DiskRequest& request) = 0;
  // Appends replies; blocks until there is one, or until Wake.
  virtual void Wait(std::vector<DiskReply>& replies) = 0;
  // The Wait of now, or the next one, returns.
  virtual void Wake() = 0;
  virtual std::string_view Name() const = 0;
};
inline constexpr int kDiskRequests = 64;

enum class DiskMethod { kAuto, kUring, kThreads };

// FAILED_PRECONDITION, with the error named, where the kernel or a seccomp filter refuses io_uring.
StatusOr<std::unique_ptr<Disk>> MakeUringDisk();
// `threads` requests run at a time.
std::unique_ptr<Disk> MakeThreadDisk(int threads = 4);
// kAuto: io_uring, and threads where it is refused. Errors: those of MakeUringDisk.
StatusOr<std::unique_ptr<Disk>> MakeDisk(DiskMethod method);

}  // namespace heddle::offload
