// One task from assignment to forgetting (architecture W8, control-plane 4.3): check the fence,
// write the folder, start the shim, answer HELLO with SPEC, pass on READY, START, JOINED, progress,
// checkpoints and rendezvous, stop, report. Holds nothing that the folder and the shim's replay
// could not rebuild, so a daemon may die at any instruction. State thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include "base/clock/clock.h"
#include "heddle/v1/worker_link.pb.h"
#include "worker/daemon/cpu_table.h"
#include "worker/daemon/gpu_table.h"
#include "worker/daemon/launch_plan.h"
#include "worker/daemon/options.h"
#include "worker/daemon/rank_watch.h"
#include "worker/daemon/shim_connection.h"
#include "worker/daemon/task_folder.h"

namespace heddle::worker {

// What a runner needs from its daemon; everything is borrowed and outlives the runner.
class TaskHost {
 public:
  virtual ~TaskHost() = default;
  virtual boost::asio::io_context& io() = 0;
  virtual const Clock& clock() const = 0;
  virtual const Options& options() const = 0;
  virtual const CgroupParents& cgroups() const = 0;
  virtual CpuTable& cpus() = 0;
  virtual GpuTable& gpus() = 0;
  // Address ranks of this worker bind for each other (B1).
  virtual std::string data_address() = 0;
  // Runs `work` on the disk thread, then `done` here.
  virtual void RunOnDisk(std::function<Status()> work, std::function<void(Status)> done) = 0;
  // Hands a message to the coordinator's stream if there is one; false: not connected, keep it.
  virtual bool Send(v1::WorkerMsg message) = 0;
  // Number of the newest heartbeat sent; replies acknowledge what went before it.
  virtual uint64_t last_heartbeat() const = 0;
  // New log bytes may be there; the task's ranks have ended.
  virtual void LogsMayHaveGrown(const TaskKey& key) = 0;
};

// Shared: callbacks of its shim and of the disk thread hold it.
class TaskRunner : public std::enable_shared_from_this<TaskRunner> {
 public:
  TaskRunner(TaskHost* host, TaskFolder folder);

  // First start of a fresh folder.
  void Launch();
  // Takes over a folder that was there at the daemon's start (X3): attaches, or reads `exit`, or
  // finds the shim lost. `same_instance` false: every process of it is gone.
  void Adopt(bool same_instance);
  // False while the replay of an adopted shim is still coming.
  bool settled() const { return settled_; }

  // --- from the coordinator ---
  void OnAssignedAgain();
  void OnStart(const v1::StartTask& start);
  void OnStop(const v1::StopTask& stop);
  void OnKill(const std::string& reason);
  void OnCheckpointReply(const v1::RankCheckpointReply& reply);
  void OnRendezvousReply(const v1::RankRendezvousReply& reply);
  void OnReportAck(uint64_t seq);
  // Looks at every rank on the disk thread, then sends a StackReport.
  void OnCollectStacks();
  // What was sent before heartbeat `n` has arrived and is kept.
  void OnHeartbeatReply(uint64_t n);
  void PublishPermit(int64_t deadline_ns);
  void RefreshContact(int64_t contact_ns, int64_t max_orphan_ns);
  // A new session: everything unanswered goes out again.
  void Resend();
  // Ends the daemon's interest without touching ranks.
  void Detach();

  TaskKey key() const { return folder_.key(); }
  const TaskFolder& folder() const { return folder_; }
  // For a registration: a change that no report told yet gets its number now, or it would arrive
  // under the number of an older report and be taken for that one. An end is not told while other
  // words of the task wait: who hears of it may close the attempt and have the task forgotten.
  v1::TaskReport NewestReport();
  v1::Heartbeat::TaskBeat Beat();
  v1::TaskState state() const { return state_; }
  bool ended() const { return state_ == v1::TASK_STATE_EXITED || state_ == v1::TASK_STATE_GONE; }
  const std::map<uint32_t, v1::RankOutcome>& exits() const { return exits_; }

 private:
  // (rank, frame type, request number) of a question that waits for the coordinator.
  using QuestionKey = std::tuple<uint32_t, control::FrameType, uint64_t>;
  struct Question {
    v1::WorkerMsg message;
    uint64_t number = 0;  // to acknowledge to the shim
  };
  struct SentPoints {
    uint64_t heartbeat = 0;  // newest one sent before
    v1::RankPoints points;
  };
  struct SentDamage {
    uint64_t heartbeat = 0;
    uint64_t number = 0;  // to acknowledge to the shim
    v1::DamageReport report;
  };

  // Shim.
  std::shared_ptr<ShimConnection> MakeConnection();
  void StartShim();
  void OnShimStarted(const Status& status);
  void Attach();
  void OnShimClosed(const Status& status);
  void OnShimLost();
  void ReadExitFile();
  void OnFrame(const control::Frame& frame, uint64_t number);
  void OnRankFrame(const control::Frame& frame, uint64_t number);
  void OnHello(uint32_t rank, const control::Frame& frame);
  void OnProgress(const control::Frame& frame);
  void OnSpawned(const control::Frame& frame);
  void OnExited(const control::Frame& frame);
  void Ask(uint32_t rank, const control::Frame& frame, uint64_t number);
  void Acknowledge(uint64_t number);
  void Deliver(control::FrameType type, uint32_t rank,
               const google::protobuf::MessageLite& message);
  void ApplyStop();
  void KillShimLater();

  // State.
  void Settle();
  void MoveTo(v1::TaskState state);
  void FailLaunch(const Status& status);
  void FinishIfAllExited();
  void OnEnded();
  void ReportSoon();
  void CountReport();
  bool WordsWait() const;
  v1::TaskReport Report() const;
  std::optional<size_t> LocalIndex(uint32_t rank) const;
  v1::RankOutcome OutcomeOf(const control::RankExitedPod& exited) const;
  void AddMemory(const control::RankExitedPod& exited, v1::RankOutcome* outcome) const;
  void SendHeads();

  TaskHost* const host_;
  TaskFolder folder_;
  RankWatch watch_;
  const bool command_;
  std::shared_ptr<ShimConnection> shim_;
  boost::asio::steady_timer timer_;       // of the next look at the shim
  boost::asio::steady_timer kill_timer_;  // of its own end, which no look may put off
  std::vector<std::vector<uint32_t>> cpus_;

  v1::TaskState state_ = v1::TASK_STATE_ASSIGNED;
  v1::TaskState state_before_end_ = v1::TASK_STATE_ASSIGNED;
  uint64_t seq_ = 0;
  uint64_t acked_seq_ = 0;
  bool acknowledged_ = false;  // the folder is on disk
  bool launched_ = false;
  bool settled_ = true;
  bool syncing_ = false;
  bool report_wanted_ = false;
  bool report_due_ = false;
  bool kill_due_ = false;
  uint64_t replay_left_ = 0;
  int attach_attempts_ = 0;
  std::string detail_;
  uint64_t step_ = 0;
  std::optional<uint64_t> start_step_;
  std::map<uint32_t, int64_t> hello_ms_;
  std::set<uint32_t> spawned_;
  std::set<uint32_t> ready_;
  std::set<uint32_t> joined_;
  std::map<uint32_t, v1::RankExit> last_words_;
  std::map<uint32_t, v1::RankOutcome> exits_;
  std::optional<v1::StopTask> stop_;
  std::optional<std::string> kill_;

  std::map<QuestionKey, Question> questions_;
  std::deque<SentPoints> points_;
  std::deque<SentDamage> damages_;
};

}  // namespace heddle::worker
