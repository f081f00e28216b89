#include "worker/offload/spill_dir.h"

#include <fcntl.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "base/units/units.h"

namespace heddle::offload {
namespace {

constexpr std::string_view kSettingName = "memory.expert_offloading.spill_dir";

Status Refused(const std::string& dir, int error) {
  const Status cause = FromErrno("opening a spill file in", dir, error);
  const std::string head = Str(kSettingName, ": ", Message(cause), ": ");
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return InvalidArgument(head + "create the folder on this machine, or name another");
    case EROFS:
    case EACCES:
    case EPERM:
      return FailedPrecondition(head + "name a folder that this user can write");
    default:
      return Annotate(cause, std::string(kSettingName));
  }
}

int OpenNamed(const std::string& dir, int flags) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    const std::string path = Str(dir, "/heddle-spill-", getpid(), "-", attempt);
    const int fd = open(path.c_str(), flags | O_CREAT | O_EXCL, 0600);
    if (fd >= 0) {
      unlink(path.c_str());
      return fd;
    }
    if (errno != EEXIST) return -1;
  }
  return -1;
}

int OpenNameless(const std::string& dir, int flags) {
  const int fd = open(dir.c_str(), flags | O_TMPFILE, 0600);
  // EISDIR: a kernel or file system that does not know the flag.
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) return fd;
  return OpenNamed(dir, flags);
}

StatusOr<SpillFd> Open(const std::string& dir, int (*open_file)(const std::string&, int)) {
  constexpr int kFlags = O_RDWR | O_CLOEXEC;
  SpillFd direct(open_file(dir, kFlags | O_DIRECT));
  if (direct.value >= 0) {
    direct.direct = true;
    return direct;
  }
  // EINVAL is how a file system says that it has no O_DIRECT.
  if (errno != EINVAL) return Refused(dir, errno);
  SpillFd buffered(open_file(dir, kFlags));
  if (buffered.value < 0) return Refused(dir, errno);
  return buffered;
}

// The name of a file system that is memory, by its magic number; empty: it is none.
std::string_view MemoryFileSystem(int64_t magic) {
  switch (static_cast<uint32_t>(magic)) {
    case 0x01021994:
      return "tmpfs";
    case 0x858458f6:
      return "ramfs";
    default:
      return {};
  }
}

Status DoesNotFit(const std::string& dir, int64_t bytes) {
  struct statvfs disk = {};
  std::string free = "an unknown number of";
  if (statvfs(dir.c_str(), &disk) == 0) {
    free = Str(static_cast<int64_t>(disk.f_bavail * disk.f_frsize));
  }
  // With its errno, so that a full disk is not taken for a lack of memory.
  return FromErrno(
      Str(kSettingName, ": ", dir, ": the experts of this rank need ", bytes, " bytes, ", free,
          " bytes are free: free some, name a folder of a larger disk, or use more "
          "ranks"),
      {}, ENOSPC);
}

}  // namespace

SpillFd::~SpillFd() {
  if (value >= 0) close(value);
}

SpillFd& SpillFd::operator=(SpillFd&& other) noexcept {
  std::swap(value, other.value);
  direct = other.direct;
  return *this;
}

StatusOr<SpillFd> OpenSpillFile(const std::string& dir) { return Open(dir, OpenNameless); }

StatusOr<SpillFd> OpenNamedSpillFile(const std::string& dir) { return Open(dir, OpenNamed); }

Status CheckOnDisk(const std::string& dir) {
  struct statfs system = {};
  if (statfs(dir.c_str(), &system) != 0) return Refused(dir, errno);
  const std::string_view name = MemoryFileSystem(static_cast<int64_t>(system.f_type));
  if (name.empty()) return OkStatus();
  return InvalidArgument(Str(kSettingName, ": ", dir, " lies in memory (", name,
                             "), which is what spilling is to save: name a folder on a disk, or "
                             "leave spill_dir out"));
}

Status CheckFreeBytes(const std::string& dir, int64_t bytes) {
  struct statvfs disk = {};
  if (statvfs(dir.c_str(), &disk) != 0) return Refused(dir, errno);
  // Some network file systems know no sizes.
  if (disk.f_blocks == 0) return OkStatus();
  const uint64_t free = uint64_t{disk.f_bavail} * disk.f_frsize;
  return free < static_cast<uint64_t>(bytes) ? DoesNotFit(dir, bytes) : OkStatus();
}

StatusOr<bool> AllocateSpillFile(const SpillFd& file, const std::string& dir, int64_t bytes) {
  int result = -1;
  do {
    result = fallocate(file.value, 0, 0, bytes);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return true;
  if (errno == ENOSPC || errno == EDQUOT) return DoesNotFit(dir, bytes);
  if (errno != EOPNOTSUPP && errno != ENOSYS) {
    return Annotate(FromErrno(Str("allocating ", bytes, " bytes in"), dir),
                    std::string(kSettingName));
  }
  if (ftruncate(file.value, bytes) != 0) {
    return Annotate(FromErrno(Str("a file of ", bytes, " bytes in"), dir),
                    std::string(kSettingName));
  }
  return false;
}

std::string_view FileSystemNote(int64_t magic) {
  switch (static_cast<uint32_t>(magic)) {
    case 0x6969:      // NFS
    case 0xff534d42:  // CIFS
    case 0xfe534d42:  // SMB2
    case 0x517b:      // SMB
    case 0x00c36400:  // Ceph
    case 0x0bd00bd0:  // Lustre
    case 0x47504653:  // GPFS
    case 0x19830326:  // BeeGFS
    case 0x5346414f:  // AFS
    case 0x01021997:  // 9p
      return "a network file system: a disk of this machine is faster";
    case 0x65735546:
      return "FUSE, perhaps a network: a disk of this machine is faster";
    default:
      return {};
  }
}

std::string FileSystemNote(const std::string& dir) {
  struct statfs system = {};
  if (statfs(dir.c_str(), &system) != 0) return {};
  return std::string(FileSystemNote(static_cast<int64_t>(system.f_type)));
}

}  // namespace heddle::offload
