// A disk that gives back other bytes than it was given: the nameless files that a process keeps in
// a folder change behind its back.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

namespace heddle {

// Turns one bit of every page of every such file over, past the process. All of them are opened
// before the first bit: a process may end as soon as it reads one. Returns the number of files.
inline int FlipBits(const std::string& folder, int pid = getpid()) {
  std::vector<int> files;
  const std::string open_files = "/proc/" + std::to_string(pid) + "/fd";
  for (const auto& entry : std::filesystem::directory_iterator(open_files)) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (gone || target.rfind(folder, 0) != 0) continue;
    const int fd = open(entry.path().c_str(), O_RDWR | O_CLOEXEC);
    if (fd >= 0) files.push_back(fd);
  }
  int flipped = 0;
  for (const int fd : files) {
    bool whole = true;
    const off_t size = lseek(fd, 0, SEEK_END);
    for (off_t at = 0; at < size; at += 4096) {
      char byte = 0;
      whole = whole && pread(fd, &byte, 1, at) == 1;
      byte = static_cast<char>(byte ^ 4);
      whole = whole && pwrite(fd, &byte, 1, at) == 1;
    }
    fsync(fd);
    close(fd);
    if (whole) ++flipped;
  }
  return flipped;
}

}  // namespace heddle
