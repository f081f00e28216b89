// Drains a rank's stdout and stderr into logs/rank-<r>.log. The pipe is always read, so a full disk
// or a full quota never blocks a rank: bytes are dropped and counted (X8).
//
// The count is the size of logs/rank-<r>.lost, which appears with the first loss: a file that is
// one hole needs no block of a disk that is full.
#pragma once

#include <cstdint>
#include <string>

namespace heddle::shim {

class LogFile {
 public:
  // `stem`: logs/rank-<r>. Takes `pipe_fd` (non-blocking). `bytes_max` 0: no quota.
  LogFile(const std::string& stem, int pipe_fd, uint64_t bytes_max);
  ~LogFile();
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;

  // -1 after the end of file.
  int pipe_fd() const { return pipe_fd_; }
  uint64_t dropped() const { return dropped_; }
  // Reads what is there, at most 1 MiB.
  void Drain();

 private:
  void Write(const char* data, uint64_t size);
  void TellLoss();

  const std::string loss_path_;
  int pipe_fd_;
  int file_fd_;
  int loss_fd_ = -1;
  uint64_t bytes_max_;
  uint64_t written_ = 0;
  uint64_t dropped_ = 0;
  uint64_t told_ = 0;  // of dropped_
};

}  // namespace heddle::shim
