#include "coordinator/rpc/log_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

namespace heddle::rpc {
namespace {

struct Fd {
  ~Fd() {
    if (value >= 0) {
      close(value);
    }
  }
  int value = -1;
};

Status MakeFolder(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return FromErrno("cannot make", path);
  }
  return OkStatus();
}

// Names of `folder` that are PREFIX<number>SUFFIX, with their numbers.
std::vector<std::pair<uint32_t, std::string>> Numbered(const std::string& folder,
                                                       const std::string& prefix,
                                                       const std::string& suffix) {
  std::vector<std::pair<uint32_t, std::string>> found;
  DIR* dir = opendir(folder.c_str());
  for (dirent* entry = dir == nullptr ? nullptr : readdir(dir); entry != nullptr;
       entry = readdir(dir)) {
    const std::string name = entry->d_name;
    if (name.size() <= prefix.size() + suffix.size() || name.rfind(prefix, 0) != 0 ||
        !name.ends_with(suffix)) {
      continue;
    }
    uint32_t number = 0;
    const char* const end = name.data() + name.size() - suffix.size();
    const auto [stop, error] = std::from_chars(name.data() + prefix.size(), end, number);
    if (error == std::errc() && stop == end) {
      found.emplace_back(number, name);
    }
  }
  if (dir != nullptr) {
    closedir(dir);
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Counts lie beside the log, so that a restart neither forgets a loss nor asks workers for the lost
// bytes again. `kind`: "dropped" or "lost".
std::string CountPath(const std::string& log, const char* kind) {
  return Str(log.substr(0, log.size() - std::string("log").size()), kind);
}

uint64_t ReadCount(const std::string& log, const char* kind) {
  uint64_t count = 0;
  std::ifstream(CountPath(log, kind)) >> count;
  return count;
}

// Counts only grow: a shorter text never has to be overwritten.
Status WriteCount(const std::string& log, const char* kind, uint64_t count) {
  const std::string path = CountPath(log, kind);
  Fd file{open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0640)};
  const std::string text = Str(count, "\n");
  if (file.value < 0 ||
      pwrite(file.value, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    return FromErrno("cannot write", path);
  }
  return OkStatus();
}

}  // namespace

LogFiles::LogFiles(std::string root, uint64_t job_bytes_max)
    : root_(std::move(root)), job_bytes_max_(job_bytes_max) {}

std::string LogFiles::JobFolder(JobId job) const { return Str(root_, "/", ToText(job)); }

StatusOr<uint64_t> LogFiles::Append(const v1::LogChunk& chunk) {
  const JobId job{chunk.job()};
  const std::string folder = Str(JobFolder(job), "/", chunk.attempt());
  const std::string path = Str(folder, "/rank-", chunk.rank(), ".log");
  const std::lock_guard<std::mutex> lock(mutex_);
  RETURN_IF_ERROR(MakeFolder(root_));
  RETURN_IF_ERROR(MakeFolder(JobFolder(job)));
  RETURN_IF_ERROR(MakeFolder(folder));
  Fd file{open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0640)};
  struct stat info = {};
  if (file.value < 0 || fstat(file.value, &info) != 0) {
    return FromErrno("cannot open", path);
  }
  if (!job_bytes_.contains(job.value)) {
    uint64_t total = 0;
    for (const LogFile& known : List(job)) {
      total += known.bytes;
    }
    job_bytes_[job.value] = total;
  }
  if (chunk.lost() > 0 && chunk.lost() > ReadCount(path, "lost")) {
    RETURN_IF_ERROR(WriteCount(path, "lost", chunk.lost()));
  }
  const uint64_t dropped = ReadCount(path, "dropped");
  uint64_t end = static_cast<uint64_t>(info.st_size) + dropped;
  const uint64_t chunk_end = chunk.offset() + chunk.data().size();
  if (chunk.offset() > end || chunk_end <= end) {
    return end;
  }
  if (dropped == 0) {
    ASSIGN_OR_RETURN(const uint64_t written, Write(file.value, chunk, end));
    end += written;
  }
  if (end < chunk_end && job_bytes_[job.value] >= job_bytes_max_) {
    RETURN_IF_ERROR(WriteCount(path, "dropped", dropped + chunk_end - end));
    end = chunk_end;
  }
  return end;
}

StatusOr<uint64_t> LogFiles::Write(int fd, const v1::LogChunk& chunk, uint64_t end) {
  uint64_t& total = job_bytes_[chunk.job()];
  const uint64_t skip = end - chunk.offset();
  const uint64_t room = job_bytes_max_ - std::min(total, job_bytes_max_);
  const uint64_t fresh = std::min<uint64_t>(chunk.data().size() - skip, room);
  const ssize_t written = pwrite(fd, chunk.data().data() + skip, fresh, static_cast<off_t>(end));
  if (written < 0) {
    return FromErrno("cannot write", Str("the log of rank ", chunk.rank()));
  }
  total += static_cast<uint64_t>(written);
  return static_cast<uint64_t>(written);
}

std::vector<LogFile> LogFiles::List(JobId job) const {
  std::vector<LogFile> files;
  for (const auto& [attempt, folder] : Numbered(JobFolder(job), "", "")) {
    for (const auto& [rank, name] : Numbered(Str(JobFolder(job), "/", folder), "rank-", ".log")) {
      LogFile file{.attempt = attempt,
                   .rank = rank,
                   .path = Str(JobFolder(job), "/", folder, "/", name),
                   .bytes = 0};
      struct stat info = {};
      if (stat(file.path.c_str(), &info) == 0) {
        file.bytes = static_cast<uint64_t>(info.st_size);
        file.dropped = ReadCount(file.path, "dropped");
        file.lost = ReadCount(file.path, "lost");
      }
      files.push_back(std::move(file));
    }
  }
  return files;
}

std::vector<LogFile> LogFiles::Losses(JobId job) const {
  std::map<std::pair<uint32_t, uint32_t>, LogFile> found;
  for (const auto& [attempt, folder] : Numbered(JobFolder(job), "", "")) {
    const std::string path = Str(JobFolder(job), "/", folder);
    for (const char* suffix : {".dropped", ".lost"}) {
      for (const auto& [rank, name] : Numbered(path, "rank-", suffix)) {
        LogFile& file = found[{attempt, rank}];
        file.attempt = attempt;
        file.rank = rank;
        file.path = Str(path, "/rank-", rank, ".log");
        file.dropped = ReadCount(file.path, "dropped");
        file.lost = ReadCount(file.path, "lost");
      }
    }
  }
  std::vector<LogFile> files;
  for (auto& [key, file] : found) {
    files.push_back(std::move(file));
  }
  return files;
}

Status LogFiles::Remove(JobId job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  job_bytes_.erase(job.value);
  std::error_code error;
  std::filesystem::remove_all(JobFolder(job), error);
  return error ? FromErrno("cannot remove", JobFolder(job), error.value()) : OkStatus();
}

StatusOr<std::string> LogFiles::Read(const std::string& path, uint64_t offset, size_t limit) {
  Fd file{open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.value < 0) {
    return FromErrno("cannot open", path);
  }
  std::string data(limit, '\0');
  const ssize_t got = pread(file.value, data.data(), limit, static_cast<off_t>(offset));
  if (got < 0) {
    return FromErrno("cannot read", path);
  }
  data.resize(static_cast<size_t>(got));
  return data;
}

}  // namespace heddle::rpc
