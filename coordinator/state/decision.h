// One Apply in the making: the state, overlaid with what this decision has changed so far, plus its
// events and effects. Internal to coordinator/state. Reads see the overlay; Finish() turns it into
// an Outcome.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "coordinator/state/apply.h"
#include "coordinator/state/event.h"
#include "coordinator/state/policy.h"
#include "coordinator/state/state.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/records.pb.h"

namespace heddle::state {

class Decision {
 public:
  Decision(const State& state, Time now, const Policy& policy)
      : state_(state), now_(now), policy_(policy) {}
  Decision(const Decision&) = delete;
  Decision& operator=(const Decision&) = delete;

  const State& state() const { return state_; }
  Time now() const { return now_; }
  const Policy& policy() const { return policy_; }

  // ---- reads; nullptr if absent ----
  const heddle::v1::MetaRecord& meta() const { return meta_changed_ ? meta_ : state_.meta(); }
  const heddle::v1::JobRecord* job(JobId id) const;
  const heddle::v1::AttemptRecord* attempt(AttemptId id) const;
  const heddle::v1::AttemptRecord* attempt_of(Fence fence) const;
  const heddle::v1::TaskRecord* task(AttemptId id, uint32_t task) const;
  const heddle::v1::WorkerRecord* worker(const std::string& id) const;
  const heddle::v1::CheckpointRecord* checkpoint(const CheckpointKey& key) const;
  std::vector<const heddle::v1::TaskRecord*> Tasks(AttemptId id) const;
  std::vector<const heddle::v1::CheckpointRecord*> Checkpoints(JobId job) const;

  // ---- writes: the record as it will be. REQUIRES: it exists. ----
  heddle::v1::MetaRecord& EditMeta();
  heddle::v1::JobRecord& Edit(JobId id);  // moves the version, once
  heddle::v1::AttemptRecord& Edit(AttemptId id);
  heddle::v1::TaskRecord& Edit(AttemptId id, uint32_t task);
  heddle::v1::WorkerRecord& Edit(const std::string& worker);
  heddle::v1::CheckpointRecord& Edit(const CheckpointKey& key);
  // New records; the caller fills all fields but the key.
  heddle::v1::JobRecord& AddJob(JobId id);
  heddle::v1::AttemptRecord& AddAttempt(AttemptId id);
  heddle::v1::TaskRecord& AddTask(AttemptId id, uint32_t task);
  heddle::v1::WorkerRecord& AddWorker(const std::string& id);
  heddle::v1::CheckpointRecord& AddCheckpoint(const CheckpointKey& key);
  void AddIdempotency(heddle::v1::IdempotencyRecord record);
  void DeleteIdempotency(const std::string& identity, const std::string& request_id);
  void DeleteWorker(const std::string& id);

  // A fence nobody owns yet (N1).
  Fence NextFence();

  // ---- what else goes into the outcome ----
  void SetActor(std::string actor) { actor_ = std::move(actor); }
  void Note(JobId job, const char* code, std::string text);
  void Note(AttemptId attempt, const char* code, std::string text);
  void Note(const CheckpointKey& checkpoint, const char* code, std::string text);
  void NoteWorker(const std::string& worker, const char* code, std::string text);
  void NoteCluster(const char* code, std::string text);
  void Do(Effect effect) { effects_.push_back(std::move(effect)); }
  void SetJob(JobId job) { job_ = job; }
  void SetRegistration(heddle::v1::RegisterReply reply) { registration_ = std::move(reply); }
  bool changed() const;

  // REQUIRES: every change was noted. A note without a change tells of something refused.
  Outcome Finish(Status status);

 private:
  heddle::v1::EventRecord& NewEvent(const char* code, std::string text);
  void FillDelta(heddle::v1::EventRecord& event);

  const State& state_;
  const Time now_;
  const Policy& policy_;
  std::string actor_ = "coordinator";
  bool meta_changed_ = false;
  heddle::v1::MetaRecord meta_;
  std::map<uint64_t, heddle::v1::JobRecord> jobs_;
  std::map<AttemptKey, heddle::v1::AttemptRecord> attempts_;
  std::map<TaskKey, heddle::v1::TaskRecord> tasks_;
  std::map<std::string, heddle::v1::WorkerRecord> workers_;
  std::map<CheckpointKey, heddle::v1::CheckpointRecord> checkpoints_;
  std::vector<heddle::v1::RecordChange> others_;
  std::vector<heddle::v1::EventRecord> events_;
  std::vector<Effect> effects_;
  JobId job_;
  std::optional<heddle::v1::RegisterReply> registration_;
};

inline AttemptId IdOf(const heddle::v1::AttemptRecord& record) {
  return {JobId{record.job()}, record.number()};
}
inline AttemptId AttemptOf(const heddle::v1::TaskRecord& record) {
  return {JobId{record.job()}, record.attempt()};
}

}  // namespace heddle::state
