// What the ranks of a running attempt do, as their heartbeats tell it: the newest head of each, and
// where the time of the last steps went. In memory only, like the attempt's progress: after a
// restart of the coordinator the next heartbeats fill it again.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "heddle/v1/worker_link.pb.h"

namespace heddle::state {

struct RankSeen {
  heddle::v1::RankHead head;
  int64_t at_ms = 0;  // Time::ms of its arrival
};

// Milliseconds per step of one rank.
struct RankTimes {
  double compute = 0;  // waits for collectives left out
  double data = 0;
  double disk = 0;
  double waited = 0;  // in collectives
};

inline constexpr uint32_t kSavePhase = 6;
inline constexpr uint32_t kEvaluatePhase = 7;
// How long a rank may be in one of them before schedule.hang_kill_after counts all the same: a dead
// file server shows as a save without end, but the coordinator does not know how much is evaluated.
inline constexpr int64_t kSaveKillMs = 600'000;
inline constexpr int64_t kEvaluateKillMs = 3'600'000;

// The letter of /proc/PID/stat: by a signal or a debugger; gone.
bool IsStopped(const heddle::v1::RankHead& head);
bool IsDead(const heddle::v1::RankHead& head);

// Steps over which ranks are compared (training-runtime.md 17.4).
inline constexpr uint64_t kWindowSteps = 20;
// A rank that is slow in one window may have been disturbed; over windows in a row that cover so
// much it is slow.
inline constexpr int64_t kConfirmMs = 10'000;

struct Window {
  std::map<uint32_t, RankTimes> times;
  int64_t ms = 0;
};

class Observation {
 public:
  void Add(const heddle::v1::RankHead& head, uint32_t world, int64_t now_ms);

  const std::map<uint32_t, RankSeen>& ranks() const { return ranks_; }
  // Of the newest whole window, at least kWindowSteps of every rank; empty before the first.
  const std::map<uint32_t, RankTimes>& times() const { return times_; }
  // The newest windows, the oldest first: at least two that together cover kConfirmMs, or what
  // there is so far.
  const std::vector<Window>& windows() const { return windows_; }
  bool confirms() const { return windows_.size() >= 2 && CoveredMs(0) >= kConfirmMs; }
  // Time::ms at which a rank was last seen busy with an evaluation or a save that may still take as
  // long as it does; 0: never. No steps come meanwhile, and that is no hang.
  int64_t slow_phase_ms() const { return slow_phase_ms_; }

 private:
  void CloseWindow(uint32_t world, int64_t now_ms);
  int64_t CoveredMs(size_t from) const;

  std::map<uint32_t, RankSeen> ranks_;
  std::map<uint32_t, heddle::v1::RankHead> window_;  // heads at its begin
  int64_t window_from_ms_ = 0;
  std::map<uint32_t, RankTimes> times_;
  std::vector<Window> windows_;
  int64_t slow_phase_ms_ = 0;
};

}  // namespace heddle::state
