// How fast a folder's disk is written and read, past the page cache.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"

namespace heddle::tool {

struct DiskBench {
  bool direct = false;  // O_DIRECT was possible
  double read_bytes = 0;
  double write_bytes = 0;  // synced
};

// Writes and reads a file of about `file_bytes` in `dir`, or as much of it as two seconds allow,
// and removes it. NOT_FOUND: no such folder; else the file system's error. Blocks.
StatusOr<DiskBench> MeasureDisk(const std::string& dir, int64_t file_bytes);

}  // namespace heddle::tool
