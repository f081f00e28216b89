// The folder of one task, `tasks/<F>-<task>/` (control-plane X1): everything a daemon needs to take
// the task over after a crash. No state is kept beside what the files say.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/worker_link.pb.h"
#include "worker/control/control_frame.h"
#include "worker/control/rank_page.h"
#include "worker/control/task_files.h"

namespace heddle::worker {

struct TaskKey {
  uint64_t fence = 0;
  uint32_t task = 0;
  auto operator<=>(const TaskKey&) const = default;
};
// "<F>-<task>", the folder's name.
std::string ToText(const TaskKey& key);

class TaskFolder {
 public:
  // What the spec does not say.
  struct Origin {
    std::string checkpoint_root;
    std::string instance;  // of the machine; another one later means that every process is gone
  };

  // Writes spec, pages, contact, empty logs/ and scratch/, in the kernel but not yet synced: a
  // crash of the machine ends the ranks anyway. ALREADY_EXISTS, or the error of the disk.
  static StatusOr<TaskFolder> Create(const std::string& tasks_dir,
                                     const v1::TaskAssignment& assignment, const Origin& origin,
                                     int64_t max_orphan_ns);
  // An existing one. DATA_LOSS when its spec cannot be read.
  static StatusOr<TaskFolder> Open(const std::string& path);
  // Every folder in `tasks_dir`, oldest name first.
  static std::vector<std::string> List(const std::string& tasks_dir);

  const std::string& path() const { return path_; }
  const v1::TaskAssignment& assignment() const { return assignment_; }
  const std::string& checkpoint_root() const { return origin_.checkpoint_root; }
  const std::string& instance() const { return origin_.instance; }
  TaskKey key() const { return {assignment_.fence(), assignment_.task()}; }
  std::string PagePath(uint32_t rank) const;
  std::string LogPath(uint32_t rank) const;
  std::string LogLossPath(uint32_t rank) const;
  control::RankPage* page(size_t local_rank) { return pages_[local_rank].get(); }
  control::ContactFile* contact() { return contact_.get(); }

  Status WriteLaunch(const control::LaunchFile& launch) const;
  // Syncs every file and the folder; slow, for another thread. Static: works on a copy of the path.
  static Status Sync(const std::string& path);

  // Who the shim is; nothing if none was started.
  std::optional<control::ShimIdentity> Shim() const;
  bool ShimIsAlive() const;
  // Takes the place of a shim that has not begun: none will begin any more. False if one has.
  bool ForbidShim() const;
  // Kills what still runs of a folder that cannot be opened: nobody else would, and its task will
  // count as gone. Looks again until nothing is found, at most 2 s.
  static void EndProcesses(const std::string& path);
  // The frames of the `exit` file, empty if there is none.
  std::vector<control::Frame> ExitFrames() const;

  // Highest report number, kept over restarts of the daemon (not of the machine).
  uint64_t LoadSeq() const;
  void StoreSeq(uint64_t seq) const;
  // The coordinator needs it no more; what is left is sending its logs.
  void MarkForgotten() const;
  bool IsForgotten() const;
  // Deletes everything. Errors are logged, never fatal.
  static void Remove(const std::string& path);

 private:
  TaskFolder() = default;
  Status MapShared(bool create, int64_t max_orphan_ns);

  std::string path_;
  v1::TaskAssignment assignment_;
  Origin origin_;
  std::vector<std::unique_ptr<control::RankPage>> pages_;
  std::unique_ptr<control::ContactFile> contact_;
};

// Ends every process that carries HEDDLE_TASK_DIR=`task_dir` in its environment, and every process
// of `cgroup`; for what a killed shim left behind. Returns how many signals were sent.
int KillLeftovers(const std::string& task_dir, const std::string& cgroup);

}  // namespace heddle::worker
