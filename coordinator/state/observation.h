// What the ranks of a running attempt do, as their heartbeats tell it: the newest head of each, and
// where the time of the last steps went. In memory only, like the attempt's progress: after a
// restart of the coordinator the next heartbeats fill it again.
#pragma once

#include <cstdint>
#include <map>

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

// Steps over which ranks are compared (training-runtime.md 17.4).
inline constexpr uint64_t kWindowSteps = 20;

class Observation {
 public:
  void Add(const heddle::v1::RankHead& head, uint32_t world, int64_t now_ms);

  const std::map<uint32_t, RankSeen>& ranks() const { return ranks_; }
  // Of the newest whole window, at least kWindowSteps of every rank; empty before the first.
  const std::map<uint32_t, RankTimes>& times() const { return times_; }

 private:
  void CloseWindow(uint32_t world);

  std::map<uint32_t, RankSeen> ranks_;
  std::map<uint32_t, heddle::v1::RankHead> window_;  // heads at its begin
  std::map<uint32_t, RankTimes> times_;
};

}  // namespace heddle::state
