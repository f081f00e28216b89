// A machine in the simulation: daemon, shims and trainers, which may die one by one. A model of
// worker/daemon, worker/shim and worker/trainer by their contracts (control-plane 4.3, L4, L5, X2
// to X7), not their code: it registers, beats, takes commands, spawns ranks, writes and seals
// checkpoints under permits, reports until acknowledged, and its shims outlive its daemon.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/state/effect.h"
#include "heddle/v1/worker_link.pb.h"
#include "tests/simulation/checkers.h"
#include "tests/simulation/coordinator_node.h"
#include "tests/simulation/network.h"
#include "tests/simulation/plan.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

class Gang;

// One task: its folder, shim and ranks. Survives the daemon, not the machine.
struct SimTask {
  heddle::v1::TaskAssignment assign;
  heddle::v1::TaskReport report;  // what the worker knows of it
  uint64_t acked_seq = 0;
  bool processes = false;  // ranks live
  bool start_wanted = false;
  bool started = false;
  int64_t contact_ms = 0;
  int64_t permit_until_ms = 0;
  std::optional<heddle::v1::StopTask> stop;
  uint64_t kill_epoch = 0;                              // the newest kill timer counts
  std::map<uint32_t, heddle::v1::RankSealShard> seals;  // by rank, unanswered
  std::optional<heddle::v1::RankOpenCheckpoint> open;   // rank 0, unanswered
  uint64_t fence() const { return assign.fence(); }
  bool command() const { return assign.config().kind() == heddle::v1::RunConfig::KIND_COMMAND; }
  bool RankLives(uint32_t rank) const;
};

class WorkerNode {
 public:
  WorkerNode(World& world, const Plan& plan, Network& network, Checkers& checkers,
             CoordinatorNode& coordinator, std::string id)
      : world_(world),
        plan_(plan),
        network_(network),
        checkers_(checkers),
        coordinator_(coordinator),
        id_(std::move(id)),
        rate_(1.0 + 0.01 * static_cast<double>(world.Between(-2, 2))) {}
  WorkerNode(const WorkerNode&) = delete;
  WorkerNode& operator=(const WorkerNode&) = delete;

  void SetGangs(std::function<Gang&(const heddle::v1::TaskAssignment&)> gangs) {
    gangs_ = std::move(gangs);
  }
  const std::string& id() const { return id_; }

  // ---- life ----
  void StartDaemon();
  void CrashDaemon();
  void Reboot();
  // The daemon stands still, as if stopped: messages wait, shims and ranks go on. A transport that
  // hears nothing for long gives the stream up.
  void PauseDaemon(int64_t length_ms);
  // Kills a random rank, or the shim, of a random live task. False if there is none.
  bool KillSomeRank();
  // Stops a random rank of a random live task of kind `train`, for good.
  void FreezeSomeRank();
  bool KillSomeShim();

  // ---- from the network ----
  void OnEffect(const StreamPtr& stream, const state::Effect& effect);
  void OnHeartbeatReply(const StreamPtr& stream, uint64_t n,
                        const std::vector<heddle::v1::Permit>& permits, int64_t granted_ms);

  // ---- from the gang's ranks here ----
  SimTask* task(uint64_t fence);
  bool HoldsPermit(uint64_t fence);
  void RankJoined(uint64_t fence, uint32_t rank, uint64_t start_step);
  void RankExited(uint64_t fence, heddle::v1::RankOutcome outcome);
  void SetStep(uint64_t fence, uint64_t step);
  void AskOpen(uint64_t fence, uint32_t rank, uint64_t step);
  void Seal(uint64_t fence, heddle::v1::RankSealShard seal);
  void ReportDamage(uint64_t fence, const heddle::v1::CheckpointRecord& record);

 private:
  // Runs `work` now, or when the daemon goes on if it stands still; never after its death.
  void WhenAwake(std::function<void()> work);
  void RegisterSoon(int64_t delay_ms);
  void RegisterNow();
  void OnRegistered(uint64_t session, const state::Outcome& outcome, const StreamPtr& stream);
  void Disconnect();
  void Beat(uint64_t session);
  void ResendLoop(uint64_t session);
  void ToCoordinator(state::Event event);
  void Report(SimTask& task);
  void SendReport(const SimTask& task);
  void SetState(SimTask& task, heddle::v1::TaskState state);
  void TakeEffect(const state::Effect& effect);
  void TakeHeartbeatReply(uint64_t n, const std::vector<heddle::v1::Permit>& permits,
                          int64_t granted_ms);
  void OnAssign(const heddle::v1::TaskAssignment& assign);
  void OnStart(const heddle::v1::StartTask& start);
  void OnStop(const heddle::v1::StopTask& stop);
  void OnCollectStacks(const heddle::v1::CollectStacks& collect);
  void OnKillFenced(uint64_t fence);
  void OnCheckpointReply(const heddle::v1::RankCheckpointReply& reply);
  void Refuse(const heddle::v1::TaskAssignment& assign, const char* why);
  void Spawn(uint64_t fence);
  void TryStart(SimTask& task);
  void WatchOrphan(uint64_t fence);
  void Kill(SimTask& task, const char* why, const char* category = "");
  void EndProcesses(SimTask& task);
  void Refresh(SimTask& task);
  SimTask* SomeLiveTask();

  World& world_;
  const Plan& plan_;
  Network& network_;
  Checkers& checkers_;
  CoordinatorNode& coordinator_;
  const std::string id_;
  const double rate_;  // of its clock
  std::function<Gang&(const heddle::v1::TaskAssignment&)> gangs_;

  uint64_t instance_ = 1;
  uint64_t session_ = 0;  // of the newest registration
  bool daemon_up_ = false;
  uint64_t daemon_epoch_ = 0;
  int64_t awake_ms_ = 0;  // it stands still until then
  StreamPtr stream_;      // null: not registered
  uint64_t beat_ = 0;
  std::map<uint64_t, int64_t> beat_sent_ms_;
  int64_t heard_ms_ = 0;
  std::map<uint64_t, std::unique_ptr<SimTask>> tasks_;  // by fence
  std::map<uint64_t, uint64_t> highest_fence_;          // job -> highest seen (L10)
};

}  // namespace heddle::simulation
