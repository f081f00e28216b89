// Looking at processes from outside: who carries a task's mark, who is still there.
#pragma once

#include <dirent.h>
#include <signal.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "worker/control/task_files.h"

namespace heddle::test {

// True for a process that exists and is no zombie.
inline bool IsAlive(int pid) {
  std::string stat;
  if (pid <= 0 || !control::ReadWholeFile("/proc/" + std::to_string(pid) + "/stat", &stat)) {
    return false;
  }
  const size_t name_end = stat.rfind(')');
  return name_end != std::string::npos && stat[name_end + 2] != 'Z' && stat[name_end + 2] != 'X';
}

// Every process whose argv or environment contains `mark`, this one excluded.
inline std::vector<int> ProcessesWith(const std::string& mark) {
  std::vector<int> found;
  DIR* proc = opendir("/proc");
  while (const dirent* entry = readdir(proc)) {
    const int pid = std::atoi(entry->d_name);
    if (pid <= 1 || pid == getpid()) continue;
    const std::string folder = "/proc/" + std::to_string(pid);
    std::string text, environment;
    if (!control::ReadWholeFile(folder + "/cmdline", &text) ||
        !control::ReadWholeFile(folder + "/environ", &environment)) {
      continue;
    }
    if ((text + environment).find(mark) != std::string::npos && IsAlive(pid)) found.push_back(pid);
  }
  closedir(proc);
  return found;
}

}  // namespace heddle::test
