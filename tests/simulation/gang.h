// The ranks of one attempt as a whole: they join, step together, save, and die together (P4).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "heddle/v1/worker_link.pb.h"
#include "tests/simulation/checkers.h"
#include "tests/simulation/plan.h"
#include "tests/simulation/worker_node.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

class Gang {
 public:
  Gang(World& world, const Plan& plan, Checkers& checkers,
       const heddle::v1::TaskAssignment& assign);
  Gang(const Gang&) = delete;
  Gang& operator=(const Gang&) = delete;

  // A rank's process came up on `worker`, and later got its Start.
  void AddRank(uint32_t rank, WorkerNode* worker) { ranks_[rank] = worker; }
  void Join(uint32_t rank);
  // A rank stops for good, in a phase of its step or at an operation that its peers did not launch.
  void Freeze(uint32_t rank);
  // What the rank's page shows.
  heddle::v1::RankHead Head(uint32_t rank) const;
  // A rank died; its peers notice, late or never.
  void OnDeath(uint32_t rank);
  void OnStop(const heddle::v1::StopTask& stop);
  void OnVerdict(uint32_t rank, const heddle::v1::CheckpointReply& reply);

 private:
  enum class Save { kNone, kOpening, kWriting };

  void StandStill();
  bool Lives(uint32_t rank);
  bool AllLive();
  void Begin();
  void Step();
  void BeginSave();
  void Write(uint32_t rank);
  void AskAgain(uint32_t rank, int64_t in_ms);
  void EndSave(bool committed);
  void LeaveAll(int code);
  void Exit(uint32_t rank, int code, const char* category = "");

  World& world_;
  const Plan& plan_;
  Checkers& checkers_;
  const heddle::v1::TaskAssignment assign_;
  std::map<uint32_t, WorkerNode*> ranks_;
  std::set<uint32_t> joined_;
  bool broken_ = false;
  bool running_ = false;
  bool stopping_ = false;   // save, then leave with 85
  bool finishing_ = false;  // the last save, then leave with 0
  uint64_t step_ = 0;
  uint64_t saved_step_ = 0;
  int64_t step_ms_ = 100;
  int64_t moved_ms_ = 0;  // when the ranks last did anything
  std::optional<uint32_t> frozen_;
  bool other_operation_ = false;  // the frozen one's is not its peers'
  Save save_ = Save::kNone;
  uint64_t save_step_ = 0;
  uint64_t save_epoch_ = 0;
  std::set<uint32_t> told_;  // ranks that know their save to be committed
};

}  // namespace heddle::simulation
