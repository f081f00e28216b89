// Which CPUs each task of this machine was given, shared by all daemons of the user through one
// locked file: two workers of one host (`heddle up`) must not put their ranks on the same core.
// A wrong table costs speed only, so every error falls back to "no binding".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace heddle::worker {

class CpuTable {
 public:
  // `path` is the table's file, `granted` the CPUs this daemon may use.
  CpuTable(std::string path, std::vector<uint32_t> granted);

  // `count` CPUs for each of `ranks` ranks, the least used first and distinct as long as there are
  // enough. Booked for `task_dir` until Release or until neither this process nor the task's shim
  // lives. Empty lists when binding is not possible or `count` is 0.
  std::vector<std::vector<uint32_t>> Take(const std::string& task_dir, uint32_t ranks,
                                          uint32_t count);
  void Release(const std::string& task_dir);

  // Where the table of this user lies by default.
  static std::string DefaultPath();

 private:
  std::string path_;
  std::vector<uint32_t> granted_;
};

}  // namespace heddle::worker
