// The coordinator's records in memory with the indexes that decisions need. Changes only by
// Commit, live and at replay alike; everything but `records` is derived from them.
//
// Records are held by shared_ptr<const ...>: the scheduler's snapshot and published views share
// them with the state thread without copies (S1). Not thread-safe; copies of a State are
// independent.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "coordinator/state/event.h"
#include "coordinator/state/observation.h"
#include "coordinator/state/policy.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/records.pb.h"

namespace heddle::state {

using JobPtr = std::shared_ptr<const heddle::v1::JobRecord>;
using AttemptPtr = std::shared_ptr<const heddle::v1::AttemptRecord>;
using TaskPtr = std::shared_ptr<const heddle::v1::TaskRecord>;
using WorkerPtr = std::shared_ptr<const heddle::v1::WorkerRecord>;
using CheckpointPtr = std::shared_ptr<const heddle::v1::CheckpointRecord>;
using IdempotencyPtr = std::shared_ptr<const heddle::v1::IdempotencyRecord>;

using AttemptKey = std::pair<uint64_t, uint32_t>;          // job, number
using TaskKey = std::tuple<uint64_t, uint32_t, uint32_t>;  // job, number, task

// What a task holds on its node until EXITED or GONE.
struct Booking {
  double cpus = 0;
  uint64_t memory = 0;
  std::vector<int32_t> gpus;
};
Booking BookingOf(const heddle::v1::TaskRecord& task);
bool IsFinal(heddle::v1::TaskState state);  // EXITED, GONE

// One worker with what is booked on it.
struct NodeEntry {
  WorkerPtr record;
  std::set<TaskKey> booked;  // tasks not EXITED or GONE
  double cpus_used = 0;
  uint64_t memory_used = 0;
  std::set<int32_t> gpus_used;
};

// Place in the queue: smaller goes first. Tier = priority / 20 (S2).
struct QueueKey {
  int tier_down = 0;      // -(priority / 20)
  int priority_down = 0;  // -priority
  int64_t boost_down = 0;
  uint64_t submit_seq = 0;
  uint64_t job = 0;
  auto operator<=>(const QueueKey&) const = default;
};

// Progress of a running attempt, from heartbeats and metric points. In memory only: the step goes
// into the attempt's record when it ends.
struct Progress {
  uint64_t step = 0;
  int64_t at_ms = 0;             // when `step` last rose
  std::vector<int64_t> step_ms;  // of the newest steps, a ring
  size_t next = 0;               // its place

  // 0: none was timed yet.
  int64_t MedianStepMs() const;
};

class State {
 public:
  State() = default;
  State(const State& other) = default;
  State& operator=(const State& other) = default;
  State(State&&) = default;
  State& operator=(State&&) = default;

  // ---- changes ----
  // Applies the delta of one event. REQUIRES: seq == next_seq(); the journal never skips one.
  void Commit(const heddle::v1::EventRecord& event);
  // Loads one stored record at recovery (RecordChange with the record set); order does not matter.
  // Afterwards call SetNextSeq with the newest journal seq + 1.
  void Load(heddle::v1::RecordChange change);
  void SetNextSeq(uint64_t seq, int64_t newest_ms);
  // A heartbeat or metric point told of `step` under `fence`. Ignored for unknown, ended or fenced
  // attempts. Not an event: nothing of it is stored.
  void NoteProgress(Fence fence, uint64_t step, Time now, const Policy& policy);

  // Heads of ranks under `fence`, as a heartbeat brought them. As NoteProgress.
  void NoteHeads(Fence fence, const google::protobuf::RepeatedPtrField<heddle::v1::RankHead>& heads,
                 Time now);

  // ---- records; nullptr if absent ----
  const heddle::v1::JobRecord* job(JobId id) const;
  const heddle::v1::AttemptRecord* attempt(JobId job, uint32_t number) const;
  // The attempt that owns `fence`; nullptr for raised fences and unknown ones.
  const heddle::v1::AttemptRecord* attempt_of(Fence fence) const;
  const heddle::v1::TaskRecord* task(JobId job, uint32_t attempt, uint32_t task) const;
  const heddle::v1::WorkerRecord* worker(const std::string& id) const;
  const heddle::v1::CheckpointRecord* checkpoint(const CheckpointKey& key) const;
  const heddle::v1::IdempotencyRecord* idempotency(const std::string& identity,
                                                   const std::string& request_id) const;
  const heddle::v1::MetaRecord& meta() const { return meta_; }

  const std::map<uint64_t, JobPtr>& jobs() const { return jobs_; }
  const std::map<AttemptKey, AttemptPtr>& attempts() const { return attempts_; }
  const std::map<TaskKey, TaskPtr>& tasks() const { return tasks_; }
  const std::map<std::string, NodeEntry>& nodes() const { return nodes_; }
  const std::map<CheckpointKey, CheckpointPtr>& checkpoints() const { return checkpoints_; }
  const std::map<std::pair<std::string, std::string>, IdempotencyPtr>& idempotency_records() const {
    return idempotency_;
  }

  // ---- indexes ----
  std::vector<AttemptPtr> AttemptsOf(JobId job) const;
  std::vector<TaskPtr> TasksOf(JobId job, uint32_t attempt) const;
  std::vector<CheckpointPtr> CheckpointsOf(JobId job) const;
  // QUEUED jobs in order (S2).
  const std::map<QueueKey, JobPtr>& queue() const { return queue_; }
  // The same by what a rank of theirs needs and where it may run: jobs of one text fit alike.
  const std::map<std::string, std::map<QueueKey, JobPtr>>& queue_by_shape() const {
    return queue_by_shape_;
  }
  // WAITING jobs that wait for `job`.
  std::vector<JobId> WaitingFor(JobId job) const;
  // Pending deadlines, earliest first. kJobStart timers are in wall time and kept apart. The
  // runtime arms one timer for each front and posts TimerFired for all that are due.
  const std::set<Timer>& timers() const { return timers_; }
  const std::set<Timer>& wall_timers() const { return wall_timers_; }
  const Progress* progress(Fence fence) const;
  // nullptr before the first heads.
  const Observation* observed(Fence fence) const;
  // Jobs per JobState, and nodes per WorkerState.
  const std::map<int, uint64_t>& job_counts() const { return job_counts_; }
  uint64_t next_seq() const { return next_seq_; }
  int64_t newest_ms() const { return newest_ms_; }
  // Moves with every change of queue, nodes or bookings.
  uint64_t schedule_revision() const { return schedule_revision_; }

  // Every record as a change, in key order: what a snapshot or a comparison needs.
  std::vector<heddle::v1::RecordChange> Dump() const;

 private:
  void Put(heddle::v1::RecordChange change);
  void PutJob(JobPtr record);
  void PutAttempt(AttemptPtr record);
  void PutTask(TaskPtr record);
  void PutWorker(WorkerPtr record);
  void PutCheckpoint(CheckpointPtr record);
  void PutIdempotency(IdempotencyPtr record);
  void IndexJob(const JobPtr& record, bool add);
  void IndexAttempt(const heddle::v1::AttemptRecord& record, bool add);
  void IndexTask(const heddle::v1::TaskRecord& record, bool add);
  void IndexWorker(const heddle::v1::WorkerRecord& record, bool add);
  void IndexCheckpoint(const heddle::v1::CheckpointRecord& record, bool add);
  void IndexIdempotency(const heddle::v1::IdempotencyRecord& record, bool add);
  void SetTimer(const Timer& timer, bool add);

  heddle::v1::MetaRecord meta_;
  std::map<uint64_t, JobPtr> jobs_;
  std::map<AttemptKey, AttemptPtr> attempts_;
  std::map<TaskKey, TaskPtr> tasks_;
  std::map<std::string, NodeEntry> nodes_;
  std::map<CheckpointKey, CheckpointPtr> checkpoints_;
  std::map<std::pair<std::string, std::string>, IdempotencyPtr> idempotency_;

  std::map<uint64_t, AttemptKey> by_fence_;
  std::map<QueueKey, JobPtr> queue_;
  std::map<std::string, std::map<QueueKey, JobPtr>> queue_by_shape_;
  std::set<std::pair<uint64_t, uint64_t>> waiting_;  // (awaited, waiting)
  std::set<Timer> timers_;
  std::set<Timer> wall_timers_;
  std::map<uint64_t, Progress> progress_;      // by fence
  std::map<uint64_t, Observation> observed_;   // by fence
  std::map<uint64_t, int64_t> hang_deadline_;  // by fence: what stands in timers_
  std::map<int, uint64_t> job_counts_;
  uint64_t next_seq_ = 1;
  int64_t newest_ms_ = 0;
  uint64_t schedule_revision_ = 0;
};

// The task may write and commit: its attempt is alive and holds its job's current fence (L4).
bool HoldsPermit(const State& state, const heddle::v1::TaskRecord& task);
// Permits for the heartbeat reply to `worker`; the runtime releases it like any reply (invariant 3
// of apply.h) and tells LeaseTable.
std::vector<heddle::v1::Permit> PermitsFor(const State& state, const std::string& worker,
                                           const Policy& policy);
// CONNECTED, OPEN, OK and not on probation (4.4): may get new work.
bool IsSchedulable(const heddle::v1::WorkerRecord& worker, int64_t now_ms);

}  // namespace heddle::state
