#include "coordinator/state/invariants.h"

#include <algorithm>
#include <map>
#include <set>

#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"
#include "coordinator/state/rollback.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

using Problems = std::vector<std::string>;

// I1: of a job's checkpoints the higher step of a later commit has no lower fence. Commit order is
// created_at; the events tell it exactly (CheckStep), the records only to the millisecond.
void CheckFences(const State& state, Problems& problems) {
  for (const auto& [id, job] : state.jobs()) {
    uint64_t highest = 0;
    for (const CheckpointPtr& one : state.CheckpointsOf(JobId{id})) {
      highest = std::max<uint64_t>(highest, one->fence());
      if (one->world_size() == 0 || one->dir().empty()) {
        problems.push_back(Str("checkpoint ", ToText(KeyOf(*one)), " has no folder"));
      }
    }
    if (highest > job->current_fence()) {
      problems.push_back(Str("I2: job ", JobId{id}, " has a checkpoint of fence ", highest,
                             " above its current ", job->current_fence()));
    }
    if (Fence{job->current_fence()}.sequence() > state.meta().fence_seq() ||
        Fence{job->current_fence()}.term().value > state.meta().term()) {
      problems.push_back(Str("I7: job ", JobId{id}, " has a fence from the future"));
    }
  }
}

// I3 and the ties between jobs, attempts and fences.
void CheckAttempts(const State& state, Problems& problems) {
  std::map<uint64_t, int> live;
  std::set<uint64_t> fences;
  for (const auto& [key, attempt] : state.attempts()) {
    const v1::JobRecord* job = state.job(JobId{attempt->job()});
    if (job == nullptr) {
      problems.push_back(Str("attempt ", IdOf(*attempt), " has no job"));
      continue;
    }
    if (attempt->findings_size() > 8) {
      problems.push_back(Str("attempt ", IdOf(*attempt), " has ", attempt->findings_size(),
                             " findings, at most 8 are kept"));
    }
    if (!fences.insert(attempt->fence()).second) {
      problems.push_back(Str("I7: fence ", attempt->fence(), " has two attempts"));
    }
    if (IsLive(attempt->state())) {
      if (++live[attempt->job()] > 1) {
        problems.push_back(Str("I3: job ", JobId{job->id()}, " has two live attempts"));
      }
      if (attempt->fence() != job->current_fence()) {
        problems.push_back(Str("I2: live attempt ", IdOf(*attempt), " is fenced"));
      }
      if (job->state() != v1::JOB_STATE_ACTIVE && job->state() != v1::JOB_STATE_STOPPING) {
        problems.push_back(
            Str("job ", JobId{job->id()}, " is ", Name(job->state()), " with a live attempt"));
      }
    } else if (attempt->fence() == job->current_fence()) {
      problems.push_back(Str("I2: attempt ", IdOf(*attempt), " is ", Name(attempt->state()),
                             " and still holds the fence"));
    }
    if (attempt->state() == v1::ATTEMPT_STATE_ENDED) {
      for (const TaskPtr& task : state.TasksOf(JobId{attempt->job()}, attempt->number())) {
        if (!IsFinal(task->state())) {
          problems.push_back(Str("ended attempt ", IdOf(*attempt), " has a live task"));
        }
      }
    }
  }
}

// I4: sums over the tasks themselves, not over the index.
void CheckCapacity(const State& state, Problems& problems) {
  struct Used {
    double cpus = 0;
    uint64_t memory = 0;
    std::multiset<int32_t> gpus;
  };
  std::map<std::string, Used> used;
  for (const auto& [key, task] : state.tasks()) {
    if (IsFinal(task->state())) {
      continue;
    }
    const Booking booking = BookingOf(*task);
    Used& sum = used[task->worker()];
    sum.cpus += booking.cpus;
    sum.memory += booking.memory;
    sum.gpus.insert(booking.gpus.begin(), booking.gpus.end());
  }
  for (const auto& [id, sum] : used) {
    const auto node = state.nodes().find(id);
    if (node == state.nodes().end() || node->second.record == nullptr) {
      problems.push_back(Str("I4: tasks are booked on the unknown node ", id));
      continue;
    }
    const v1::Capacity& capacity = node->second.record->capacity();
    const std::set<int32_t> once(sum.gpus.begin(), sum.gpus.end());
    if (sum.cpus > capacity.cpus() || sum.memory > capacity.memory_bytes() ||
        once.size() != sum.gpus.size() || sum.gpus.size() > capacity.gpus()) {
      problems.push_back(Str("I4: node ", id, " is overbooked: ", sum.cpus, " of ", capacity.cpus(),
                             " cpus, ", sum.memory, " of ", capacity.memory_bytes(), " bytes, ",
                             sum.gpus.size(), " of ", capacity.gpus(), " gpus"));
    }
    if (node->second.cpus_used != sum.cpus || node->second.memory_used != sum.memory) {
      problems.push_back(Str("the index of node ", id, " differs from its tasks"));
    }
  }
}

// An attempt goes on from nothing that an earlier rollback left behind.
void CheckRollbacks(const State& state, Problems& problems) {
  for (const auto& [id, job] : state.jobs()) {
    const std::vector<RollbackLimit> limits = RollbackLimits(state, JobId{id});
    const v1::AttemptRecord* newest = state.attempt(JobId{id}, job->attempts());
    if (limits.empty() || newest == nullptr) {
      continue;
    }
    for (const v1::CheckpointKeyRecord& offered : newest->restore()) {
      const v1::CheckpointRecord* record =
          state.checkpoint({JobId{offered.job()}, Fence{offered.fence()}, offered.step()});
      std::vector<RollbackLimit> earlier = limits;
      std::erase_if(earlier, [newest](const RollbackLimit& limit) {
        return limit.fence.value >= newest->fence();
      });
      if (record != nullptr && IsLeftBehind(earlier, *record)) {
        problems.push_back(Str("attempt ", IdOf(*newest), " is offered step ", record->step(),
                               ", which a rollback left behind"));
      }
    }
  }
}

void CheckJobs(const State& state, Problems& problems) {
  for (const auto& [id, job] : state.jobs()) {
    const bool done = job->state() == v1::JOB_STATE_DONE;
    if (done != (job->result() != v1::JOB_RESULT_NONE)) {
      problems.push_back(Str("I6: job ", JobId{id}, " is ", Name(job->state()), " with result '",
                             Name(job->result()), "'"));
    }
    if (done && job->reason().empty()) {
      problems.push_back(Str("P6: job ", JobId{id}, " ended without a reason"));
    }
    const v1::AttemptRecord* newest = state.attempt(JobId{id}, job->attempts());
    const bool active =
        job->state() == v1::JOB_STATE_ACTIVE || job->state() == v1::JOB_STATE_STOPPING;
    if (active && (newest == nullptr || newest->counted())) {
      problems.push_back(Str("job ", JobId{id}, " is ", Name(job->state()), " without an attempt"));
    }
    if (job->state() == v1::JOB_STATE_BACKOFF && job->backoff_until_ms() == 0) {
      problems.push_back(Str("job ", JobId{id}, " is in BACKOFF without end"));
    }
  }
}

// A state that waits must have something that wakes it.
void CheckDeadlines(const State& state, Problems& problems) {
  for (const auto& [key, attempt] : state.attempts()) {
    const v1::AttemptState at = attempt->state();
    const bool needs = at == v1::ATTEMPT_STATE_ALLOCATED || at == v1::ATTEMPT_STATE_PREPARING ||
                       at == v1::ATTEMPT_STATE_RENDEZVOUS || at == v1::ATTEMPT_STATE_STOPPING;
    if (needs && attempt->deadline_ms() == 0) {
      problems.push_back(Str("attempt ", IdOf(*attempt), " is ", Name(at), " without a deadline"));
    }
  }
}

}  // namespace

std::vector<std::string> CheckInvariants(const State& state) {
  Problems problems;
  CheckFences(state, problems);
  CheckAttempts(state, problems);
  CheckCapacity(state, problems);
  CheckJobs(state, problems);
  CheckDeadlines(state, problems);
  CheckRollbacks(state, problems);
  return problems;
}

namespace {

void StepOfJob(const State& before, const v1::JobRecord& now, Problems& problems) {
  const JobId id{now.id()};
  const v1::JobRecord* was = before.job(id);
  if (was == nullptr) {
    return;
  }
  if (now.current_fence() < was->current_fence()) {
    problems.push_back(Str("I7: the fence of job ", id, " fell"));
  }
  if (now.version() <= was->version()) {
    problems.push_back(Str("the version of job ", id, " did not rise"));
  }
  if (was->state() == v1::JOB_STATE_DONE &&
      (now.state() == v1::JOB_STATE_DONE ? now.result() != was->result()
                                         : now.runs_size() != was->runs_size() + 1)) {
    problems.push_back(Str("I6: job ", id, " was DONE and changed"));
  }
}

void StepOfCheckpoint(const State& before, const v1::CheckpointRecord& now,
                      const std::map<uint64_t, const v1::JobRecord*>& jobs, Problems& problems) {
  const CheckpointKey key = KeyOf(now);
  const v1::CheckpointRecord* was = before.checkpoint(key);
  const bool commits = now.state() == v1::CHECKPOINT_STATE_COMMITTED &&
                       (was == nullptr || was->state() != v1::CHECKPOINT_STATE_COMMITTED);
  if (!commits) {
    return;
  }
  const v1::JobRecord* job = before.job(key.job);
  if (job == nullptr || job->current_fence() != now.fence()) {
    problems.push_back(Str("I2: checkpoint ", ToText(key), " of fence ", now.fence(),
                           " committed while the current fence is ",
                           job == nullptr ? 0 : job->current_fence()));
  }
  for (const CheckpointPtr& other : before.CheckpointsOf(key.job)) {
    if (other->state() == v1::CHECKPOINT_STATE_COMMITTED && other->fence() > now.fence()) {
      problems.push_back(Str("I1: checkpoint ", ToText(key), " of fence ", now.fence(),
                             " committed after one of fence ", other->fence()));
    }
  }
  const auto changed = jobs.find(key.job.value);
  if (changed == jobs.end() || changed->second->last_checkpoint().step() != now.step()) {
    problems.push_back(Str("K3: ", ToText(key), " committed without its job's record"));
  }
  if (static_cast<uint32_t>(now.seals_size()) != now.world_size()) {
    problems.push_back(Str("K3: ", ToText(key), " committed with ", now.seals_size(), " of ",
                           now.world_size(), " seals"));
  }
}

}  // namespace

std::vector<std::string> CheckStep(const State& before, const v1::EventRecord& event) {
  Problems problems;
  std::map<uint64_t, const v1::JobRecord*> jobs;
  for (const v1::RecordChange& change : event.delta()) {
    if (change.has_job()) {
      jobs[change.job().id()] = &change.job();
    }
  }
  for (const v1::RecordChange& change : event.delta()) {
    if (change.has_meta() && (change.meta().term() < before.meta().term() ||
                              change.meta().fence_seq() < before.meta().fence_seq())) {
      problems.push_back("I7: term or fence sequence fell");
    }
    if (change.has_job()) {
      StepOfJob(before, change.job(), problems);
    }
    if (change.has_checkpoint()) {
      StepOfCheckpoint(before, change.checkpoint(), jobs, problems);
    }
    if (change.has_task()) {
      const v1::TaskRecord* was =
          before.task(JobId{change.task().job()}, change.task().attempt(), change.task().task());
      if (was != nullptr && IsFinal(was->state()) && was->state() != change.task().state()) {
        problems.push_back(
            Str("4.3: task ", was->task(), " of fence ", was->fence(), " left a final state"));
      }
    }
    if (change.has_attempt()) {
      const v1::AttemptRecord* was =
          before.attempt(JobId{change.attempt().job()}, change.attempt().number());
      if (was != nullptr && change.attempt().state() < was->state()) {
        problems.push_back(Str("4.2: attempt ", IdOf(*was), " went from ", Name(was->state()),
                               " back to ", Name(change.attempt().state())));
      }
    }
  }
  return problems;
}

}  // namespace heddle::state
