#include "worker/shim/process_tree.h"

#include <dirent.h>

#include <charconv>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "worker/control/task_files.h"

namespace heddle::shim {
namespace {

// Field 4 of /proc/PID/stat, -1 if the process is gone.
pid_t ParentOf(pid_t pid) {
  std::string stat;
  if (!control::ReadWholeFile("/proc/" + std::to_string(pid) + "/stat", &stat)) return -1;
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos || name_end + 4 >= stat.size()) return -1;
  pid_t parent = -1;
  std::from_chars(stat.data() + name_end + 4, stat.data() + stat.size(), parent);
  return parent;
}

}  // namespace

std::vector<pid_t> Descendants(pid_t root) {
  std::multimap<pid_t, pid_t> children;
  DIR* proc = opendir("/proc");
  if (proc == nullptr) return {};
  while (const dirent* entry = readdir(proc)) {
    pid_t pid = 0;
    std::from_chars(entry->d_name, entry->d_name + std::strlen(entry->d_name), pid);
    if (pid > 0) children.emplace(ParentOf(pid), pid);
  }
  closedir(proc);
  std::vector<pid_t> found;
  std::set<pid_t> seen = {root};
  std::vector<pid_t> open = {root};
  while (!open.empty()) {
    const pid_t parent = open.back();
    open.pop_back();
    const auto [first, last] = children.equal_range(parent);
    for (auto it = first; it != last; ++it) {
      if (!seen.insert(it->second).second) continue;
      found.push_back(it->second);
      open.push_back(it->second);
    }
  }
  return found;
}

}  // namespace heddle::shim
