// The coordinator's state folder: who owns it, and how much room is left (control-plane D8).
//
//   STATE/lock      flock + pid of the owner     STATE/db       RocksDB
//   STATE/mark      commit mark                  STATE/ballast  64 MiB given up at disk full
//   STATE/logs      ranks' output                STATE/checkpoints  default checkpoint root
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"

namespace heddle::store {

// Exclusive ownership of a state folder, held by the process (dies with it, however it dies).
class StateLock {
 public:
  // Creates `dir` (0700) if needed. FAILED_PRECONDITION names the pid of the present owner.
  static StatusOr<StateLock> Acquire(const std::string& dir);
  StateLock(StateLock&& other) noexcept;
  StateLock& operator=(StateLock&&) = delete;
  ~StateLock();

 private:
  explicit StateLock(int fd) : fd_(fd) {}
  int fd_;
};

// Makes `dir` and its missing parents, mode 0700. OK if it exists as a folder.
Status MakeFolders(const std::string& dir);

struct DiskLimits {
  uint64_t ballast_bytes = 64ULL << 20;
  // READ_ONLY below max(read_only_bytes, read_only_fraction of the file system).
  uint64_t read_only_bytes = 2ULL << 30;
  double read_only_fraction = 0.05;
  // A poisoned store is reopened once this much is free.
  uint64_t reopen_bytes = 256ULL << 20;
};

struct DiskSpace {
  uint64_t free_bytes = 0;
  uint64_t total_bytes = 0;
};

// Room left for us on the file system of `path`.
StatusOr<DiskSpace> FreeSpace(const std::string& path);

bool IsReadOnly(const DiskSpace& space, const DiskLimits& limits);

// Writes the ballast file (real blocks) if it is missing and room for twice its size is left;
// otherwise does nothing. Errors leave no partial file.
Status RestoreBallast(const std::string& dir, const DiskLimits& limits);
// Gives the ballast's blocks back to the file system. OK if there is none.
Status DropBallast(const std::string& dir);

}  // namespace heddle::store
