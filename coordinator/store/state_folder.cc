#include "coordinator/store/state_folder.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace heddle::store {
namespace {

// A coordinator that was killed a moment ago holds the lock until the kernel has taken it apart.
constexpr int kLockWaitMs = 2000;
constexpr int kLockPollMs = 20;

std::string BallastPath(const std::string& dir) { return dir + "/ballast"; }

std::string OwnerOf(int fd) {
  char text[32] = {};
  const ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
  std::string pid(text, n > 0 ? static_cast<size_t>(n) : 0);
  pid.erase(std::find(pid.begin(), pid.end(), '\n'), pid.end());
  return pid.empty() ? "unknown" : pid;
}

}  // namespace

Status MakeFolders(const std::string& dir) {
  for (size_t slash = dir.find('/', 1);; slash = dir.find('/', slash + 1)) {
    const std::string part = dir.substr(0, slash);
    if (mkdir(part.c_str(), 0700) != 0 && errno != EEXIST) {
      return FromErrno("cannot make folder", part);
    }
    if (slash == std::string::npos) {
      break;
    }
  }
  struct stat info;
  if (stat(dir.c_str(), &info) != 0) {
    return FromErrno("cannot use folder", dir);
  }
  if (!S_ISDIR(info.st_mode)) {
    return FailedPrecondition(Str(dir, " is not a folder"));
  }
  return OkStatus();
}

StateLock::StateLock(StateLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

StateLock::~StateLock() {
  if (fd_ >= 0) {
    close(fd_);
  }
}

StatusOr<StateLock> StateLock::Acquire(const std::string& dir) {
  RETURN_IF_ERROR(MakeFolders(dir));
  const std::string path = dir + "/lock";
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) {
    return FromErrno("cannot open", path);
  }
  StateLock lock(fd);
  for (int waited_ms = 0; flock(fd, LOCK_EX | LOCK_NB) != 0; waited_ms += kLockPollMs) {
    if (errno != EWOULDBLOCK) {
      return FromErrno("cannot lock", path);
    }
    if (waited_ms >= kLockWaitMs) {
      return FailedPrecondition(
          Str("state folder ", dir, " is in use by the coordinator with pid ", OwnerOf(fd)));
    }
    poll(nullptr, 0, kLockPollMs);
  }
  // The pid is for people; the lock itself is the kernel's. A full disk must not stop a start.
  const std::string pid = Str(getpid(), "\n");
  if (ftruncate(fd, 0) != 0 ||
      pwrite(fd, pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return lock;
  }
  return lock;
}

StatusOr<DiskSpace> FreeSpace(const std::string& path) {
  struct statvfs info;
  if (statvfs(path.c_str(), &info) != 0) {
    return FromErrno("cannot read free space of", path);
  }
  return DiskSpace{.free_bytes = static_cast<uint64_t>(info.f_bavail) * info.f_frsize,
                   .total_bytes = static_cast<uint64_t>(info.f_blocks) * info.f_frsize};
}

bool IsReadOnly(const DiskSpace& space, const DiskLimits& limits) {
  const double fraction = limits.read_only_fraction * static_cast<double>(space.total_bytes);
  return space.free_bytes < std::max(limits.read_only_bytes, static_cast<uint64_t>(fraction));
}

Status RestoreBallast(const std::string& dir, const DiskLimits& limits) {
  const std::string path = BallastPath(dir);
  struct stat info;
  if (limits.ballast_bytes == 0 || stat(path.c_str(), &info) == 0) {
    return OkStatus();
  }
  ASSIGN_OR_RETURN(const DiskSpace space, FreeSpace(dir));
  if (space.free_bytes < 2 * limits.ballast_bytes) {
    return OkStatus();
  }
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) {
    return FromErrno("cannot make", path);
  }
  const int error = posix_fallocate(fd, 0, static_cast<off_t>(limits.ballast_bytes));
  close(fd);
  if (error != 0) {
    unlink(path.c_str());
    return FromErrno("cannot allocate", path, error);
  }
  return OkStatus();
}

Status DropBallast(const std::string& dir) {
  const std::string path = BallastPath(dir);
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return FromErrno("cannot remove", path);
  }
  return OkStatus();
}

}  // namespace heddle::store
