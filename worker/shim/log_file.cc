#include "worker/shim/log_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace heddle::shim {

LogFile::LogFile(const std::string& path, int pipe_fd, uint64_t bytes_max)
    : pipe_fd_(pipe_fd),
      file_fd_(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)),
      bytes_max_(bytes_max == 0 ? 0 : bytes_max - std::min(bytes_max, kLossLineBytes)) {}

LogFile::~LogFile() {
  if (pipe_fd_ >= 0) close(pipe_fd_);
  if (file_fd_ >= 0) close(file_fd_);
}

void LogFile::Drain() {
  char buffer[65536];
  for (int round = 0; round < 16 && pipe_fd_ >= 0; ++round) {
    const ssize_t count = read(pipe_fd_, buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) {
      close(pipe_fd_);
      pipe_fd_ = -1;
      End();
      return;
    }
    Write(buffer, static_cast<uint64_t>(count));
  }
}

void LogFile::End() {
  if (ended_ || dropped_ == 0 || file_fd_ < 0) return;
  ended_ = true;
  const std::string line =
      "\n... " + std::to_string(dropped_) + " bytes dropped: log limit or full disk\n";
  // A disk that is still full loses this line too; the counter in the task's state remains.
  [[maybe_unused]] const ssize_t count = write(file_fd_, line.data(), line.size());
}

void LogFile::Write(const char* data, uint64_t size) {
  if (bytes_max_ != 0 && written_ + size > bytes_max_) {
    const uint64_t room = bytes_max_ - written_;
    dropped_ += size - room;
    size = room;
  }
  while (size > 0) {
    const ssize_t count = file_fd_ < 0 ? -1 : write(file_fd_, data, size);
    if (count < 0 && file_fd_ >= 0 && errno == EINTR) continue;
    if (count <= 0) {
      dropped_ += size;
      return;
    }
    data += count;
    size -= static_cast<uint64_t>(count);
    written_ += static_cast<uint64_t>(count);
  }
}

}  // namespace heddle::shim
