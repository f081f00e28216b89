// What the rows of the tables do and ask, and helpers that several events share. Internal to
// coordinator/state.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "coordinator/state/decision.h"
#include "coordinator/state/transitions.h"

namespace heddle::state {

// ---- guards of jobs ----
bool DependenciesMet(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool DependencyNever(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool AttemptSucceeded(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool AttemptLeft(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool MayRetry(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool StoppingForPause(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool StoppingForCancel(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);
bool StoppingForTime(const Decision& d, const heddle::v1::JobRecord& job, const JobStep& step);

// ---- actions of jobs ----
void Queue(Decision& d, const JobStep& step);
void Wait(Decision& d, const JobStep& step);
void Hold(Decision& d, const JobStep& step);
void PauseIdle(Decision& d, const JobStep& step);
void CancelIdle(Decision& d, const JobStep& step);
void CancelNever(Decision& d, const JobStep& step);
void Place(Decision& d, const JobStep& step);
void PauseActive(Decision& d, const JobStep& step);
void CancelActive(Decision& d, const JobStep& step);
void StopForTime(Decision& d, const JobStep& step);
void FinishSucceeded(Decision& d, const JobStep& step);
void Requeue(Decision& d, const JobStep& step);
void BackOff(Decision& d, const JobStep& step);
void FinishFailed(Decision& d, const JobStep& step);
void FinishPaused(Decision& d, const JobStep& step);
void FinishCancelled(Decision& d, const JobStep& step);
void FinishTimedOut(Decision& d, const JobStep& step);
void FinishInfeasible(Decision& d, const JobStep& step);
void ResumePaused(Decision& d, const JobStep& step);
void ResumeDone(Decision& d, const JobStep& step);

// ---- guards of attempts ----
bool AllAcknowledged(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool AnyRefused(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool AnyFailed(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool AllReady(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool AllJoined(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool AllClean(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool AllFinal(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool Collecting(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);
bool StopsHarder(const Decision& d, const heddle::v1::AttemptRecord& a, const AttemptStep& s);

// ---- actions of attempts ----
void StartPreparing(Decision& d, const AttemptStep& step);
void StopNeverStarted(Decision& d, const AttemptStep& step);
void FailPreparing(Decision& d, const AttemptStep& step);
void StartRendezvous(Decision& d, const AttemptStep& step);
void FailRendezvous(Decision& d, const AttemptStep& step);
void StartRunning(Decision& d, const AttemptStep& step);
void FailByRank(Decision& d, const AttemptStep& step);
void FailHung(Decision& d, const AttemptStep& step);
void StopOnRequest(Decision& d, const AttemptStep& step);
void KillNow(Decision& d, const AttemptStep& step);
void FenceLost(Decision& d, const AttemptStep& step);
void FenceUnkillable(Decision& d, const AttemptStep& step);
void EndSucceeded(Decision& d, const AttemptStep& step);
void EndStopped(Decision& d, const AttemptStep& step);
void EndFenced(Decision& d, const AttemptStep& step);

// ---- causes of an attempt ----
// The root candidate among the ends of its ranks (A8): earliest that is no peer failure.
heddle::v1::CauseRecord RootCause(const Decision& d, const heddle::v1::AttemptRecord& attempt);
// Of ends that come later than the collecting time: one that no order of ours makes, a shim killed
// or a task gone. A peer's complaint, all that was known before, is then not the cause.
std::optional<heddle::v1::CauseRecord> LateRoot(const Decision& d,
                                                const heddle::v1::AttemptRecord& attempt);
// Whether a job may have another attempt after `attempt` (J9, J10), and what it counts as then.
struct Verdict {
  bool retry = false;
  std::string code;  // of the end, if not
  std::string text;
  bool burns = false;
  uint32_t failures = 0;  // n afterwards
};
Verdict Judge(const Decision& d, const heddle::v1::JobRecord& job,
              const heddle::v1::AttemptRecord& attempt);
// Draws what an ended attempt says about its job into the job's record: best step, running time.
void Absorb(Decision& d, AttemptId attempt);
void Blame(Decision& d, JobId job, const heddle::v1::CauseRecord& cause);
// The step an attempt is known to have reached.
uint64_t StepReached(const Decision& d, const heddle::v1::AttemptRecord& attempt);

// ---- findings (training-runtime.md 17, 18.3) ----
// Into the attempt's record unless it has it already; false then.
bool AddFinding(Decision& d, AttemptId attempt, heddle::v1::FindingRecord finding);
// What ends of ranks that a report brought tell besides their cause: memory that ran out, numbers
// that are not finite.
void FindFromExits(Decision& d, AttemptId attempt, const heddle::v1::TaskReport& report);
// The newest finding of a hang or a mismatch; nullptr if there is none.
const heddle::v1::FindingRecord* NewestStandstill(const heddle::v1::AttemptRecord& attempt);

// ---- commands to workers ----
void SendAssign(Decision& d, AttemptId attempt, const heddle::v1::TaskRecord& task);
void SendStart(Decision& d, AttemptId attempt, const heddle::v1::TaskRecord& task);
void SendStop(Decision& d, AttemptId attempt, const heddle::v1::TaskRecord& task);
void SendKillFenced(Decision& d, const std::string& worker, Fence fence, uint32_t task, Fence now);
void SendCollectStacks(Decision& d, AttemptId attempt);
void SendForget(Decision& d, const std::string& worker, Fence fence, uint32_t task);
// What the task's worker still has to hear, by the attempt's state; false if nothing (resend, X2).
bool Remind(Decision& d, AttemptId attempt, const heddle::v1::TaskRecord& task);

// ---- shared ----
bool IsCommand(const heddle::v1::JobRecord& job);
bool IsLive(heddle::v1::AttemptState state);  // not FENCING, not ENDED
// The newest attempt of a job if it is live, else nothing.
std::optional<AttemptId> LiveAttempt(const Decision& d, JobId job);
// Raises the job's fence to one nobody owns if it still is `owned` (L2).
void RaiseFence(Decision& d, JobId job, Fence owned);
// K4 for every open checkpoint of an ended or fenced attempt.
void AbortCheckpoints(Decision& d, AttemptId attempt, const char* why);
void AbortCheckpoint(Decision& d, const CheckpointKey& key, const char* why);
// Restore candidates for a job's next attempt, best first.
std::vector<CheckpointKey> RestoreFor(const Decision& d, const heddle::v1::JobRecord& job);
// Tasks booked on a worker that are not final yet, this decision included.
std::vector<TaskKey> BookedOn(const Decision& d, const std::string& worker);
// DRAINING becomes DRAINED with the end of the node's last task.
void CheckDrained(Decision& d, const std::string& worker);
// A task becomes GONE: its worker cannot have it (T6, A14). Steps its attempt.
void MarkGone(Decision& d, AttemptId attempt, uint32_t task, const char* why);
// Features of a config that no code stands behind yet, or that make no sense here.
Status Admit(const heddle::v1::RunConfig& config);

// ---- handlers of events; each returns the status for the caller ----
Status On(Decision& d, const event::CoordinatorStarted& e);
Status On(Decision& d, const event::JobSubmitted& e);
Status On(Decision& d, const event::JobHeld& e);
Status On(Decision& d, const event::JobReleased& e);
Status On(Decision& d, const event::JobStopped& e);
Status On(Decision& d, const event::JobResumed& e);
Status On(Decision& d, const event::CheckpointPinned& e);
Status On(Decision& d, const event::NodeAdministered& e);
Status On(Decision& d, const event::AttemptPlaced& e);
Status On(Decision& d, const event::JobInfeasible& e);
Status On(Decision& d, const event::WorkerRegistered& e);
Status On(Decision& d, const event::TaskReported& e);
Status On(Decision& d, const event::WorkerLeft& e);
Status On(Decision& d, const event::WorkerSuspect& e);
Status On(Decision& d, const event::WorkerHeard& e);
Status On(Decision& d, const event::WorkerLost& e);
Status On(Decision& d, const event::RanksDiagnosed& e);
Status On(Decision& d, const event::StacksReported& e);
Status On(Decision& d, const event::CheckpointOpened& e);
Status On(Decision& d, const event::ShardSealed& e);
Status On(Decision& d, const event::CheckpointDamaged& e);
Status On(Decision& d, const event::CheckpointVerified& e);
Status On(Decision& d, const event::CheckpointFilesDeleted& e);
Status On(Decision& d, const event::TimerFired& e);

// OK if `session` is the worker's and it may speak; else ABORTED, and the worker is told to
// register anew (L10).
Status CheckSession(Decision& d, const std::string& worker, uint64_t session);
// A report of a task whose attempt and worker were found to match; shared by TaskReported and X2.
void TakeReport(Decision& d, AttemptId attempt, const heddle::v1::TaskReport& report);
// L8 for every live attempt with peer evidence and a SUSPECT worker.
void Corroborate(Decision& d, AttemptId attempt);

}  // namespace heddle::state
