// Time as a parameter (architecture S30): daemons take a Clock&, tests and the simulator pass a
// FakeClock. Nothing else reads the time; the tidy test refuses system_clock::now and sleep_for.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

namespace heddle {

class Clock {
 public:
  virtual ~Clock() = default;
  // Nanoseconds of a clock that never goes back and counts suspended time (CLOCK_BOOTTIME): for
  // deadlines, leases, permits and intervals. Comparable between processes of one machine.
  virtual int64_t NowSteady() const = 0;
  // Milliseconds since 1970 UTC, which may jump: for people and records, never for deadlines.
  virtual int64_t NowWallMs() const = 0;
};

// The machine's clocks. Thread-safe.
class SystemClock : public Clock {
 public:
  int64_t NowSteady() const override;
  int64_t NowWallMs() const override;
};

// Moves only when told. Thread-safe.
class FakeClock : public Clock {
 public:
  explicit FakeClock(int64_t wall_ms = 1'750'000'000'000) : wall_base_ms_(wall_ms) {}
  int64_t NowSteady() const override { return steady_ns_.load(); }
  int64_t NowWallMs() const override {
    return wall_base_ms_.load() + steady_ns_.load() / 1'000'000;
  }
  // Both clocks move. REQUIRES: by >= 0.
  void Advance(std::chrono::nanoseconds by);
  // Moves only the wall clock, either way: what an administrator or NTP does.
  void JumpWall(std::chrono::milliseconds by) { wall_base_ms_ += by.count(); }

 private:
  std::atomic<int64_t> steady_ns_{1'000'000'000};
  std::atomic<int64_t> wall_base_ms_;
};

// A point on the steady clock by which something must have happened.
class Deadline {
 public:
  Deadline(const Clock& clock, std::chrono::nanoseconds after);
  static Deadline At(int64_t steady_ns) { return Deadline(steady_ns); }
  int64_t steady_ns() const { return steady_ns_; }
  bool Passed(const Clock& clock) const { return clock.NowSteady() >= steady_ns_; }
  // Time left, never negative.
  std::chrono::nanoseconds Left(const Clock& clock) const;

 private:
  explicit Deadline(int64_t steady_ns) : steady_ns_(steady_ns) {}
  int64_t steady_ns_;
};

// Milliseconds since 1970 as "2025-06-15T15:06:40.000Z", for logs and tables.
std::string FormatWallMs(int64_t wall_ms);

}  // namespace heddle
