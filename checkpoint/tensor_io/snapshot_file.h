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
  // Bytes that were appended together, with their XXH3-64.
  struct Extent {
    uint64_t offset = 0;
    uint64_t bytes = 0;
    uint64_t checksum = 0;
  };
  // REQUIRES: Open. RESOURCE_EXHAUSTED: the disk is full.
  StatusOr<Extent> Append(std::span<const char> bytes);
  // DATA_LOSS, naming folder and place, if other bytes come back than were appended: nothing that a
  // bad disk made of them gets into a checkpoint. REQUIRES: to.size() = extent.bytes.
  Status Read(const Extent& extent, std::span<char> to) const;

 private:
  int fd_ = -1;
  std::string dir_;
  uint64_t size_ = 0;
};

}  // namespace heddle::checkpoint
