#include "coordinator/store/commit_mark.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <utility>

namespace heddle::store {
namespace {

constexpr off_t kFileBytes = 4096;
constexpr off_t kSlotOffset[2] = {0, 2048};

struct Slot {
  uint64_t seq;
  uint64_t checksum;
};
static_assert(sizeof(Slot) == 16);

// Fixed mixing (SplitMix64): detects torn and zeroed slots, which is all that can happen here.
uint64_t Checksum(uint64_t seq) {
  uint64_t x = seq + 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

CommitMark::CommitMark(int fd, uint64_t seq, int newest_slot)
    : fd_(fd), seq_(seq), newest_slot_(newest_slot) {}

CommitMark::CommitMark(CommitMark&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), seq_(other.seq_), newest_slot_(other.newest_slot_) {}

CommitMark::~CommitMark() {
  if (fd_ >= 0) {
    close(fd_);
  }
}

StatusOr<CommitMark> CommitMark::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) {
    return FromErrno("cannot open commit mark", path);
  }
  CommitMark mark(fd, 0, 1);
  // Blocks are allocated now, so that a full disk cannot stop a later overwrite.
  if (const int error = posix_fallocate(fd, 0, kFileBytes); error != 0) {
    return FromErrno("cannot allocate commit mark", path, error);
  }
  for (int i = 0; i < 2; ++i) {
    Slot slot;
    if (pread(fd, &slot, sizeof(slot), kSlotOffset[i]) != sizeof(slot)) {
      return FromErrno("cannot read commit mark", path);
    }
    if (slot.checksum == Checksum(slot.seq) && slot.seq >= mark.seq_) {
      mark.seq_ = slot.seq;
      mark.newest_slot_ = i;
    }
  }
  return mark;
}

Status CommitMark::Write(uint64_t seq) {
  HEDDLE_CHECK(seq >= seq_, "commit mark falls from ", seq_, " to ", seq);
  const Slot slot{seq, Checksum(seq)};
  const int older = 1 - newest_slot_;
  if (pwrite(fd_, &slot, sizeof(slot), kSlotOffset[older]) != sizeof(slot)) {
    return FromErrno("cannot write commit mark");
  }
  seq_ = seq;
  newest_slot_ = older;
  return OkStatus();
}

}  // namespace heddle::store
