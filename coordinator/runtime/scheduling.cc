// When a scheduling pass runs and what becomes of its decisions (control-plane S1, S11, D10).
#include <algorithm>
#include <boost/asio/post.hpp>

#include "base/log/log.h"
#include "coordinator/runtime/coordinator.h"

namespace heddle::runtime {
namespace {

constexpr int64_t kDebounceMs = 2;
constexpr double kPassShare = 0.1;  // of the state thread and of the pass thread
constexpr int64_t kPassGapMsMax = 100;
constexpr int64_t kStartWaitMs = 15'000;  // D10
constexpr size_t kPassTimesKept = 1000;
// Not yet durable batches under which a pass runs: what runs already is heard before more starts.
constexpr uint64_t kPassBacklogMax = 4000;

}  // namespace

// After a start nothing is placed before the workers that hold allocations are back, so that a job
// still running is found running.
bool Coordinator::SchedulingOpen() {
  std::erase_if(awaited_workers_, [this](const std::string& worker) {
    const auto stream = streams_.find(worker);
    return stream != streams_.end();
  });
  const bool enough = awaited_workers_.size() * 20 <= awaited_at_start_;
  return enough || (clock_.NowSteady() - started_ns_) / 1'000'000 >= kStartWaitMs;
}

void Coordinator::WakeScheduler() {
  if (wake_pending_) {
    return;
  }
  wake_pending_ = true;
  // A pass costs O(queue): long ones run less often, so that submits keep the state thread.
  const double gap_ms = (figures_.last_pass_ms + snapshot_ms_) / kPassShare;
  const int64_t wait_ms = std::clamp(static_cast<int64_t>(gap_ms), kDebounceMs, kPassGapMsMax);
  PostAfter(wait_ms, [this] {
    wake_pending_ = false;
    RunPass();
  });
}

void Coordinator::RunPass() {
  if (poisoned_ || stopping_ || figures_.read_only || state_.queue().empty()) {
    return;
  }
  if (pass_running_ || !SchedulingOpen() || appended_ - durable_ >= kPassBacklogMax) {
    PostAfter(kDebounceMs * 10, [this] { WakeScheduler(); });
    return;
  }
  pass_running_ = true;
  const int64_t begin = clock_.NowSteady();
  schedule::Snapshot taken = schedule::MakeSnapshot(state_, Now(), schedule::kOneOfMany);
  snapshot_ms_ = static_cast<double>(clock_.NowSteady() - begin) / 1e6;
  boost::asio::post(pass_pool_, [this, snapshot = std::move(taken)]() mutable {
    const int64_t start = clock_.NowSteady();
    schedule::PassResult result = schedule::RunPass(std::move(snapshot), schedule::kOneOfMany);
    const double pass_ms = static_cast<double>(clock_.NowSteady() - start) / 1e6;
    Post([this, result = std::move(result), pass_ms] { ApplyPass(result, pass_ms); });
  });
}

void Coordinator::ApplyPass(const schedule::PassResult& result, double pass_ms) {
  pass_running_ = false;
  figures_.last_pass_ms = pass_ms;
  pass_times_ms_.push_back(pass_ms);
  if (pass_times_ms_.size() > kPassTimesKept) {
    pass_times_ms_.erase(pass_times_ms_.begin());
  }
  std::vector<double> sorted = pass_times_ms_;
  std::sort(sorted.begin(), sorted.end());
  figures_.pass_p99_ms = sorted[sorted.size() * 99 / 100];
  for (const state::event::AttemptPlaced& placed : result.placed) {
    Execute(placed, [this](const state::Outcome& outcome) {
      if (outcome.status.ok()) {
        ++figures_.placed;
      } else {  // the state moved on since the snapshot
        ++figures_.dropped_decisions;
        WakeScheduler();
      }
    });
  }
  if (result.cut) {
    WakeScheduler();
  }
  if (options_.policy.fail_infeasible) {
    for (const state::event::JobInfeasible& infeasible : result.infeasible) {
      Execute(infeasible, [](const state::Outcome&) {});
    }
  }
}

}  // namespace heddle::runtime
