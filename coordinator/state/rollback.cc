#include "coordinator/state/rollback.h"

#include <algorithm>

#include "coordinator/state/decision.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

bool IsRollback(const v1::RankOutcome& exit) {
  return exit.category() == "ROLLBACK" && exit.has_rollback_to_step();
}

// The ranks agree; of words that differ nonetheless those that go furthest back.
template <typename Tasks>
const v1::RankOutcome* WordsOf(const Tasks& tasks) {
  const v1::RankOutcome* words = nullptr;
  for (const auto& task : tasks) {
    for (const v1::RankOutcome& exit : task->exits()) {
      if (IsRollback(exit) &&
          (words == nullptr || exit.rollback_to_step() < words->rollback_to_step())) {
        words = &exit;
      }
    }
  }
  return words;
}

}  // namespace

std::vector<RollbackLimit> RollbackLimits(const State& state, JobId job) {
  std::vector<RollbackLimit> limits;
  const v1::JobRecord* record = state.job(job);
  if (record == nullptr || record->skipped().empty()) {
    return limits;  // the usual case, without a walk over all attempts
  }
  for (const AttemptPtr& attempt : state.AttemptsOf(job)) {
    if (attempt->cause().category() != "ROLLBACK") {
      continue;
    }
    if (const v1::RankOutcome* words = WordsOf(state.TasksOf(job, attempt->number()));
        words != nullptr) {
      limits.push_back({Fence{attempt->fence()}, words->rollback_to_step()});
    }
  }
  return limits;
}

bool IsLeftBehind(const std::vector<RollbackLimit>& limits, const v1::CheckpointRecord& record) {
  return std::any_of(limits.begin(), limits.end(), [&record](const RollbackLimit& limit) {
    return record.fence() <= limit.fence.value && record.step() > limit.step;
  });
}

uint32_t RollbacksLately(const v1::JobRecord& job, uint64_t step, uint64_t window) {
  return static_cast<uint32_t>(std::count_if(job.rollback_steps().begin(),
                                             job.rollback_steps().end(),
                                             [&](uint64_t one) { return one + window > step; }));
}

void TakeRollback(Decision& d, AttemptId id) {
  const v1::AttemptRecord& attempt = *d.attempt(id);
  if (attempt.cause().category() != "ROLLBACK") {
    return;
  }
  v1::JobRecord& job = d.Edit(id.job);
  // Counted with or without words: the budget bounds it.
  job.add_rollback_steps(attempt.cause().step());
  const uint64_t window = d.policy().rollback_window_steps;
  auto& steps = *job.mutable_rollback_steps();
  steps.erase(std::remove_if(steps.begin(), steps.end(),
                             [&](uint64_t one) { return one + window <= attempt.cause().step(); }),
              steps.end());
  if (const v1::RankOutcome* words = WordsOf(d.Tasks(id)); words != nullptr) {
    *job.add_skipped() = words->skip();
    d.Note(id.job, "JOB_ROLLED_BACK",
           Str("from step ", attempt.cause().step(), " to ", words->rollback_to_step(),
               " or before, without sequences ", words->skip().first(), " to ",
               words->skip().first() + std::max<uint64_t>(words->skip().count(), 1) - 1));
  }
}

}  // namespace heddle::state
