#include "worker/shim/log_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace heddle::shim {

LogFile::LogFile(const std::string& stem, int pipe_fd, uint64_t bytes_max)
    : loss_path_(stem + ".lost"),
      pipe_fd_(pipe_fd),
      file_fd_(open((stem + ".log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)),
      bytes_max_(bytes_max) {}

LogFile::~LogFile() {
  for (const int fd : {pipe_fd_, file_fd_, loss_fd_}) {
    if (fd >= 0) close(fd);
  }
}

void LogFile::Drain() {
  char buffer[65536];
  for (int round = 0; round < 16 && pipe_fd_ >= 0; ++round) {
    const ssize_t count = read(pipe_fd_, buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) break;
    if (count <= 0) {
      close(pipe_fd_);
      pipe_fd_ = -1;
      break;
    }
    Write(buffer, static_cast<uint64_t>(count));
  }
  if (dropped_ > told_) TellLoss();
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

// What fails here is tried again with the next loss; the counter in the task's state remains.
void LogFile::TellLoss() {
  if (loss_fd_ < 0) loss_fd_ = open(loss_path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (loss_fd_ >= 0 && ftruncate(loss_fd_, static_cast<off_t>(dropped_)) == 0) told_ = dropped_;
}

}  // namespace heddle::shim
