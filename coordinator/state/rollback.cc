#include "coordinator/state/rollback.h"

#include <algorithm>

#include "checkpoint/catalog/lineage.h"
#include "coordinator/state/decision.h"
#include "coordinator/state/names.h"

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

RollbackLimit LimitOf(const v1::AttemptRecord& attempt, const v1::RankOutcome& words) {
  const uint64_t start = attempt.start_step();
  uint64_t step = words.rollback_to_step();
  // Not one good step since the restore: what it restored is bad itself.
  if (start > 0 && step <= start) step = std::min(step, start - 1);
  return {Fence{attempt.fence()}, step};
}

// Committed once, with its files or without.
bool WasCommitted(const v1::CheckpointRecord& record) {
  return record.state() == v1::CHECKPOINT_STATE_COMMITTED ||
         record.state() == v1::CHECKPOINT_STATE_EXPIRED ||
         record.state() == v1::CHECKPOINT_STATE_DELETED;
}

// The checkpoints of `from` up to `at_most` that nothing has left behind.
std::vector<const v1::CheckpointRecord*> OnTheWay(const Decision& d, JobId from, uint64_t at_most,
                                                  const std::vector<RollbackLimit>& limits) {
  std::vector<const v1::CheckpointRecord*> found;
  for (const v1::CheckpointRecord* one : d.Checkpoints(from)) {
    if (WasCommitted(*one) && one->step() <= at_most && !IsLeftBehind(limits, *one)) {
      found.push_back(one);
    }
  }
  return found;
}

// What OnTheWay finds of the job and, behind it, of the one that it was resumed from.
std::vector<std::vector<const v1::CheckpointRecord*>> Ways(const Decision& d,
                                                           const v1::JobRecord& job,
                                                           std::vector<RollbackLimit> limits) {
  std::vector<std::vector<const v1::CheckpointRecord*>> ways = {
      OnTheWay(d, JobId{job.id()}, UINT64_MAX, limits)};
  if (job.has_resume_from()) {
    const JobId parent{job.resume_from().job()};
    const std::vector<RollbackLimit> its = RollbackLimits(d.state(), parent);
    limits.insert(limits.end(), its.begin(), its.end());
    ways.push_back(OnTheWay(d, parent, job.resume_from().step(), limits));
  }
  return ways;
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
      limits.push_back(LimitOf(*attempt, *words));
    }
  }
  return limits;
}

bool IsLeftBehind(const std::vector<RollbackLimit>& limits, const v1::CheckpointRecord& record) {
  return std::any_of(limits.begin(), limits.end(), [&record](const RollbackLimit& limit) {
    return record.fence() <= limit.fence.value && record.step() > limit.step;
  });
}

Status CheckResumeFrom(const State& state, const v1::CheckpointRecord& record) {
  const CheckpointKey key = KeyOf(record);
  if (!checkpoint::IsGood(record)) {
    return FailedPrecondition(Str("checkpoint ", ToText(key), " is ",
                                  record.damaged() ? "damaged" : Name(record.state())));
  }
  if (IsLeftBehind(RollbackLimits(state, key.job), record)) {
    return FailedPrecondition(
        Str("checkpoint ", ToText(key), " was left behind by a rollback of job ", key.job,
            ": take an older one or one made since (", key.job,
            "@latest is the newest that is sound); its weights can still be exported"));
  }
  return OkStatus();
}

std::vector<const v1::CheckpointRecord*> Restorable(const Decision& d, const v1::JobRecord& job,
                                                    const std::vector<RollbackLimit>& limits) {
  std::vector<const v1::CheckpointRecord*> all;
  for (std::vector<const v1::CheckpointRecord*>& way : Ways(d, job, limits)) {
    std::erase_if(way, [](const auto* one) { return !checkpoint::IsGood(*one); });
    std::sort(way.begin(), way.end(), [](const auto* a, const auto* b) {
      return std::pair(a->step(), a->fence()) > std::pair(b->step(), b->fence());
    });
    all.insert(all.end(), way.begin(), way.end());
  }
  return all;
}

std::string NothingToRollBackTo(const Decision& d, const v1::JobRecord& job,
                                const v1::AttemptRecord& attempt) {
  const v1::RankOutcome* words = WordsOf(d.Tasks(IdOf(attempt)));
  if (words == nullptr) {
    return "";
  }
  const RollbackLimit limit = LimitOf(attempt, *words);
  std::vector<RollbackLimit> limits = RollbackLimits(d.state(), JobId{job.id()});
  limits.push_back(limit);
  if (!Restorable(d, job, limits).empty()) {
    return "";
  }
  std::string lost;
  for (const std::vector<const v1::CheckpointRecord*>& way : Ways(d, job, limits)) {
    for (const v1::CheckpointRecord* one : way) {
      lost = Str("checkpoint ", ToText(KeyOf(*one)), " is ",
                 one->damaged() ? "damaged" : Name(one->state()));
    }
  }
  if (lost.empty() && job.has_resume_from()) {
    lost = Str("the one it was resumed from, ", JobId{job.resume_from().job()}, "@",
               job.resume_from().step(), ", is newer");
  }
  return lost.empty() ? ""
                      : Str("no checkpoint of step ", limit.step, " or before is left (", lost,
                            "), and starting at step 0 would lose more than the rollback asks for: "
                            "heddle resume ",
                            JobId{job.id()}, " does start there; last: ", attempt.cause().detail());
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
    const RollbackLimit limit = LimitOf(attempt, *words);
    std::vector<RollbackLimit> limits = RollbackLimits(d.state(), id.job);
    limits.push_back(limit);
    *job.add_skipped() = words->skip();
    d.Note(id.job, "JOB_ROLLED_BACK",
           Str("from step ", attempt.cause().step(), " to ", limit.step, " or before",
               Restorable(d, job, limits).empty() ? ", which is step 0" : "",
               ", without sequences ", words->skip().first(), " to ",
               words->skip().first() + std::max<uint64_t>(words->skip().count(), 1) - 1));
  }
}

}  // namespace heddle::state
