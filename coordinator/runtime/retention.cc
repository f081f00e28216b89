#include "coordinator/runtime/retention.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/log/log.h"

namespace heddle::runtime {
namespace {

constexpr int kJobsPerLook = 64;  // the state thread has other work
constexpr int64_t kSoonMs = 100;
constexpr int64_t kPassMsMax = 3'600'000;
constexpr int64_t kPassMsMin = 200;

}  // namespace

void Retention::Start() {
  if (keep_ms_ > 0) {
    core_->Post([this] { Look(); });
  }
}

void Retention::Look() {
  if (pass_before_ms_ == 0) {
    // A wall clock that jumps ahead must not cost what people want to keep.
    const state::Time now = core_->Now();
    pass_before_ms_ = std::min(now.ms, now.wall_ms) - keep_ms_;
    next_job_ = 0;
    ForgetNodes(pass_before_ms_);
  }
  int64_t wait_ms = kSoonMs;
  if (!CleanJobs(pass_before_ms_)) {
    clean_before_ms_ = pass_before_ms_;
    pass_before_ms_ = 0;
    wait_ms = std::clamp(keep_ms_ / 10, kPassMsMin, kPassMsMax);
  }
  core_->PostAfter(wait_ms, [this] { Look(); });
}

bool Retention::CleanJobs(int64_t before_ms) {
  const auto& jobs = core_->state().jobs();
  int cleaned = 0;
  for (auto job = jobs.lower_bound(next_job_); job != jobs.end(); ++job) {
    const v1::JobRecord& record = *job->second;
    next_job_ = job->first + 1;
    if (record.state() != v1::JOB_STATE_DONE || record.finished_at() >= before_ms ||
        record.finished_at() < clean_before_ms_) {
      continue;
    }
    core_->RemovePoints(record.id());
    core_->PostFileWork([logs = logs_, id = JobId{record.id()}] {
      if (const Status removed = logs->Remove(id); !removed.ok()) {
        HEDDLE_WARN("logs of a finished job stay", {"job", id}, {"error", removed});
      }
    });
    if (++cleaned == kJobsPerLook) {
      return true;
    }
  }
  return false;
}

void Retention::ForgetNodes(int64_t before_ms) {
  std::vector<std::string> gone;
  for (const auto& [id, node] : core_->state().nodes()) {
    const v1::WorkerRecord& record = *node.record;
    const bool away =
        record.state() == v1::WORKER_STATE_LOST || record.state() == v1::WORKER_STATE_LEFT;
    if (away && record.admin() == v1::WORKER_ADMIN_OPEN && node.booked.empty() &&
        record.changed_at() < before_ms) {
      gone.push_back(id);
    }
  }
  for (std::string& id : gone) {
    state::event::NodeAdministered event;
    event.request.identity = "coordinator";
    event.node = std::move(id);
    event.verb = v1::NODE_VERB_FORGET;
    event.reason = "away for longer than what is kept of finished jobs";
    core_->Execute(std::move(event), [](const state::Outcome&) {});
  }
}

}  // namespace heddle::runtime
