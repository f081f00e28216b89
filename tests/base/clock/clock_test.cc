#include "base/clock/clock.h"

#include <gtest/gtest.h>

#include <chrono>
#include <limits>

namespace heddle {
namespace {

using namespace std::chrono_literals;

TEST(SystemClock, SteadyNeverGoesBackAndWallIsThisCentury) {
  const SystemClock clock;
  int64_t before = clock.NowSteady();
  for (int i = 0; i < 1000; ++i) {
    const int64_t now = clock.NowSteady();
    ASSERT_GE(now, before);
    before = now;
  }
  EXPECT_GT(clock.NowWallMs(), 1'700'000'000'000);
}

TEST(FakeClock, AdvanceMovesBothClocksAndJumpOnlyTheWall) {
  FakeClock clock(1000);
  const int64_t steady = clock.NowSteady();
  const int64_t wall = clock.NowWallMs();
  clock.Advance(1500ms);
  EXPECT_EQ(clock.NowSteady() - steady, 1'500'000'000);
  EXPECT_EQ(clock.NowWallMs() - wall, 1500);
  clock.JumpWall(-1h);
  EXPECT_EQ(clock.NowSteady() - steady, 1'500'000'000);
  EXPECT_EQ(clock.NowWallMs() - wall, 1500 - 3'600'000);
}

TEST(Deadline, PassesAtItsTimeWhateverTheWallDoes) {
  FakeClock clock;
  const Deadline deadline(clock, 10s);
  clock.JumpWall(24h);
  clock.Advance(9'999'999'999ns);
  EXPECT_FALSE(deadline.Passed(clock));
  EXPECT_EQ(deadline.Left(clock), 1ns);
  clock.Advance(1ns);
  EXPECT_TRUE(deadline.Passed(clock));
  clock.Advance(1s);
  EXPECT_EQ(deadline.Left(clock), 0ns);
}

TEST(Deadline, FarFutureDoesNotWrap) {
  FakeClock clock;
  const Deadline deadline(clock, std::chrono::nanoseconds::max());
  EXPECT_FALSE(deadline.Passed(clock));
  EXPECT_EQ(deadline.steady_ns(), std::numeric_limits<int64_t>::max());
}

TEST(FormatWallMs, IsUtcWithMilliseconds) {
  EXPECT_EQ(FormatWallMs(1'750'000'000'007), "2025-06-15T15:06:40.007Z");
  EXPECT_EQ(FormatWallMs(0), "1970-01-01T00:00:00.000Z");
  EXPECT_EQ(FormatWallMs(-1), "1969-12-31T23:59:59.999Z");
}

}  // namespace
}  // namespace heddle
