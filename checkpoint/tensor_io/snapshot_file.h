// A nameless file that holds a copy for as long as it is being saved: nothing of it stays after a
// kill. One thread writes, then another may read.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/status/status.h"

namespace heddle::checkpoint {

class SnapshotFile {
 public:
  SnapshotFile() = default;
  ~SnapshotFile();
  SnapshotFile(const SnapshotFile&) = delete;
  SnapshotFile& operator=(const SnapshotFile&) = delete;

  // Makes the file, the first time. Errors by errno, naming `dir`.
  Status Open(const std::string& dir);
  // Empties it.
  void Clear();
  // Returns where the bytes begin. REQUIRES: Open. RESOURCE_EXHAUSTED: the disk is full.
  StatusOr<uint64_t> Append(std::span<const char> bytes);
  // DATA_LOSS if the file ends before.
  Status Read(uint64_t offset, std::span<char> to) const;

 private:
  int fd_ = -1;
  std::string dir_;
  uint64_t size_ = 0;
};

}  // namespace heddle::checkpoint
