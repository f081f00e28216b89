// Who this worker is, in its state folder (control-plane N3, N4): an id that stays with the machine
// and the folder, an instance that changes when every old process is provably gone, and the highest
// term seen, below which no coordinator is obeyed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status/status.h"

namespace heddle::worker {

class WorkerState {
 public:
  // Makes `dir` (0700) and locks it. FAILED_PRECONDITION while another daemon holds it.
  static StatusOr<std::unique_ptr<WorkerState>> Open(const std::string& dir);
  ~WorkerState();
  WorkerState(const WorkerState&) = delete;
  WorkerState& operator=(const WorkerState&) = delete;

  const std::string& dir() const { return dir_; }
  std::string tasks_dir() const { return dir_ + "/tasks"; }
  const std::string& worker_id() const { return worker_id_; }
  const std::string& instance() const { return instance_; }
  // Rises with every new instance, so that the older of two is known; the same as before on a disk
  // that does not take it.
  uint64_t boot() const { return boot_; }
  const std::string& cluster_id() const { return cluster_id_; }
  uint64_t highest_term() const { return highest_term_; }
  // Rises with every call within an instance, also over restarts of the daemon.
  uint64_t NewSession();

  // Takes over what a coordinator says about itself, durably. ABORTED for a term below the highest
  // seen; FAILED_PRECONDITION for another cluster.
  Status Accept(const std::string& cluster_id, uint64_t term);

 private:
  WorkerState() = default;
  Status Load();
  void CountBoot();

  std::string dir_;
  int lock_fd_ = -1;
  std::string worker_id_;
  std::string instance_;
  uint64_t boot_ = 0;
  std::string cluster_id_;
  uint64_t highest_term_ = 0;
  uint64_t last_session_ = 0;
};

// Hash of boot id, pid namespace and start of process 1.
std::string CurrentInstance();

}  // namespace heddle::worker
