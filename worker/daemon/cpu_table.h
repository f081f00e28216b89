// Which CPUs each task of this machine was given, shared by all daemons of the user through one
// locked file: two workers of one host (`heddle up`) must not put their ranks on the same core.
// A wrong table costs speed only, so every error falls back to "no binding".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/numa/numa.h"

namespace heddle::worker {

class CpuTable {
 public:
  // `path` is the table's file, `granted` the CPUs this daemon may use, `nodes` those of the
  // machine; without nodes all CPUs are alike.
  CpuTable(std::string path, std::vector<uint32_t> granted, const std::vector<numa::Node>& nodes);

  // `count` CPUs for each of `ranks` ranks, the least used first and distinct as long as there are
  // enough; of those that are used alike, CPUs of one memory node, of that with the most of them,
  // or else of as few nodes as can be. Booked for `task_dir` until Release or until neither this
  // process nor the task's shim lives. Empty lists when binding is not possible or `count` is 0.
  std::vector<std::vector<uint32_t>> Take(const std::string& task_dir, uint32_t ranks,
                                          uint32_t count);
  void Release(const std::string& task_dir);

  // Where the table of this user lies by default.
  static std::string DefaultPath();

 private:
  // Of the CPUs with this use, by CPU.
  std::vector<uint32_t> Choose(const std::map<uint32_t, int>& use, size_t count) const;
  int NodeOf(uint32_t cpu) const;

  std::string path_;
  std::vector<uint32_t> granted_;
  std::map<uint32_t, int> node_of_;
};

}  // namespace heddle::worker
