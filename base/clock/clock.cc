#include "base/clock/clock.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>

#include "base/status/status.h"

namespace heddle {

namespace {

timespec Read(clockid_t clock) {
  timespec now;
  HEDDLE_CHECK(clock_gettime(clock, &now) == 0, "clock ", clock);
  return now;
}

}  // namespace

int64_t SystemClock::NowSteady() const {
  const timespec now = Read(CLOCK_BOOTTIME);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

int64_t SystemClock::NowWallMs() const {
  const timespec now = Read(CLOCK_REALTIME);
  return int64_t{now.tv_sec} * 1'000 + now.tv_nsec / 1'000'000;
}

void FakeClock::Advance(std::chrono::nanoseconds by) {
  HEDDLE_CHECK(by.count() >= 0, "by ", by.count());
  steady_ns_ += by.count();
}

Deadline::Deadline(const Clock& clock, std::chrono::nanoseconds after) : steady_ns_(0) {
  if (__builtin_add_overflow(clock.NowSteady(), after.count(), &steady_ns_)) {
    steady_ns_ = std::numeric_limits<int64_t>::max();
  }
}

std::chrono::nanoseconds Deadline::Left(const Clock& clock) const {
  return std::chrono::nanoseconds(std::max<int64_t>(steady_ns_ - clock.NowSteady(), 0));
}

std::string FormatWallMs(int64_t wall_ms) {
  // Rounds down, also before 1970.
  int64_t seconds = wall_ms / 1000;
  int64_t millis = wall_ms % 1000;
  if (millis < 0) {
    millis += 1000;
    --seconds;
  }
  const time_t time = seconds;
  tm utc{};
  if (gmtime_r(&time, &utc) == nullptr) {
    return Str(wall_ms, "ms");
  }
  std::array<char, 64> buffer;
  std::snprintf(buffer.data(), buffer.size(), "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ",
                utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min,
                utc.tm_sec, static_cast<int>(millis));
  return buffer.data();
}

}  // namespace heddle
