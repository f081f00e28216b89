// A state with helpers to drive it: each Do() applies, commits and checks all invariants.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "coordinator/state/apply.h"
#include "coordinator/state/invariants.h"
#include "coordinator/state/names.h"

namespace heddle::state {

class Cluster {
 public:
  Cluster() {
    EXPECT_TRUE(Do(event::CoordinatorStarted{Term{1}, "c", std::string(16, 'k')}).status.ok());
  }

  Outcome Do(const Event& event) {
    Outcome outcome = Apply(state, event, {now_ms, now_ms}, policy);
    for (const heddle::v1::EventRecord& one : outcome.events) {
      for (const std::string& problem : CheckStep(state, one)) {
        ADD_FAILURE() << EventName(event) << ": " << problem;
      }
      state.Commit(one);
      journal.push_back(one);
    }
    for (const std::string& problem : CheckInvariants(state)) {
      ADD_FAILURE() << EventName(event) << ": " << problem;
    }
    return outcome;
  }

  void Join(const std::string& worker, double cpus = 8) {
    heddle::v1::RegisterRequest request;
    request.set_worker_id(worker);
    request.set_instance("boot1");
    request.set_session(++session);
    request.set_host(worker);
    request.mutable_capacity()->set_cpus(cpus);
    request.mutable_capacity()->set_memory_bytes(1 << 30);
    ASSERT_TRUE(Do(event::WorkerRegistered{request}).status.ok());
  }
  uint64_t SessionOf(const std::string& worker) const { return state.worker(worker)->session(); }

  static heddle::v1::RunConfig Config(int ranks = 2) {
    heddle::v1::RunConfig config;
    config.set_name("job");
    config.mutable_parallel()->mutable_ranks()->set_min(ranks);
    config.mutable_parallel()->mutable_ranks()->set_max(ranks);
    config.mutable_training()->set_max_steps(100);
    return config;
  }
  event::JobSubmitted Submission(int ranks = 2) {
    event::JobSubmitted submit;
    submit.request.identity = "me";
    submit.request.request_id = "r" + std::to_string(++requests);
    submit.id = JobId{1000 + requests};
    submit.config = Config(ranks);
    return submit;
  }
  JobId Submit(int ranks = 2) {
    const Outcome outcome = Do(Submission(ranks));
    EXPECT_TRUE(outcome.status.ok()) << outcome.status;
    return outcome.job;
  }
  // One rank per worker, in order.
  Outcome Place(JobId job, const std::vector<std::string>& workers) {
    event::AttemptPlaced placed{job, state.job(job)->version(), {}};
    uint32_t rank = 0;
    for (const std::string& worker : workers) {
      placed.tasks.push_back({worker, rank++, 1, {}});
    }
    return Do(placed);
  }
  heddle::v1::TaskReport Report(JobId job, uint32_t task, heddle::v1::TaskState task_state) {
    heddle::v1::TaskReport report;
    const uint32_t attempt = state.job(job)->attempts();
    report.set_fence(state.attempt(job, attempt)->fence());
    report.set_task(task);
    report.set_seq(state.task(job, attempt, task)->seq() + 1);
    report.set_state(task_state);
    report.set_acknowledged(true);
    return report;
  }
  Outcome Tell(JobId job, const heddle::v1::TaskReport& report) {
    const std::string worker = state.task(job, state.job(job)->attempts(), report.task())->worker();
    return Do(event::TaskReported{worker, SessionOf(worker), report});
  }
  void TellAll(JobId job, heddle::v1::TaskState task_state, bool joined = false) {
    const auto tasks = state.TasksOf(job, state.job(job)->attempts());
    for (const TaskPtr& task : tasks) {
      heddle::v1::TaskReport report = Report(job, task->task(), task_state);
      for (uint32_t r = 0; joined && r < task->ranks(); ++r) {
        report.add_joined_ranks(task->first_rank() + r);
      }
      Tell(job, report);
    }
  }
  Outcome TellExit(JobId job, uint32_t task, int code, int signal = 0) {
    heddle::v1::TaskReport report = Report(job, task, heddle::v1::TASK_STATE_EXITED);
    const TaskPtr record = state.TasksOf(job, state.job(job)->attempts())[task];
    for (uint32_t r = 0; r < record->ranks(); ++r) {
      heddle::v1::RankOutcome& exit = *report.add_exits();
      exit.set_rank(record->first_rank() + r);
      exit.set_at(now_ms);
      if (signal != 0) {
        exit.set_signal(signal);
      } else {
        exit.set_exit_code(code);
      }
    }
    return Tell(job, report);
  }
  // Up to RUNNING on workers a and b.
  JobId Running() {
    const JobId job = Submit(2);
    EXPECT_TRUE(Place(job, {"a", "b"}).status.ok());
    TellAll(job, heddle::v1::TASK_STATE_PREPARING);
    TellAll(job, heddle::v1::TASK_STATE_READY);
    TellAll(job, heddle::v1::TASK_STATE_RUNNING, true);
    EXPECT_EQ(AttemptState(job), "RUNNING");
    return job;
  }
  Outcome Stop(JobId job, heddle::v1::StopVerb verb, std::optional<int64_t> grace = {}) {
    return Do(event::JobStopped{{"me", "", "", 0}, job, verb, grace, "why"});
  }
  // Lets time pass and fires what is due.
  void Pass(int64_t ms) {
    const int64_t end = now_ms + ms;
    while (!state.timers().empty() && state.timers().begin()->at_ms <= end) {
      now_ms = std::max(now_ms, state.timers().begin()->at_ms);
      Do(event::TimerFired{*state.timers().begin()});
    }
    now_ms = end;
  }
  std::string JobState(JobId job) const { return Name(state.job(job)->state()); }
  std::string JobResult(JobId job) const { return Name(state.job(job)->result()); }
  std::string AttemptState(JobId job) const {
    return Name(state.attempt(job, state.job(job)->attempts())->state());
  }
  const heddle::v1::AttemptRecord& Attempt(JobId job) const {
    return *state.attempt(job, state.job(job)->attempts());
  }

  State state;
  Policy policy;
  int64_t now_ms = 1'000'000;
  uint64_t session = 0;
  uint64_t requests = 0;
  std::vector<heddle::v1::EventRecord> journal;
};

template <typename T>
int Count(const Outcome& outcome) {
  int count = 0;
  for (const Effect& effect : outcome.effects) {
    count += std::holds_alternative<T>(effect) ? 1 : 0;
  }
  return count;
}

// Two workers, a and b.
struct Two : Cluster {
  Two() {
    Join("a");
    Join("b");
  }
};

// A rank's part of a checkpoint of one tensor; `request` is the first rank's number.
inline heddle::v1::RankSealShard SealOf(const Cluster& c, JobId job, uint32_t rank, uint64_t step,
                                        uint64_t request = 1) {
  heddle::v1::RankSealShard message;
  message.set_job(job.value);
  message.set_fence(c.Attempt(job).fence());
  message.set_rank(rank);
  heddle::v1::SealShard& seal = *message.mutable_seal();
  seal.set_request(request + rank);
  seal.set_step(step);
  seal.set_rank(rank);
  heddle::v1::ShardFile& file = *seal.add_files();
  file.set_name(Str("rank-", rank, "-0.sst"));
  file.set_bytes(10);
  file.set_entries(1);
  file.set_digest(std::string(16, 'd'));
  heddle::v1::ElementRange& range = *file.add_ranges();
  range.set_tensor(1);
  range.set_tensor_class(heddle::v1::TENSOR_CLASS_MASTER);
  range.set_first(5 * rank);
  range.set_count(5);
  if (rank == 0) {
    heddle::v1::TensorInfo& tensor = *seal.add_tensors();
    tensor.set_id(1);
    tensor.set_name("w");
    tensor.add_shape(10);
    tensor.add_classes(heddle::v1::TENSOR_CLASS_MASTER);
    seal.mutable_train_state()->set_step(step);
  }
  return message;
}

inline Outcome Open(Cluster& c, JobId job, uint64_t step, uint64_t request = 7) {
  heddle::v1::RankOpenCheckpoint open;
  open.set_job(job.value);
  open.set_fence(c.Attempt(job).fence());
  open.mutable_open()->set_request(request);
  open.mutable_open()->set_step(step);
  return c.Do(event::CheckpointOpened{"a", c.SessionOf("a"), open, true});
}

}  // namespace heddle::state
