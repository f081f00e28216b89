#include "worker/shim/cgroup.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>

namespace heddle::shim {
namespace {

bool WriteText(const std::string& path, const std::string& text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool ok = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  const int error = errno;
  close(fd);
  errno = error;
  return ok;
}

// The number after `key` and a blank at the start of a line, 0 if absent.
uint64_t NumberAfter(const std::string& text, const std::string& key) {
  size_t at = 0;
  while (at < text.size()) {
    if (text.compare(at, key.size() + 1, key + " ") == 0) {
      uint64_t value = 0;
      std::from_chars(text.data() + at + key.size() + 1, text.data() + text.size(), value);
      return value;
    }
    const size_t end = text.find('\n', at);
    if (end == std::string::npos) break;
    at = end + 1;
  }
  return 0;
}

}  // namespace

void KillProcesses(const std::string& folder) {
  std::string text;
  if (!control::ReadWholeFile(folder + "/cgroup.procs", &text)) return;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at < end) {
    int pid = 0;
    const std::from_chars_result parsed = std::from_chars(at, end, pid);
    if (parsed.ec == std::errc() && pid > 1) kill(pid, SIGKILL);
    at = parsed.ptr + 1;
  }
}

Cgroup::Cgroup(const control::LaunchFile& launch) {
  // Fences of two clusters on one host are alike; shims that live are not.
  const std::string name = "heddle-" + std::to_string(launch.fence) + "-" +
                           std::to_string(launch.task) + "-" + std::to_string(getpid());
  v2_ = Make(launch.cgroup_v2, name);
  memory_ = Make(launch.cgroup_v1_memory, name);
  freezer_ = Make(launch.cgroup_v1_freezer, name);
  if (launch.memory_bytes == 0) return;
  const std::string limit = std::to_string(launch.memory_bytes);
  const bool limited = (!memory_.empty() && WriteText(memory_ + "/memory.limit_in_bytes", limit)) ||
                       (!v2_.empty() && WriteText(v2_ + "/memory.max", limit));
  if (!limited) notes_ += "no memory limit: no cgroup with a memory controller; ";
}

std::string Cgroup::Make(const std::string& parent, const std::string& name) {
  if (parent.empty()) return "";
  const std::string folder = parent + "/" + name;
  if (mkdir(folder.c_str(), 0755) != 0 && errno != EEXIST) {
    notes_ += "cgroup " + folder + ": " + strerror(errno) + "; ";
    return "";
  }
  join_files_.push_back(folder + "/cgroup.procs");
  return folder;
}

std::string Cgroup::folder() const {
  if (!v2_.empty()) return v2_;
  return freezer_.empty() ? memory_ : freezer_;
}

void Cgroup::Kill() {
  if (!v2_.empty() && WriteText(v2_ + "/cgroup.kill", "1")) return;
  if (!freezer_.empty()) {
    WriteText(freezer_ + "/freezer.state", "FROZEN");
    KillProcesses(freezer_);
    WriteText(freezer_ + "/freezer.state", "THAWED");
    return;
  }
  if (!folder().empty()) KillProcesses(folder());
}

uint64_t Cgroup::OomKills() const {
  std::string text;
  uint64_t kills = 0;
  if (!memory_.empty() && control::ReadWholeFile(memory_ + "/memory.oom_control", &text)) {
    kills += NumberAfter(text, "oom_kill");
  }
  if (!v2_.empty() && control::ReadWholeFile(v2_ + "/memory.events", &text)) {
    kills += NumberAfter(text, "oom_kill");
  }
  return kills;
}

bool Cgroup::Remove() {
  bool gone = true;
  for (std::string* folder : {&v2_, &memory_, &freezer_}) {
    if (folder->empty()) continue;
    if (rmdir(folder->c_str()) == 0 || errno == ENOENT) {
      folder->clear();
    } else {
      gone = false;
    }
  }
  return gone;
}

}  // namespace heddle::shim
