#include <algorithm>

#include "coordinator/schedule/schedule.h"
#include "coordinator/state/names.h"
#include "tests/simulation/checkers.h"

namespace heddle::simulation {

namespace v1 = heddle::v1;

namespace {

// A job that does not run must say truly why.
std::string JobNotSettled(const state::State& state, const v1::JobRecord& job, state::Time now,
                          const Plan& plan) {
  const JobId id{job.id()};
  switch (job.state()) {
    case v1::JOB_STATE_DONE:
    case v1::JOB_STATE_HELD:
    case v1::JOB_STATE_PAUSED:
      return {};
    case v1::JOB_STATE_WAITING: {
      const bool open = std::any_of(
          job.after().begin(), job.after().end(), [&state](const v1::DependencyRecord& one) {
            const v1::JobRecord* other = state.job(JobId{one.job()});
            return other != nullptr && other->state() != v1::JOB_STATE_DONE;
          });
      return open || job.start_at() > now.wall_ms ? std::string()
                                                  : Str("job ", id, " waits for nothing");
    }
    case v1::JOB_STATE_QUEUED: {
      const schedule::WaitReason reason = schedule::Explain(state, id, now);
      const bool never =
          static_cast<int>(state::RanksOf(job.config())) * job.config().parallel().cpus_per_rank() >
          plan.workers * plan.cpus;
      return reason.code == "INFEASIBLE" && never
                 ? std::string()
                 : Str("job ", id, " is QUEUED: ", reason.code, ": ", reason.text);
    }
    default:
      return Str("job ", id, " is ", state::Name(job.state()));
  }
}

}  // namespace

std::string Checkers::NotSettled(const state::State& state, int64_t now_ms, int64_t wall_ms) const {
  for (const auto& [id, job] : state.jobs()) {
    const std::string problem = JobNotSettled(state, *job, {now_ms, wall_ms}, plan_);
    if (!problem.empty()) {
      return problem;
    }
  }
  for (const auto& [key, attempt] : state.attempts()) {
    if (attempt->state() != v1::ATTEMPT_STATE_ENDED) {
      return Str("attempt ", attempt->number(), " of ", JobId{attempt->job()}, " is ",
                 state::Name(attempt->state()));
    }
  }
  for (const auto& [id, entry] : state.nodes()) {
    if (!entry.booked.empty()) {
      return Str("node ", id, " is booked for nothing");
    }
  }
  return processes_ > 0 ? Str(processes_, " processes run for nobody") : std::string();
}

}  // namespace heddle::simulation
