// The folder of the spill files: is it there, on a disk, writable, large enough, and what kind of
// file system is it. Everything that can be refused is refused here, before the first step.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status/status.h"

namespace heddle::offload {

// A file without a name: whatever ends the process frees its blocks.
struct SpillFd {
  SpillFd() = default;
  explicit SpillFd(int fd) : value(fd) {}
  ~SpillFd();
  SpillFd(SpillFd&& other) noexcept : value(other.value), direct(other.direct) { other.value = -1; }
  SpillFd& operator=(SpillFd&& other) noexcept;

  int value = -1;
  bool direct = false;  // O_DIRECT: past the page cache
};

// Opens such a file in `dir` for reading and writing. INVALID_ARGUMENT: no such folder;
// FAILED_PRECONDITION: it cannot be written; others by errno.
StatusOr<SpillFd> OpenSpillFile(const std::string& dir);
// The same where the file system cannot make a file without a name (O_TMPFILE): it has one for as
// long as it takes to remove it.
StatusOr<SpillFd> OpenNamedSpillFile(const std::string& dir);

// INVALID_ARGUMENT if `dir` lies in memory (tmpfs, ramfs): spilling there frees none. What is under
// an overlay cannot be seen.
Status CheckOnDisk(const std::string& dir);

// RESOURCE_EXHAUSTED with the bytes needed and free if `bytes` do not fit.
Status CheckFreeBytes(const std::string& dir, int64_t bytes);

// Allocates the file's blocks, so that the disk cannot be full later (file systems that copy on
// write may still say so). True: allocated; false: this file system cannot, only the length is set.
// RESOURCE_EXHAUSTED: as above.
StatusOr<bool> AllocateSpillFile(const SpillFd& file, const std::string& dir, int64_t bytes);

// What to know about the file system of `dir`, or nothing: a network.
std::string FileSystemNote(const std::string& dir);
// The same for a magic number of statfs.
std::string_view FileSystemNote(int64_t magic);

}  // namespace heddle::offload
