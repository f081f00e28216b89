// What must hold in every simulated history. Records are judged by the product's own invariants;
// everything else is compared with an independent account of what truly happened: processes,
// writes, acknowledgements, owners of fences. A breach stops the run.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "coordinator/state/state.h"
#include "heddle/v1/records.pb.h"
#include "tests/simulation/plan.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

class Checkers {
 public:
  Checkers(World& world, const Plan& plan) : world_(world), plan_(plan) {}

  // ---- records (check_records.cc): I1 to I7, P9 ----
  void BeforeCommit(const state::State& before, const heddle::v1::EventRecord& event);
  void AfterCommit(const state::State& state);
  // Replaying the journal and loading the records give the same, and the invariants hold.
  void AfterRecovery(const state::State& loaded, const state::State& replayed);

  // ---- what truly happened (check_truth.cc) ----
  // An event is on disk. Keeps its own account of who owns each job's fence.
  void OnDurable(const heddle::v1::EventRecord& event);
  // Files of a rank were written (R9, M4: none later than cut + 25 s).
  void OnWrite(JobId job, Fence fence, uint64_t step, uint32_t rank);
  // A worker counts on a permit until `until_ms`; L6 gives it up 25 s after it was sent.
  void OnPermit(Fence fence, int64_t granted_ms, int64_t until_ms);
  // Files of a checkpoint go: never those of one that may be restored.
  void OnDelete(const state::State& durable, const state::CheckpointKey& key);
  // A restart point is read: its files must be there.
  void OnRestore(const heddle::v1::CheckpointRecord& record);
  // The ranks of an attempt do nothing from now on, for a reason: only of such a one may the
  // coordinator find that it hangs.
  void OnStandstill(Fence fence) { still_.insert(fence.value); }
  // Processes of a task start and end: no core given twice in truth, no command twice at a time.
  void OnProcesses(const std::string& worker, JobId job, Fence fence, double cpus, bool command,
                   bool start);

  // ---- acknowledged operations (check_acknowledged.cc): I5 ----
  void OnSubmitAcknowledged(const std::string& name, JobId id);
  void OnCancelAcknowledged(JobId id) { cancelled_.insert(id.value); }
  // Whoever asks to resume may undo a cancel, in either order of arrival.
  void OnResumeAsked(JobId id) { resumed_.insert(id.value); }

  // ---- the end (check_end.cc): M4 liveness ----
  // Every job has ended or has a truthful reason, nothing is booked for DONE jobs, no process runs.
  // The first sentence that is not so; empty: settled.
  std::string NotSettled(const state::State& state, int64_t now_ms, int64_t wall_ms) const;
  void AtEnd(const state::State& working, const state::State& durable);

 private:
  void OnAttempt(const heddle::v1::AttemptRecord& attempt);
  void OnCheckpoint(const heddle::v1::CheckpointRecord& checkpoint);

  World& world_;
  const Plan& plan_;
  uint64_t commits_ = 0;
  std::map<uint64_t, uint64_t> owner_;     // job -> fence that may commit, 0 none
  std::map<uint64_t, int64_t> cut_ms_;     // fence -> when it stopped owning its job
  std::map<uint64_t, int> attempt_state_;  // fence -> state
  std::set<uint64_t> ran_;                 // fences that were RUNNING
  std::set<uint64_t> still_;               // fences whose ranks stand still
  std::set<state::CheckpointKey> committed_;
  std::set<state::CheckpointKey> deleted_;
  std::map<std::string, double> cpus_;                    // worker -> cpus of live processes
  std::map<uint64_t, std::multiset<uint64_t>> commands_;  // command job -> fences with processes
  int processes_ = 0;
  std::map<std::string, uint64_t> acknowledged_;  // name -> job
  std::set<uint64_t> cancelled_;
  std::set<uint64_t> resumed_;
};

}  // namespace heddle::simulation
