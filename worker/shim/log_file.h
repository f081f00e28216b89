// Drains a rank's stdout and stderr into logs/rank-<r>.log. The pipe is always read, so a full disk
// or a full quota never blocks a rank: bytes are dropped and counted (X8), and the
// log's last line says how many.
#pragma once

#include <cstdint>
#include <string>

namespace heddle::shim {

class LogFile {
 public:
  // Takes `pipe_fd` (non-blocking). `bytes_max` 0: no quota; else more than kLossLineBytes.
  LogFile(const std::string& path, int pipe_fd, uint64_t bytes_max);
  ~LogFile();
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;

  // -1 after the end of file.
  int pipe_fd() const { return pipe_fd_; }
  uint64_t dropped() const { return dropped_; }
  // Reads what is there, at most 1 MiB.
  void Drain();
  // The line about lost bytes, once nobody writes to the pipe any more; repeats do nothing.
  void End();

  // Room in the quota for that line.
  static constexpr uint64_t kLossLineBytes = 128;

 private:
  void Write(const char* data, uint64_t size);

  int pipe_fd_;
  int file_fd_;
  uint64_t bytes_max_;
  uint64_t written_ = 0;
  uint64_t dropped_ = 0;
  bool ended_ = false;
};

}  // namespace heddle::shim
