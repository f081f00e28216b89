// Whole files: read, and write so that a reader sees the old file, none, or the whole new one
// (formats.md F3).
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "base/status/status.h"

namespace heddle::pack {

// NOT_FOUND, or the error of the read, with the path.
StatusOr<std::string> ReadFile(const std::string& path);

// Writes `path`.tmp, fsyncs it, renames it to `path` and fsyncs the folder. On error the temporary
// file is removed and `path` is as before. RESOURCE_EXHAUSTED on a full disk.
Status WriteFileAtomically(const std::string& path, std::string_view bytes);

// An exclusive lock on a folder for as long as the object lives. Released by the kernel if the
// process dies.
class FolderLock {
 public:
  // UNAVAILABLE when another process holds it.
  static StatusOr<std::unique_ptr<FolderLock>> Take(const std::string& dir);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  explicit FolderLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace heddle::pack
