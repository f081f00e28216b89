#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

#include "worker/offload/disk.h"

namespace heddle::offload {
namespace {

constexpr uint64_t kWakeTag = ~uint64_t{0};

// A poll of an eventfd stands in the ring beside the requests, so that one wait sees both.
class UringDisk : public Disk {
 public:
  UringDisk() = default;
  ~UringDisk() override {
    if (ready_) io_uring_queue_exit(&ring_);
    if (wake_fd_ >= 0) close(wake_fd_);
  }
  UringDisk(const UringDisk&) = delete;
  UringDisk& operator=(const UringDisk&) = delete;

  Status Open() {
    wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_fd_ < 0) return FromErrno("eventfd");
    // One entry more than requests: the poll.
    if (const int error = io_uring_queue_init(2 * kDiskRequests, &ring_, 0); error < 0) {
      return FromErrno("io_uring_setup", {}, -error);
    }
    ready_ = true;
    io_uring_probe* const probe = io_uring_get_probe_ring(&ring_);
    const bool enough = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0 &&
                        io_uring_opcode_supported(probe, IORING_OP_WRITE) != 0;
    if (probe != nullptr) io_uring_free_probe(probe);
    return enough ? OkStatus() : FromErrno("io_uring of a kernel before 5.6", {}, ENOSYS);
  }

  void Submit(const DiskRequest& request) override {
    HEDDLE_CHECK(request.tag < kWakeTag);
    io_uring_sqe* const entry = NextEntry();
    const auto bytes = static_cast<unsigned>(request.bytes);
    const auto offset = static_cast<uint64_t>(request.offset);
    if (request.write) {
      io_uring_prep_write(entry, request.fd, request.data, bytes, offset);
    } else {
      io_uring_prep_read(entry, request.fd, request.data, bytes, offset);
    }
    io_uring_sqe_set_data64(entry, request.tag);
    // If the kernel is short of memory now, Wait submits it.
    io_uring_submit(&ring_);
  }

  void Wait(std::vector<DiskReply>& replies) override {
    Reap(replies);
    if (!replies.empty() || woken_) {
      woken_ = false;
      return;
    }
    while (replies.empty() && !woken_) {
      ArmWake();
      const int result = io_uring_submit_and_wait(&ring_, 1);
      // Short of memory, or of room for results: taking results out gives both back.
      const bool passes = result == -EAGAIN || result == -EBUSY || result == -ENOMEM;
      HEDDLE_CHECK(result >= 0 || result == -EINTR || passes);
      Reap(replies);
      if (passes) std::this_thread::yield();
    }
    woken_ = false;
  }

  void Wake() override {
    const uint64_t one = 1;
    // EAGAIN: 2^64 - 2 wakes are pending, so one more changes nothing.
    while (write(wake_fd_, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
  }

  std::string_view Name() const override { return "io_uring"; }

 private:
  io_uring_sqe* NextEntry() {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    while (entry == nullptr) {
      io_uring_submit(&ring_);
      std::this_thread::yield();
      entry = io_uring_get_sqe(&ring_);
    }
    return entry;
  }

  void ArmWake() {
    if (armed_) return;
    io_uring_sqe* const entry = NextEntry();
    io_uring_prep_poll_add(entry, wake_fd_, POLLIN);
    io_uring_sqe_set_data64(entry, kWakeTag);
    armed_ = true;
  }

  void Reap(std::vector<DiskReply>& replies) {
    io_uring_cqe* reply = nullptr;
    while (io_uring_peek_cqe(&ring_, &reply) == 0) {
      if (io_uring_cqe_get_data64(reply) == kWakeTag) {
        uint64_t count = 0;
        while (read(wake_fd_, &count, sizeof(count)) < 0 && errno == EINTR) {
        }
        armed_ = false;
        woken_ = true;
      } else {
        replies.push_back({io_uring_cqe_get_data64(reply), reply->res});
      }
      io_uring_cqe_seen(&ring_, reply);
    }
  }

  io_uring ring_ = {};
  int wake_fd_ = -1;
  bool ready_ = false;
  bool armed_ = false;
  bool woken_ = false;
};

}  // namespace

StatusOr<std::unique_ptr<Disk>> MakeUringDisk() {
  auto disk = std::make_unique<UringDisk>();
  if (const Status opened = disk->Open(); !opened.ok()) {
    return FailedPrecondition(Str("io_uring is refused here: ", Message(opened),
                                  ": allow it (seccomp, kernel.io_uring_disabled) or use threads"));
  }
  return disk;
}

StatusOr<std::unique_ptr<Disk>> MakeDisk(DiskMethod method) {
  if (method == DiskMethod::kThreads) return MakeThreadDisk();
  StatusOr<std::unique_ptr<Disk>> uring = MakeUringDisk();
  if (uring.ok() || method == DiskMethod::kUring) return uring;
  return MakeThreadDisk();
}

}  // namespace heddle::offload
