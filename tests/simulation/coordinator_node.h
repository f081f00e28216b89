// The coordinator in the simulation: the real Apply, State, LeaseTable and scheduling pass around a
// simulated journal that loses what was not synced, or keeps the batch in flight. Mirrors what
// coordinator/runtime does, in the order that apply.h prescribes.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "coordinator/schedule/schedule.h"
#include "coordinator/state/apply.h"
#include "coordinator/state/leases.h"
#include "coordinator/state/state.h"
#include "tests/simulation/checkers.h"
#include "tests/simulation/network.h"
#include "tests/simulation/plan.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

class CoordinatorNode {
 public:
  using Reply = std::function<void(const state::Outcome&)>;
  using Register = std::function<void(const state::Outcome&, const StreamPtr&)>;

  CoordinatorNode(World& world, const Plan& plan, Network& network, Checkers& checkers)
      : world_(world), plan_(plan), network_(network), checkers_(checkers) {}

  void Boot();
  void Crash();
  bool up() const { return up_; }
  const state::State& working() const { return working_; }
  const state::State& durable() const { return durable_; }
  bool idle() const { return queue_.empty(); }
  void JumpWall(int64_t by_ms) {
    wall_offset_ms_ += by_ms;
    ArmTimers();
  }
  // Where messages to workers go.
  void SetDeliver(std::function<void(const StreamPtr&, const state::Effect&)> deliver) {
    deliver_ = std::move(deliver);
  }
  void SetHeartbeatReply(
      std::function<void(const StreamPtr&, uint64_t n, const std::vector<heddle::v1::Permit>&)> f) {
    heartbeat_reply_ = std::move(f);
  }

  // Nothing happens, and nobody answers, while it is down.
  void Post(state::Event event, Reply reply);
  // X2; the stream is ready when the worker uses it.
  void OnRegister(const heddle::v1::RegisterRequest& request, Register reply);
  // First message of a stream: effects that waited for it go out.
  void OnStream(const StreamPtr& stream);
  void OnHeartbeat(const StreamPtr& stream, const heddle::v1::Heartbeat& heartbeat);
  void OnWorkerEvent(const StreamPtr& stream, state::Event event);
  state::Time Now() const;

 private:
  struct Batch {
    state::Outcome outcome;
    Reply reply;
    uint64_t last_seq = 0;
  };

  state::Outcome Decide(const state::Event& event);
  void Append(state::Outcome outcome, Reply reply);
  void StartSync();
  void FinishSync();
  void Release(Batch batch);
  void RunEffect(const state::Effect& effect);
  void ToWorker(const std::string& worker, const state::Effect& effect);
  void ArmTimers();
  void FireTimers();
  void ArmLeases();
  void PollLeases();
  void WakeScheduler();
  void RunScheduler();
  void DeleteFiles(const state::effect::DeleteCheckpointFiles& effect);
  void Verify(const state::effect::VerifyCheckpoint& effect);

  World& world_;
  const Plan& plan_;
  Network& network_;
  Checkers& checkers_;
  std::function<void(const StreamPtr&, const state::Effect&)> deliver_;
  std::function<void(const StreamPtr&, uint64_t, const std::vector<heddle::v1::Permit>&)>
      heartbeat_reply_;

  bool up_ = false;
  uint64_t epoch_ = 0;  // of the process: closures of a dead one do nothing
  uint32_t disk_term_ = 0;
  int64_t wall_offset_ms_ = 1'700'000'000'000;
  int64_t start_ms_ = 0;  // world time of the start
  int64_t base_ms_ = 0;   // Time::ms of the start
  state::State working_;
  state::State durable_;  // what the journal would replay to
  std::deque<Batch> queue_;
  size_t group_ = 0;  // batches in the sync in flight
  bool syncing_ = false;
  std::unique_ptr<state::LeaseTable> leases_;
  std::map<std::string, StreamPtr> streams_;
  uint64_t releasing_seq_ = UINT64_MAX;                        // of the batch whose effects run
  std::map<std::string, std::vector<state::Effect>> waiting_;  // for a stream to open
  std::set<std::string> open_;
  int64_t armed_timer_ms_ = 0;
  int64_t armed_lease_ms_ = 0;
  bool pass_armed_ = false;
  std::set<std::string> returned_;  // registered since the start
};

}  // namespace heddle::simulation
