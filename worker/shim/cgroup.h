// The cgroups of a task: for killing everything at once, for its memory limit, for knowing that the
// kernel killed for memory. Works with v2, v1 (memory and freezer) and both mounted side by side;
// without any of them every call does nothing and the shim falls back to process groups (X6).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "worker/control/task_files.h"

namespace heddle::shim {

class Cgroup {
 public:
  // Makes heddle-<F>-<task>-<pid of this shim> in each folder the launch file names. What cannot be
  // made is left out; `notes()` says why.
  explicit Cgroup(const control::LaunchFile& launch);

  // Files into which a new rank writes "0" before it execs.
  const std::vector<std::string>& join_files() const { return join_files_; }
  // Folder that tells who is in the task: v2, else freezer, else memory; empty if none.
  std::string folder() const;
  const std::string& notes() const { return notes_; }

  // SIGKILL to every process in it: cgroup.kill, or freeze, kill each, thaw.
  void Kill();
  // How often the kernel killed in it for memory.
  uint64_t OomKills() const;
  // Removes the folders; false while processes are left in them.
  bool Remove();

 private:
  std::string Make(const std::string& parent, const std::string& name);

  std::string v2_;
  std::string memory_;
  std::string freezer_;
  std::vector<std::string> join_files_;
  std::string notes_;
};

// SIGKILL to each process listed in FOLDER/cgroup.procs.
void KillProcesses(const std::string& folder);

}  // namespace heddle::shim
