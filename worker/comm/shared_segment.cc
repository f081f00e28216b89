#include "worker/comm/shared_segment.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <ctime>
#include <string>

namespace heddle::comm {

namespace {

constexpr size_t kSlotBytes = size_t{4} << 20;
constexpr size_t kSlotsPerRank = 2;
constexpr int kRanksMax = 64;
constexpr size_t kHeaderBytes = 64 * 1024;
// Ranks that compute alike arrive together: most waits end while spinning.
constexpr int kSpins = 4000;
constexpr std::chrono::milliseconds kLookAround{20};

size_t SegmentBytes(int world) {
  return kHeaderBytes + static_cast<size_t>(world) * kSlotsPerRank * kSlotBytes;
}

long Futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr,
                 0);
}

}  // namespace

struct SharedSegment::Header {
  struct alignas(128) Rank {
    std::atomic<uint64_t> posted;
    std::atomic<uint64_t> finished;
    std::atomic<int32_t> pid;
    std::atomic<uint64_t> tags[kSlotsPerRank];
  };
  // Grows with every post and finish: what sleepers watch.
  alignas(128) std::atomic<uint32_t> changes;
  alignas(128) std::atomic<uint32_t> aborted;
  alignas(128) std::atomic<uint32_t> sleepers;
  Rank ranks[kRanksMax];

  void Changed() {
    changes.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) Futex(&changes, FUTEX_WAKE, INT_MAX, nullptr);
  }
};

StatusOr<std::unique_ptr<SharedSegment>> SharedSegment::Create(int world) {
  static_assert(sizeof(Header) <= kHeaderBytes);
  if (world > kRanksMax) return InvalidArgument(Str(world, " ranks, at most ", kRanksMax));
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "heddle-collectives", MFD_CLOEXEC));
  if (fd < 0) return FromErrno("memfd_create");
  const off_t size = static_cast<off_t>(SegmentBytes(world));
  // Reserved now: a page that is missing later would be a SIGBUS in the middle of a step.
  const int failed = ftruncate(fd, size) != 0 ? errno : posix_fallocate(fd, 0, size);
  if (failed != 0) {
    close(fd);
    return FromErrno(Str("shared memory of ", size, " bytes"), {}, failed);
  }
  void* memory =
      mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    close(fd);
    return FromErrno("mmap", {}, error);
  }
  return std::unique_ptr<SharedSegment>(new SharedSegment(fd, memory, world));
}

StatusOr<std::unique_ptr<SharedSegment>> SharedSegment::Open(pid_t pid, int fd, int world) {
  const std::string path = Str("/proc/", pid, "/fd/", fd);
  const int own = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (own < 0) return FromErrno("open", path);
  void* memory = mmap(nullptr, SegmentBytes(world), PROT_READ | PROT_WRITE, MAP_SHARED, own, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    close(own);
    return FromErrno("mmap", path, error);
  }
  return std::unique_ptr<SharedSegment>(new SharedSegment(own, memory, world));
}

SharedSegment::~SharedSegment() {
  munmap(memory_, SegmentBytes(world_));
  close(fd_);
  for (const int peer : peers_) {
    if (peer >= 0) close(peer);
  }
}

size_t SharedSegment::slot_bytes() const { return kSlotBytes; }

std::byte* SharedSegment::slot(int rank, uint64_t round) const {
  const size_t index = static_cast<size_t>(rank) * kSlotsPerRank + round % kSlotsPerRank;
  return static_cast<std::byte*>(memory_) + kHeaderBytes + index * kSlotBytes;
}

void SharedSegment::Enter(int rank) {
  rank_ = rank;
  header()->ranks[rank].pid.store(getpid(), std::memory_order_release);
}

Status SharedSegment::WatchPeers() {
  for (int r = 0; r < world_; ++r) {
    const pid_t pid = header()->ranks[r].pid.load(std::memory_order_acquire);
    const int peer = r == rank_ ? -1 : static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (r != rank_ && peer < 0) return FromErrno(Str("process ", pid, " of rank ", r));
    peers_.push_back(peer);
  }
  return OkStatus();
}

Status SharedSegment::CheckPeers() {
  for (size_t r = 0; r < peers_.size(); ++r) {
    pollfd peer = {.fd = peers_[r], .events = POLLIN, .revents = 0};
    if (peers_[r] >= 0 && poll(&peer, 1, 0) > 0) {
      return Unavailable(Str("collective failed: rank ", r, " is gone"));
    }
  }
  return OkStatus();
}

template <typename Done>
Status SharedSegment::Await(const Done& done, Deadline deadline) {
  Header* const shared = header();
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done()) return OkStatus();
    __builtin_ia32_pause();
  }
  while (true) {
    shared->sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = shared->changes.load(std::memory_order_seq_cst);
    const bool ended = done() || shared->aborted.load(std::memory_order_relaxed) != 0;
    if (!ended) {
      const timespec pause = {.tv_sec = 0,
                              .tv_nsec = std::chrono::nanoseconds(kLookAround).count()};
      Futex(&shared->changes, FUTEX_WAIT, seen, &pause);
    }
    shared->sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (done()) return OkStatus();
    if (shared->aborted.load(std::memory_order_relaxed) != 0) {
      return Unavailable("the group was aborted");
    }
    RETURN_IF_ERROR(CheckPeers());
    if (std::chrono::steady_clock::now() >= deadline) {
      return Unavailable("collective failed: a rank did not come before the deadline");
    }
  }
}

Status SharedSegment::AwaitFree(uint64_t round, Deadline deadline) {
  if (round < kSlotsPerRank) return OkStatus();
  const auto done = [&] {
    for (int r = 0; r < world_; ++r) {
      const auto& finished = header()->ranks[r].finished;
      if (finished.load(std::memory_order_acquire) + kSlotsPerRank <= round) return false;
    }
    return true;
  };
  return Await(done, deadline);
}

uint64_t SharedSegment::tag(int rank, uint64_t round) const {
  return header()->ranks[rank].tags[round % kSlotsPerRank].load(std::memory_order_relaxed);
}

void SharedSegment::Post(uint64_t round, uint64_t tag) {
  header()->ranks[rank_].tags[round % kSlotsPerRank].store(tag, std::memory_order_relaxed);
  header()->ranks[rank_].posted.store(round + 1, std::memory_order_release);
  header()->Changed();
}

Status SharedSegment::AwaitPosted(uint64_t round, Deadline deadline) {
  const auto done = [&] {
    for (int r = 0; r < world_; ++r) {
      if (header()->ranks[r].posted.load(std::memory_order_acquire) <= round) return false;
    }
    return true;
  };
  return Await(done, deadline);
}

void SharedSegment::Finish(uint64_t round) {
  header()->ranks[rank_].finished.store(round + 1, std::memory_order_release);
  header()->Changed();
}

void SharedSegment::Abort() {
  header()->aborted.store(1, std::memory_order_relaxed);
  header()->Changed();
}

}  // namespace heddle::comm
