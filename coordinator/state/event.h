// Every input of the coordinator's state machine, as a value. Callers outside (gRPC services,
// timers, the scheduler, LeaseTable) build one and post it to the state thread; Apply judges it.
// Names follow control-plane section 4. Whatever a decision needs besides the state is in the event
// or in Time: ids, random bytes and clocks come from the caller.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/jobs.pb.h"
#include "heddle/v1/records.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::state {

// Two readings of now. `ms` is the coordinator's own time: it starts at the wall time of the
// process start, but not below State::newest_ms(), and then advances with the steady clock only,
// so that no jump of the wall clock moves a deadline (reliability R10). `wall_ms` is shown to
// people and compared with `start_time` only.
struct Time {
  int64_t ms = 0;
  int64_t wall_ms = 0;
};

struct CheckpointKey {
  JobId job;
  Fence fence;
  uint64_t step = 0;
  auto operator<=>(const CheckpointKey&) const = default;
};

// One deadline of the state: what State::timers() holds and TimerFired brings back. Derived from
// the records, so a restart loses none.
enum class TimerKind : uint8_t {
  kJobStart,           // WAITING until start_time, wall time (J5)
  kJobBackoff,         // J12
  kAttemptDeadline,    // A2, A4, A6, A8, A13
  kAttemptResend,      // unconfirmed commands
  kAttemptRunLimit,    // J20
  kAttemptHang,        // A9
  kTaskOrphan,         // A14
  kQuarantineEnd,      // W5
  kProbationEnd,       // W2
  kCheckpointOpen,     // K4
  kCheckpointDelete,   // K7
  kIdempotencyExpiry,  // D1
};
struct Timer {
  int64_t at_ms = 0;  // Time::ms, for kJobStart Time::wall_ms
  TimerKind kind = TimerKind::kJobBackoff;
  uint64_t job = 0;
  uint64_t fence = 0;   // attempts, tasks, checkpoints
  uint64_t number = 0;  // attempt number, or the checkpoint's step
  uint64_t task = 0;
  std::string key;  // worker id, or identity + '\0' + request id
  auto operator<=>(const Timer&) const = default;
};

// What every mutating request of a client carries (R1, section 12).
struct ClientRequest {
  std::string identity;         // authenticated caller
  std::string request_id;       // empty: not repeatable
  std::string digest;           // of the body, so that another body under the same id is refused
  uint64_t expect_version = 0;  // 0: any
};

namespace event {

// First event after recovery: leases count anew (L9). `term` is the store's, already durable and
// higher than ever before. `cluster_id` and `secret` are used by the first start only.
struct CoordinatorStarted {
  Term term;
  std::string cluster_id;
  std::string secret;  // 16 random bytes
};

// ---- users (control-plane 4.1) ----
struct JobSubmitted {  // J1..J3, J25
  ClientRequest request;
  JobId id;                      // fresh, from JobIdGenerator
  heddle::v1::RunConfig config;  // resolved and validated; memory_per_rank already planned
  bool hold = false;
  // Submit's own `--after`; config.schedule.after is parsed by the caller into this too.
  std::vector<heddle::v1::DependencyRecord> after;
  std::optional<CheckpointKey> resume_from;  // --resume-from or checkpoint.resume_from, resolved
};
struct JobHeld {
  ClientRequest request;
  JobId job;
};  // J13
struct JobReleased {
  ClientRequest request;
  JobId job;
};                   // J4
struct JobStopped {  // J13, J14, J17, J18; preempt: A10
  ClientRequest request;
  JobId job;
  heddle::v1::StopVerb verb = heddle::v1::STOP_VERB_CANCEL;
  // Time a running attempt gets to checkpoint and leave. Absent: 0 for cancel, else the policy's.
  std::optional<int64_t> grace_ms;
  std::string reason;
};
struct JobResumed {  // J16, J24
  ClientRequest request;
  JobId job;
  // The job's config with overrides applied, if there are any; differences outside
  // training.max_steps, parallel.ranks, schedule.*, logging.* are refused. With it set
  // request.expect_version, the version of the job it was made from.
  std::optional<heddle::v1::RunConfig> config;
};
struct CheckpointPinned {
  ClientRequest request;
  CheckpointKey key;
  bool pinned = true;
};
struct NodeAdministered {  // W3, A14
  ClientRequest request;
  std::string node;  // worker id
  heddle::v1::NodeVerb verb = heddle::v1::NODE_VERB_CORDON;
  std::string reason;
  std::optional<int64_t> grace_ms;
};

// ---- scheduler ----
struct PlacedTask {
  std::string worker;
  uint32_t first_rank = 0;
  uint32_t ranks = 0;
  std::vector<int32_t> gpu_indices;
};
// J7. A decision on a snapshot: dropped with ABORTED if the job has changed or a node has no room
// or takes no work any more (S1, checked on the records themselves, so that several gangs of one
// pass may share a node).
struct AttemptPlaced {
  JobId job;
  uint64_t job_version = 0;
  std::vector<PlacedTask> tasks;  // ranks 0..R-1 in order
};
struct JobInfeasible {
  JobId job;
  uint64_t job_version = 0;
  std::string text;
};  // J22

// ---- workers (4.3, 4.4, X2). `session` is the one of the stream the message came on; an old one
// is answered with effect::SendStale. ----
struct WorkerRegistered {
  heddle::v1::RegisterRequest request;
};
struct TaskReported {
  std::string worker;
  uint64_t session = 0;
  heddle::v1::TaskReport report;
};
struct WorkerLeft {
  std::string worker;
  uint64_t session = 0;
  std::string reason;
};
// Decided by LeaseTable (leases.h).
struct WorkerSuspect {
  std::string worker;
  uint64_t session = 0;
  std::string reason;
};
struct WorkerHeard {
  std::string worker;
  uint64_t session = 0;
};  // SUSPECT, then a heartbeat
struct WorkerLost {
  std::string worker;
  uint64_t session = 0;
};

// ---- diagnosis (training-runtime.md 17) ----
// What Diagnose() made of the heads of the attempt's ranks; new to its record, which judges again.
struct RanksDiagnosed {
  Fence fence;
  std::vector<heddle::v1::FindingRecord> findings;
};
// Answer to effect::CollectStacks, or a worker's heads at the end of a rank: evidence for the
// attempt's newest finding of a hang or a mismatch.
struct StacksReported {
  std::string worker;
  uint64_t session = 0;
  heddle::v1::StackReport report;
};

// ---- checkpoints (4.5) ----
struct CheckpointOpened {  // K1
  std::string worker;
  uint64_t session = 0;
  heddle::v1::RankOpenCheckpoint open;
  bool disk_ok = true;  // the file system's reserve is free (D8)
};
struct ShardSealed {  // K2, K3, K5
  std::string worker;
  uint64_t session = 0;
  heddle::v1::RankSealShard seal;
};
struct CheckpointDamaged {  // K8, reported by a rank
  std::string worker;
  uint64_t session = 0;
  heddle::v1::DamageReport report;
};
// Answer to effect::VerifyCheckpoint: digests compared by the coordinator. K8 if not ok.
struct CheckpointVerified {
  CheckpointKey key;
  bool ok = true;
  std::string detail;
};
// Answer to effect::DeleteCheckpointFiles (K7); OK also when the files were not there.
struct CheckpointFilesDeleted {
  CheckpointKey key;
};

// ---- time ----
struct TimerFired {
  Timer timer;
};

}  // namespace event

using Event =
    std::variant<event::CoordinatorStarted, event::JobSubmitted, event::JobHeld, event::JobReleased,
                 event::JobStopped, event::JobResumed, event::CheckpointPinned,
                 event::NodeAdministered, event::AttemptPlaced, event::JobInfeasible,
                 event::WorkerRegistered, event::TaskReported, event::WorkerLeft,
                 event::WorkerSuspect, event::WorkerHeard, event::WorkerLost,
                 event::CheckpointOpened, event::ShardSealed, event::CheckpointDamaged,
                 event::CheckpointVerified, event::CheckpointFilesDeleted, event::TimerFired,
                 event::RanksDiagnosed, event::StacksReported>;

// "JobSubmitted", for logs and traces.
const char* EventName(const Event& event);

}  // namespace heddle::state
