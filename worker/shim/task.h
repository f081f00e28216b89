// One task's life in its shim (control-plane X4-X8): one thread, one poll. It owns the ranks and
// the kill deadlines, so that neither a dead daemon nor a lost network leaves a rank behind (L5).
//
// Invariants: 1. SIGKILL of this process ends its ranks (PDEATHSIG). 2. Run() returns only when no
// descendant is left. 3. A reliable frame leaves memory only by an ACK or into the `exit` file.
#pragma once

#include <poll.h>
#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "worker/control/control_frame.h"
#include "worker/control/rank_page.h"
#include "worker/control/task_files.h"
#include "worker/shim/cgroup.h"
#include "worker/shim/log_file.h"
#include "worker/shim/outbox.h"
#include "worker/shim/spawn.h"

namespace heddle::shim {

class Task {
 public:
  // The current folder is the task's.
  Task(control::LaunchFile launch, std::unique_ptr<control::ContactFile> contact);
  ~Task();
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  // Writes `shim`, listens on shim.sock. An error text, or empty. ALREADY STARTED is an error: a
  // task folder starts its ranks once.
  std::string Prepare();
  // Spawns every rank. Failures become exits of those ranks.
  void Spawn();
  // Until every rank and descendant ended and `exit` is written.
  void Run();

 private:
  struct Rank {
    control::RankLaunch launch;
    SpawnedRank process;
    std::unique_ptr<LogFile> log;
    control::FrameReader reader;
    std::string to_rank;  // not yet written to its control socket
    bool live = false;
    bool announced = false;  // SPAWNED is out
    LaunchFailure failure;
  };

  // Poll loop.
  void FillPoll(std::vector<pollfd>* fds);
  void HandlePoll(const std::vector<pollfd>& fds);
  void HandleSignals();
  void HandleDeadlines();
  int64_t NextDeadlineNs() const;
  void ArmTimer();

  // Ranks.
  void ReadRank(Rank* rank);
  void CloseRank(Rank* rank);
  void WriteRank(Rank* rank);
  void CheckLaunch(Rank* rank);
  void Reap();
  void FinishRank(Rank* rank, const siginfo_t& info);
  Rank* FindPid(pid_t pid);
  Rank* FindRank(uint32_t number);
  bool AnyLive() const;

  // Kill deadlines.
  void StopTask(const control::StopTaskPod& order);
  void Terminate();
  void Kill(control::KillReason reason);
  void KillTree();

  // Daemon.
  void AcceptDaemon();
  void DropDaemon();
  void ReadDaemon();
  void WriteDaemon();
  void HandleDaemonFrame(const control::Frame& frame);
  std::string TaskState() const;
  void Send(control::FrameType type, uint32_t rank, std::string_view payload);

  // Once no child is left. finished_, or tried again at finish_again_at_ns_.
  void Finish();

  const control::LaunchFile launch_;
  const std::unique_ptr<control::ContactFile> contact_;
  Cgroup cgroup_;
  std::vector<Rank> ranks_;
  Outbox outbox_;
  int64_t started_at_ms_ = 0;
  uint64_t oom_kills_ = 0;

  int signal_fd_ = -1;
  int timer_fd_ = -1;
  int listen_fd_ = -1;
  int daemon_fd_ = -1;
  control::FrameReader daemon_reader_;
  std::string to_daemon_;

  // BootTimeNs() values, 0 = off.
  int64_t term_at_ns_ = 0;
  int64_t kill_at_ns_ = 0;
  control::KillReason kill_at_reason_ = control::KillReason::kNone;
  int64_t peer_failed_at_ns_ = 0;
  int64_t kill_again_at_ns_ = 0;
  int64_t finish_again_at_ns_ = 0;
  int64_t leave_at_ns_ = 0;
  int64_t armed_ns_ = -1;
  control::KillReason kill_reason_ = control::KillReason::kNone;
  bool no_children_ = false;
  bool finish_failed_ = false;
  bool finished_ = false;
};

}  // namespace heddle::shim
