// What ranks printed, as workers ship it: one file per (job, attempt, rank), appended by offset so
// that a repeat changes nothing and a gap is refused (control-plane section 12, O4).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::rpc {

struct LogFile {
  uint32_t attempt = 0;
  uint32_t rank = 0;
  std::string path;
  uint64_t bytes = 0;
  uint64_t dropped = 0;  // what the rank printed after them, beyond the job's limit
  uint64_t lost = 0;     // what the worker lost of the rank, anywhere

  uint64_t missing() const { return dropped + lost; }
};

// Thread-safe; blocking file work of one chunk.
class LogFiles {
 public:
  // `root` is made when the first chunk comes. A job's files together hold at most `job_bytes_max`;
  // what comes after is counted as written and dropped; a file rank-R.dropped keeps the count, and
  // rank-R.lost what workers tell of their own losses.
  explicit LogFiles(std::string root, uint64_t job_bytes_max = uint64_t{256} << 20);

  // Writes the part of `chunk` that lies beyond the file's end and returns the file's new length:
  // the next offset. A chunk that starts beyond the end writes nothing.
  StatusOr<uint64_t> Append(const v1::LogChunk& chunk);

  // Files of a job by (attempt, rank); empty if there are none.
  std::vector<LogFile> List(JobId job) const;
  // Those that are not whole; `bytes` is not read.
  std::vector<LogFile> Losses(JobId job) const;

  // Every file of a job.
  Status Remove(JobId job);

  // Up to `limit` bytes from `offset`.
  static StatusOr<std::string> Read(const std::string& path, uint64_t offset, size_t limit);

 private:
  std::string JobFolder(JobId job) const;
  // Appends what `chunk` has beyond `end`, the file's length, as far as the job's limit allows.
  // Returns how many bytes. REQUIRES: mutex_ is held.
  StatusOr<uint64_t> Write(int fd, const v1::LogChunk& chunk, uint64_t end);

  const std::string root_;
  const uint64_t job_bytes_max_;
  std::mutex mutex_;
  std::map<uint64_t, uint64_t> job_bytes_;  // guarded by mutex_
};

}  // namespace heddle::rpc
