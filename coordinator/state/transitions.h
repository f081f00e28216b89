// The tables of control-plane 4.1 and 4.2 as data: rows (from, input, guard) -> (to, action), in
// the order in which they are tried. What no row allows is refused. Internal to coordinator/state;
// tests/coordinator/state prints and asserts the tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "coordinator/state/decision.h"
#include "coordinator/state/event.h"

namespace heddle::state {

// A non-owning view of a table.
template <typename Row>
struct Table {
  const Row* rows = nullptr;
  size_t size = 0;
  const Row* begin() const { return rows; }
  const Row* end() const { return rows + size; }
};

template <typename... States>
constexpr uint32_t In(States... states) {
  return ((uint32_t{1} << states) | ...);
}

// ---- jobs (J1 to J25) ----

enum class JobInput {
  kRelease,
  kHold,
  kPause,
  kCancel,
  kResume,
  kReconsider,  // a dependency ended, or the start time came
  kPlaced,
  kAttemptEnded,  // or FENCING, for kind `train`
  kBackoffOver,
  kTimeLimit,
  kInfeasible,
};
inline constexpr int kJobInputCount = 11;

struct JobStep {
  JobId job;
  JobInput input = JobInput::kReconsider;
  std::string text;                               // the user's or the scheduler's words
  std::optional<int64_t> grace_ms;                // kPause, kCancel, kTimeLimit
  const event::AttemptPlaced* placed = nullptr;   // kPlaced
  std::optional<AttemptId> attempt;               // kAttemptEnded
  const heddle::v1::RunConfig* config = nullptr;  // kResume with overrides
};

struct JobRow {
  const char* name;
  uint32_t from;  // In(JOB_STATE_...)
  JobInput input;
  bool (*guard)(const Decision&, const heddle::v1::JobRecord&, const JobStep&);  // nullptr: always
  heddle::v1::JobState to;
  void (*action)(Decision&, const JobStep&);  // runs with the state already `to`
};
Table<JobRow> JobTable();

// Takes the first row that fits. False, and nothing changed, if there is none.
bool StepJob(Decision& d, const JobStep& step);

// ---- attempts (A1 to A14) ----

enum class AttemptInput {
  kTasks,       // something about a task changed; also tried again after every row
  kDeadline,    // deadline_ms passed
  kStop,        // preempt, pause, cancel, time limit, drain
  kWorkerLost,  // LOST or corroborated
  kHang,        // no progress for hang_kill
};
inline constexpr int kAttemptInputCount = 5;

struct AttemptStep {
  AttemptId attempt;
  AttemptInput input = AttemptInput::kTasks;
  heddle::v1::StopReason reason = heddle::v1::STOP_REASON_NONE;  // kStop
  int64_t grace_ms = 0;                                          // kStop
  std::string text;
  std::string worker;  // kWorkerLost
};

struct AttemptRow {
  const char* name;
  uint32_t from;  // In(ATTEMPT_STATE_...)
  AttemptInput input;
  bool (*guard)(const Decision&, const heddle::v1::AttemptRecord&, const AttemptStep&);
  heddle::v1::AttemptState to;
  void (*action)(Decision&, const AttemptStep&);
};
Table<AttemptRow> AttemptTable();

// As StepJob; after a row fits, kTasks rows are tried until none does.
bool StepAttempt(Decision& d, const AttemptStep& step);

}  // namespace heddle::state
