// What the end of an attempt means: root cause, retry or not, blame (control-plane 4.6).
#include <algorithm>

#include "coordinator/state/actions.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/names.h"
#include "coordinator/state/rollback.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

// W5: at most 5 % of the nodes, but at least one, may be in quarantine.
bool QuarantineHasRoom(const Decision& d) {
  size_t nodes = 0;
  size_t quarantined = 0;
  for (const auto& [id, entry] : d.state().nodes()) {
    const v1::WorkerRecord* record = d.worker(id);
    if (record != nullptr) {
      ++nodes;
      quarantined += record->health() == v1::WORKER_HEALTH_QUARANTINED ? 1 : 0;
    }
  }
  return quarantined < std::max<size_t>(1, nodes / 20);
}

v1::CauseRecord TaskCause(const v1::TaskRecord& task) {
  v1::CauseRecord cause;
  if (task.state() == v1::TASK_STATE_GONE) {
    cause.set_code("TASK_GONE");
    cause.set_detail(task.gone_reason());
  } else {
    cause.set_code(task.acknowledged() ? "EXIT_NONZERO" : "TASK_REFUSED");
    cause.set_detail(task.detail());
  }
  cause.set_category(FindCode(cause.code())->category);
  cause.set_node(task.worker());
  return cause;
}

bool SameFailure(const v1::CauseRecord& last, const v1::CauseRecord& now) {
  return last.code() == now.code() && last.step() == now.step() &&
         now.code() != "KILLED_BY_SIGNAL" && now.code() != "CONTROL_CLOSED";
}

}  // namespace

v1::CauseRecord RootCause(const Decision& d, const v1::AttemptRecord& attempt) {
  const v1::RankOutcome* root = nullptr;
  const v1::RankOutcome* peer = nullptr;
  std::string root_node;
  std::string peer_node;
  const v1::TaskRecord* broken = nullptr;
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    bool told = false;
    for (const v1::RankOutcome& exit : task->exits()) {
      if (IsClean(exit)) {
        continue;
      }
      told = true;
      const bool is_peer = IsPeerFailure(exit);
      const v1::RankOutcome*& slot = is_peer ? peer : root;
      if (slot == nullptr || exit.at() < slot->at()) {
        slot = &exit;
        (is_peer ? peer_node : root_node) = task->worker();
      }
    }
    if (!told && broken == nullptr &&
        (task->state() == v1::TASK_STATE_GONE || !task->detail().empty())) {
      broken = task;
    }
  }
  if (root != nullptr) {
    return CauseOfExit(*root, root_node);
  }
  if (broken != nullptr) {
    return TaskCause(*broken);
  }
  if (peer != nullptr) {
    return CauseOfExit(*peer, peer_node);
  }
  v1::CauseRecord unknown;
  unknown.set_code("EXIT_NONZERO");
  unknown.set_category("UNKNOWN");
  unknown.set_detail("a task ended without telling why");
  return unknown;
}

std::optional<v1::CauseRecord> LateRoot(const Decision& d, const v1::AttemptRecord& attempt) {
  const v1::RankOutcome* root = nullptr;
  std::string node;
  const v1::TaskRecord* gone = nullptr;
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    if (task->state() == v1::TASK_STATE_GONE && gone == nullptr) {
      gone = task;
    }
    for (const v1::RankOutcome& exit : task->exits()) {
      if (exit.category() == "CONTROL_PLANE" && (root == nullptr || exit.at() < root->at())) {
        root = &exit;
        node = task->worker();
      }
    }
  }
  if (root != nullptr) {
    return CauseOfExit(*root, node);
  }
  return gone == nullptr ? std::nullopt : std::optional(TaskCause(*gone));
}

uint64_t StepReached(const Decision& d, const v1::AttemptRecord& attempt) {
  uint64_t step = std::max(attempt.last_step(), attempt.start_step());
  if (const Progress* known = d.state().progress(Fence{attempt.fence()}); known != nullptr) {
    step = std::max(step, known->step);
  }
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    for (const v1::RankOutcome& exit : task->exits()) {
      step = std::max<uint64_t>(step, exit.step());
    }
  }
  return step;
}

Verdict Judge(const Decision& d, const v1::JobRecord& job, const v1::AttemptRecord& attempt) {
  const v1::CauseRecord& cause = attempt.cause();
  const CategoryRule& rule = RuleOf(cause.category());
  Verdict verdict;
  verdict.burns = rule.burns_budget;
  const bool progressed = attempt.progressed() || attempt.last_step() > job.best_step();
  verdict.failures = progressed ? 0 : job.failures() + (rule.burns_budget ? 1 : 0);
  if (!rule.retry) {
    verdict.code = cause.code();
    verdict.text = Str(cause.detail(), " (", cause.category(), ": another attempt cannot help)");
    return verdict;
  }
  const uint64_t window = d.policy().rollback_window_steps;
  if (cause.category() == "ROLLBACK" &&
      RollbacksLately(job, cause.step(), window) >= d.policy().rollbacks_max) {
    verdict.code = "NO_ROLLBACKS";
    verdict.text = Str("more than ", d.policy().rollbacks_max, " rollbacks in ", window,
                       " steps; last: ", cause.detail());
    return verdict;
  }
  if (cause.category() == "ROLLBACK") {
    if (std::string text = NothingToRollBackTo(d, job, attempt); !text.empty()) {
      verdict.code = "NO_CHECKPOINT";
      verdict.text = std::move(text);
      return verdict;
    }
  }
  if (!rule.burns_budget) {
    verdict.retry = true;
    return verdict;
  }
  const uint32_t budget = static_cast<uint32_t>(job.config().schedule().max_restarts());
  if (job.restarts() >= budget) {
    verdict.code = "NO_BUDGET";
    verdict.text = Str("used all ", budget, " restarts; last: ", cause.detail());
    return verdict;
  }
  // A command has no steps to tell progress by: only its budget ends it.
  if (!IsCommand(job)) {
    if (verdict.failures >= d.policy().failures_without_progress_max) {
      verdict.code = "NO_PROGRESS";
      verdict.text =
          Str(verdict.failures, " attempts in a row made no step; last: ", cause.detail());
      return verdict;
    }
    if (!progressed && job.has_last_failure() && SameFailure(job.last_failure(), cause)) {
      verdict.code = "SAME_FAILURE";
      verdict.text = Str("twice at step ", cause.step(), ": ", cause.detail());
      return verdict;
    }
  }
  verdict.retry = true;
  return verdict;
}

void Absorb(Decision& d, AttemptId id) {
  const v1::AttemptRecord& attempt = *d.attempt(id);
  v1::JobRecord& job = d.Edit(id.job);
  job.set_best_step(std::max(job.best_step(), attempt.last_step()));
  if (attempt.running_ms() > 0) {
    const int64_t until = attempt.ended_ms() > 0 ? attempt.ended_ms() : d.now().ms;
    job.set_run_time_ms(job.run_time_ms() + std::max<int64_t>(0, until - attempt.running_ms()));
  }
  d.Edit(id).set_counted(true);
}

void Blame(Decision& d, JobId job_id, const v1::CauseRecord& cause) {
  if (cause.node().empty() || !RuleOf(cause.category()).blames_node) {
    return;
  }
  v1::JobRecord& job = d.Edit(job_id);
  job.set_avoid_node(cause.node());
  job.set_avoid_until_ms(d.now().ms + d.policy().avoid_node_ms);
  // Silence is judged by W2's probation; only faults of the machine lead to quarantine.
  if (cause.category() == "NODE_LOST" || d.worker(cause.node()) == nullptr) {
    return;
  }
  v1::WorkerRecord& worker = d.Edit(cause.node());
  auto& times = *worker.mutable_blamed_ms();
  times.erase(
      std::remove_if(times.begin(), times.end(),
                     [&d](int64_t at) { return at < d.now().ms - d.policy().blame_window_ms; }),
      times.end());
  worker.add_blamed_ms(d.now().ms);
  if (static_cast<uint32_t>(worker.blamed_ms_size()) >= d.policy().blames_to_quarantine &&
      worker.health() != v1::WORKER_HEALTH_QUARANTINED && QuarantineHasRoom(d)) {
    worker.set_health(v1::WORKER_HEALTH_QUARANTINED);
    worker.set_health_reason(
        Str(worker.blamed_ms_size(), " failures in 24 h, last ", cause.code()));
    worker.set_quarantined_until_ms(d.now().ms + d.policy().quarantine_ms);
    d.NoteWorker(worker.id(), "NODE_QUARANTINED", worker.health_reason());
  }
}

}  // namespace heddle::state
