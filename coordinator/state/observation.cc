#include "coordinator/state/observation.h"

#include <algorithm>

#include "base/rank_words/rank_words.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

// A rank's time between two of its heads, per step.
RankTimes TimesBetween(const v1::RankHead& from, const v1::RankHead& to) {
  RankTimes times;
  const double steps = static_cast<double>(to.step() - from.step());
  const auto per_step = [steps](uint64_t before, uint64_t after) {
    return after > before ? static_cast<double>(after - before) / 1e6 / steps : 0.0;
  };
  const int phases = std::min(from.phase_ns_size(), to.phase_ns_size());
  for (int phase = 0; phase < phases; ++phase) {
    const double ms = per_step(from.phase_ns(phase), to.phase_ns(phase));
    switch (PartOfPhase(static_cast<uint32_t>(phase))) {
      case PhasePart::kCompute:
        times.compute += ms;
        break;
      case PhasePart::kData:
        times.data += ms;
        break;
      case PhasePart::kDisk:
        times.disk += ms;
        break;
      case PhasePart::kNone:
        break;
    }
  }
  times.waited = per_step(from.waited_ns(), to.waited_ns());
  times.compute = std::max(0.0, times.compute - times.waited);
  return times;
}

// Who waits for others there saves nothing himself.
bool IsBusyInSlowPhase(const v1::RankHead& head) {
  if (head.waiting() || IsStopped(head) || IsDead(head)) return false;
  return (head.phase() == kSavePhase && head.phase_age_ms() < kSaveKillMs) ||
         (head.phase() == kEvaluatePhase && head.phase_age_ms() < kEvaluateKillMs);
}

}  // namespace

bool IsStopped(const v1::RankHead& head) {
  return head.process_state() == "T" || head.process_state() == "t";
}
bool IsDead(const v1::RankHead& head) {
  return head.process_state().empty() || head.process_state() == "Z" || head.process_state() == "X";
}

void Observation::Add(const v1::RankHead& head, uint32_t world, int64_t now_ms) {
  if (head.rank() >= world) return;
  ranks_[head.rank()] = {head, now_ms};
  if (IsBusyInSlowPhase(head)) slow_phase_ms_ = now_ms;
  CloseWindow(world, now_ms);
}

int64_t Observation::CoveredMs(size_t from) const {
  int64_t ms = 0;
  for (size_t i = from; i < windows_.size(); ++i) ms += windows_[i].ms;
  return ms;
}

void Observation::CloseWindow(uint32_t world, int64_t now_ms) {
  if (ranks_.size() < world) return;
  const bool open = window_.size() == world;
  for (const auto& [rank, seen] : ranks_) {
    const bool whole = open && seen.head.step() >= window_[rank].step() + kWindowSteps;
    if (open && !whole) return;
  }
  if (open) {
    times_.clear();
    for (const auto& [rank, seen] : ranks_) {
      times_[rank] = TimesBetween(window_[rank], seen.head);
    }
    windows_.push_back({times_, now_ms - window_from_ms_});
    while (windows_.size() > 2 && CoveredMs(1) >= kConfirmMs) windows_.erase(windows_.begin());
  }
  window_from_ms_ = now_ms;
  for (const auto& [rank, seen] : ranks_) window_[rank] = seen.head;
}

}  // namespace heddle::state
