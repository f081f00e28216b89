#include "checkpoint/tensor_io/snapshot_file.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdlib>

#include "base/status/errno_of.h"

namespace heddle::checkpoint {

SnapshotFile::~SnapshotFile() {
  if (fd_ >= 0) close(fd_);
}

Status SnapshotFile::Open(const std::string& dir) {
  if (fd_ >= 0) return OkStatus();
  dir_ = dir;
  fd_ = open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd_ < 0) {  // a file system without such files
    std::string name = dir + "/snapshot-XXXXXX";
    fd_ = mkostemp(name.data(), O_CLOEXEC);
    if (fd_ >= 0) unlink(name.c_str());
  }
  if (fd_ < 0) return FromErrno("open a file for a snapshot in", dir);
  return OkStatus();
}

void SnapshotFile::Clear() {
  // Room that is not given back is only missed by others.
  if (fd_ >= 0 && ftruncate(fd_, 0) != 0) size_ = 0;
  size_ = 0;
}

StatusOr<SnapshotFile::Extent> SnapshotFile::Append(std::span<const char> bytes) {
  const uint64_t begin = size_;
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t written =
        pwrite(fd_, bytes.data() + done, bytes.size() - done, static_cast<off_t>(begin + done));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      return FromErrno("write a snapshot in", dir_);
    }
    done += static_cast<size_t>(written);
  }
  size_ += bytes.size();
  return Extent{begin, bytes.size(), XXH3_64bits(bytes.data(), bytes.size())};
}

Status SnapshotFile::Read(const Extent& extent, std::span<char> to) const {
  HEDDLE_CHECK(to.size() == extent.bytes);
  for (size_t done = 0; done < to.size();) {
    const ssize_t got =
        pread(fd_, to.data() + done, to.size() - done, static_cast<off_t>(extent.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FromErrno("read a snapshot in", dir_);
    if (got == 0) {
      return DataLoss(Str("a snapshot in ", dir_, " ends before ", extent.offset + to.size()));
    }
    done += static_cast<size_t>(got);
  }
  if (XXH3_64bits(to.data(), to.size()) == extent.checksum) return OkStatus();
  return DataLoss(Str("a snapshot in ", dir_, ": other bytes came back than were written, ",
                      extent.bytes, " at ", extent.offset, ": the disk or its cable is bad"));
}

}  // namespace heddle::checkpoint
