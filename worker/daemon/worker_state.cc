#include "worker/daemon/worker_state.h"

#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <map>

#include "base/ids/ids.h"
#include "base/log/log.h"
#include "base/status/errno_of.h"
#include "worker/control/rank_page.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

uint64_t Fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : text) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return hash;
}

std::string FirstLine(const std::string& path) {
  std::string text;
  if (!control::ReadWholeFile(path, &text)) return "";
  return text.substr(0, text.find('\n'));
}

// What tells this machine from another one that got a copy of the folder.
std::string MachineId() {
  for (const char* path : {"/etc/machine-id", "/var/lib/dbus/machine-id"}) {
    std::string id = FirstLine(path);
    if (!id.empty()) return id;
  }
  char host[256] = {};
  gethostname(host, sizeof(host) - 1);
  return Str("host:", host);
}

// Lines "key value".
std::map<std::string, std::string> ReadPairs(const std::string& path) {
  std::map<std::string, std::string> pairs;
  std::string text;
  if (!control::ReadWholeFile(path, &text)) return pairs;
  size_t start = 0;
  while (start < text.size()) {
    size_t end = text.find('\n', start);
    if (end == std::string::npos) end = text.size();
    const std::string line = text.substr(start, end - start);
    const size_t space = line.find(' ');
    if (space != std::string::npos) pairs[line.substr(0, space)] = line.substr(space + 1);
    start = end + 1;
  }
  return pairs;
}

StatusOr<std::string> NewWorkerId() {
  uint64_t value = 0;
  if (getrandom(&value, sizeof(value), 0) != sizeof(value)) return FromErrno("getrandom");
  return ToText(NodeId{value});
}

Status WriteDurably(const std::string& path, const std::string& text) {
  if (!control::WriteFileDurably(path, text)) return FromErrno("write", path);
  return OkStatus();
}

// In its place, which needs no room on the disk; for a text of the length of the former one, short
// enough to lie in one sector.
Status OverwriteDurably(const std::string& path, const std::string& text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return FromErrno("open", path);
  struct stat info = {};
  const bool fits = fstat(fd, &info) == 0 && static_cast<size_t>(info.st_size) == text.size();
  const bool written =
      fits && pwrite(fd, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()) &&
      fsync(fd) == 0;
  Status status = written ? OkStatus() : FromErrno("write", path, fits ? errno : ENOSPC);
  close(fd);
  return status;
}

// Of one length for all values, so that a file may be overwritten in its place.
std::string Padded(uint64_t value) {
  char text[32];
  snprintf(text, sizeof(text), "%020llu", static_cast<unsigned long long>(value));
  return text;
}

uint64_t Number(const std::string& text) {
  uint64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

bool IsDiskFull(const Status& status) {
  const int error = ErrnoOf(status);
  return error == ENOSPC || error == EDQUOT;
}

}  // namespace

std::string CurrentInstance() {
  char name[64] = {};
  if (readlink("/proc/self/ns/pid", name, sizeof(name) - 1) < 0) name[0] = '\0';
  return EncodeBase32(Fnv1a(Str(FirstLine("/proc/sys/kernel/random/boot_id"), "|", name, "|",
                                control::ProcessStartTicks(1))));
}

StatusOr<std::unique_ptr<WorkerState>> WorkerState::Open(const std::string& dir) {
  std::unique_ptr<WorkerState> state(new WorkerState());
  if (mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) return FromErrno("make folder", dir);
  char real[PATH_MAX];
  if (realpath(dir.c_str(), real) == nullptr) return FromErrno("resolve", dir);
  state->dir_ = real;
  const std::string lock = state->dir_ + "/lock";
  state->lock_fd_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (state->lock_fd_ < 0) return FromErrno("open", lock);
  if (flock(state->lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    return FailedPrecondition(Str("another heddle-worker already uses ", state->dir_));
  }
  const std::string tasks = state->tasks_dir();
  if (mkdir(tasks.c_str(), 0700) != 0 && errno != EEXIST) return FromErrno("make folder", tasks);
  RETURN_IF_ERROR(state->Load());
  return state;
}

WorkerState::~WorkerState() {
  if (lock_fd_ >= 0) close(lock_fd_);
}

Status WorkerState::Load() {
  instance_ = CurrentInstance();
  const std::string path = dir_ + "/worker";
  const std::string bound_to = Str(MachineId(), " ", dir_);
  std::map<std::string, std::string> pairs = ReadPairs(path);
  if (pairs["id"].empty() || pairs["bound_to"] != bound_to) {
    // A new folder, or a clone of another worker's: a clone must not speak for the original.
    ASSIGN_OR_RETURN(worker_id_, NewWorkerId());
    RETURN_IF_ERROR(WriteDurably(path, Str("id ", worker_id_, "\nbound_to ", bound_to, "\n")));
    CountBoot();
    return OkStatus();
  }
  worker_id_ = pairs["id"];
  std::map<std::string, std::string> seen = ReadPairs(dir_ + "/coordinator");
  cluster_id_ = seen["cluster"];
  highest_term_ = Number(seen["term"]);
  CountBoot();
  return OkStatus();
}

void WorkerState::CountBoot() {
  const std::string path = dir_ + "/boot";
  std::map<std::string, std::string> last = ReadPairs(path);
  boot_ = Number(last["boot"]);
  if (last["instance"] == instance_) return;
  const std::string text = Str("boot ", Padded(boot_ + 1), "\ninstance ", instance_, "\n");
  Status written = WriteDurably(path, text);
  if (IsDiskFull(written)) written = OverwriteDurably(path, text);
  if (written.ok()) {
    ++boot_;
  } else {
    HEDDLE_WARN("the restart of this machine is not counted", {"why", Message(written)});
  }
}

uint64_t WorkerState::NewSession() {
  last_session_ = std::max(last_session_ + 1, static_cast<uint64_t>(control::BootTimeNs() / 1000));
  return last_session_;
}

Status WorkerState::Accept(const std::string& cluster_id, uint64_t term) {
  if (!cluster_id_.empty() && cluster_id != cluster_id_) {
    return FailedPrecondition(Str("this worker belongs to cluster ", cluster_id_,
                                  ", the coordinator to ", cluster_id, "; use another --state"));
  }
  if (term < highest_term_) {
    return Aborted(Str("STALE_TERM: the coordinator is at term ", term, ", term ", highest_term_,
                       " was seen"));
  }
  if (term == highest_term_ && cluster_id == cluster_id_) return OkStatus();
  // Of one length for all terms: a worker whose disk is full must not lose a coordinator that
  // starts anew, and with it every task.
  const std::string path = dir_ + "/coordinator";
  const std::string text = Str("cluster ", cluster_id, "\nterm ", Padded(term), "\n");
  Status written = WriteDurably(path, text);
  if (IsDiskFull(written)) written = OverwriteDurably(path, text);
  RETURN_IF_ERROR(written);
  cluster_id_ = cluster_id;
  highest_term_ = term;
  return OkStatus();
}

}  // namespace heddle::worker
