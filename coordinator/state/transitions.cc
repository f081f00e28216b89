#include "coordinator/state/transitions.h"

#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

constexpr v1::JobState kHeld = v1::JOB_STATE_HELD;
constexpr v1::JobState kWaiting = v1::JOB_STATE_WAITING;
constexpr v1::JobState kQueued = v1::JOB_STATE_QUEUED;
constexpr v1::JobState kActive = v1::JOB_STATE_ACTIVE;
constexpr v1::JobState kBackoff = v1::JOB_STATE_BACKOFF;
constexpr v1::JobState kPaused = v1::JOB_STATE_PAUSED;
constexpr v1::JobState kStoppingJob = v1::JOB_STATE_STOPPING;
constexpr v1::JobState kDone = v1::JOB_STATE_DONE;

// J1 to J3 and J25 make a job and stand in On(JobSubmitted). J23 (elastic) has no code yet. J16
// keeps open dependencies of a job that was paused while WAITING.
// clang-format off
constexpr JobRow kJobRows[] = {
    {"J4",  In(kHeld), JobInput::kRelease, DependenciesMet, kQueued, Queue},
    {"J4",  In(kHeld), JobInput::kRelease, nullptr, kWaiting, Wait},
    {"J5",  In(kWaiting), JobInput::kReconsider, DependenciesMet, kQueued, Queue},
    {"J6",  In(kWaiting), JobInput::kReconsider, DependencyNever, kDone, CancelNever},
    {"J7",  In(kQueued), JobInput::kPlaced, nullptr, kActive, Place},
    {"J8",  In(kActive, kStoppingJob), JobInput::kAttemptEnded, AttemptSucceeded, kDone, FinishSucceeded},
    {"J11", In(kActive), JobInput::kAttemptEnded, AttemptLeft, kQueued, Requeue},
    {"J9",  In(kActive), JobInput::kAttemptEnded, MayRetry, kBackoff, BackOff},
    {"J10", In(kActive), JobInput::kAttemptEnded, nullptr, kDone, FinishFailed},
    {"J12", In(kBackoff), JobInput::kBackoffOver, nullptr, kQueued, Queue},
    {"J13", In(kQueued, kBackoff, kWaiting), JobInput::kHold, nullptr, kHeld, Hold},
    {"J13", In(kQueued, kBackoff, kWaiting), JobInput::kPause, nullptr, kPaused, PauseIdle},
    {"J14", In(kActive), JobInput::kPause, nullptr, kStoppingJob, PauseActive},
    {"J15", In(kStoppingJob), JobInput::kAttemptEnded, StoppingForPause, kPaused, FinishPaused},
    {"J16", In(kPaused), JobInput::kResume, DependenciesMet, kQueued, ResumePaused},
    {"J16", In(kPaused), JobInput::kResume, nullptr, kWaiting, ResumePaused},
    {"J17", In(kHeld, kWaiting, kQueued, kBackoff, kPaused), JobInput::kCancel, nullptr, kDone, CancelIdle},
    {"J18", In(kActive), JobInput::kCancel, nullptr, kStoppingJob, CancelActive},
    {"J18", In(kStoppingJob), JobInput::kCancel, StoppingForPause, kStoppingJob, CancelActive},
    {"J19", In(kStoppingJob), JobInput::kAttemptEnded, StoppingForCancel, kDone, FinishCancelled},
    {"J20", In(kActive), JobInput::kTimeLimit, nullptr, kStoppingJob, StopForTime},
    {"J21", In(kStoppingJob), JobInput::kAttemptEnded, StoppingForTime, kDone, FinishTimedOut},
    {"J22", In(kQueued), JobInput::kInfeasible, nullptr, kDone, FinishInfeasible},
    {"J24", In(kDone), JobInput::kResume, nullptr, kQueued, ResumeDone},
};

constexpr v1::AttemptState kAllocated = v1::ATTEMPT_STATE_ALLOCATED;
constexpr v1::AttemptState kPreparing = v1::ATTEMPT_STATE_PREPARING;
constexpr v1::AttemptState kRendezvous = v1::ATTEMPT_STATE_RENDEZVOUS;
constexpr v1::AttemptState kRunning = v1::ATTEMPT_STATE_RUNNING;
constexpr v1::AttemptState kStopping = v1::ATTEMPT_STATE_STOPPING;
constexpr v1::AttemptState kFencing = v1::ATTEMPT_STATE_FENCING;
constexpr v1::AttemptState kEnded = v1::ATTEMPT_STATE_ENDED;

// A15 and A16 concern reports of fenced tasks and stand in On(TaskReported) and registration.
constexpr AttemptRow kAttemptRows[] = {
    {"A2",  In(kAllocated), AttemptInput::kTasks, AnyRefused, kStopping, StopNeverStarted},
    {"A2",  In(kAllocated), AttemptInput::kDeadline, nullptr, kStopping, StopNeverStarted},
    {"A4",  In(kAllocated, kPreparing), AttemptInput::kTasks, AnyFailed, kStopping, FailPreparing},
    {"A1",  In(kAllocated), AttemptInput::kTasks, AllAcknowledged, kPreparing, StartPreparing},
    {"A3",  In(kPreparing), AttemptInput::kTasks, AllReady, kRendezvous, StartRendezvous},
    {"A4",  In(kPreparing), AttemptInput::kDeadline, nullptr, kStopping, FailPreparing},
    {"A8",  In(kRendezvous, kRunning), AttemptInput::kTasks, AnyFailed, kStopping, FailByRank},
    {"A5",  In(kRendezvous), AttemptInput::kTasks, AllJoined, kRunning, StartRunning},
    {"A6",  In(kRendezvous), AttemptInput::kDeadline, nullptr, kStopping, FailRendezvous},
    {"A7",  In(kRunning), AttemptInput::kTasks, AllClean, kEnded, EndSucceeded},
    {"A9",  In(kRunning), AttemptInput::kHang, nullptr, kStopping, FailHung},
    {"A10", In(kAllocated, kPreparing, kRendezvous, kRunning), AttemptInput::kStop, nullptr, kStopping, StopOnRequest},
    {"A10", In(kStopping), AttemptInput::kStop, StopsHarder, kStopping, KillNow},
    {"A11", In(kAllocated, kPreparing, kRendezvous, kRunning, kStopping), AttemptInput::kWorkerLost, nullptr, kFencing, FenceLost},
    {"A12", In(kStopping), AttemptInput::kTasks, AllFinal, kEnded, EndStopped},
    {"A8",  In(kStopping), AttemptInput::kDeadline, Collecting, kStopping, KillNow},
    {"A13", In(kStopping), AttemptInput::kDeadline, nullptr, kFencing, FenceUnkillable},
    {"A14", In(kFencing), AttemptInput::kTasks, AllFinal, kEnded, EndFenced},
};
// clang-format on

}  // namespace

Table<JobRow> JobTable() { return {kJobRows, sizeof(kJobRows) / sizeof(kJobRows[0])}; }
Table<AttemptRow> AttemptTable() {
  return {kAttemptRows, sizeof(kAttemptRows) / sizeof(kAttemptRows[0])};
}

bool StepJob(Decision& d, const JobStep& step) {
  const v1::JobRecord* job = d.job(step.job);
  HEDDLE_CHECK(job != nullptr, "step of an unknown job");
  for (const JobRow& row : JobTable()) {
    if (row.input == step.input && (row.from & In(job->state())) != 0 &&
        (row.guard == nullptr || row.guard(d, *job, step))) {
      d.Edit(step.job).set_state(row.to);
      row.action(d, step);
      return true;
    }
  }
  return false;
}

namespace {

bool TakeAttemptRow(Decision& d, const AttemptStep& step) {
  const v1::AttemptRecord* attempt = d.attempt(step.attempt);
  HEDDLE_CHECK(attempt != nullptr, "step of an unknown attempt");
  for (const AttemptRow& row : AttemptTable()) {
    if (row.input == step.input && (row.from & In(attempt->state())) != 0 &&
        (row.guard == nullptr || row.guard(d, *attempt, step))) {
      d.Edit(step.attempt).set_state(row.to);
      row.action(d, step);
      return true;
    }
  }
  return false;
}

}  // namespace

bool StepAttempt(Decision& d, const AttemptStep& step) {
  if (!TakeAttemptRow(d, step)) {
    return false;
  }
  AttemptStep again;
  again.attempt = step.attempt;
  // Each row moves towards ENDED, so this ends; the bound is for our own mistakes.
  for (int i = 0; i < 16; ++i) {
    if (!TakeAttemptRow(d, again)) {
      return true;
    }
  }
  HEDDLE_CHECK(false, "attempt ", step.attempt, " does not settle");
}

}  // namespace heddle::state
