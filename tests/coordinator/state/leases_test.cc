#include "coordinator/state/leases.h"

#include <gtest/gtest.h>

#include "base/status/status.h"

namespace heddle::state {
namespace {

std::string Kinds(const std::vector<Event>& events) {
  std::string text;
  for (const Event& event : events) {
    text += std::string(text.empty() ? "" : " ") + EventName(event);
  }
  return text;
}

// Polls at every deadline until `until_ms`; what happened with its times.
std::string RunUntil(LeaseTable& table, int64_t& now, int64_t until_ms) {
  std::string text;
  while (table.NextMs() <= until_ms) {
    now = std::max(now, table.NextMs());
    const std::string kinds = Kinds(table.Poll(now));
    if (!kinds.empty()) {
      text += Str(text.empty() ? "" : ", ", now, " ", kinds);
    }
  }
  now = until_ms;
  return text;
}

TEST(LeaseTable, SilentWorkerIsSuspectAfter6SecondsAndLost25AfterItsLastPermit) {
  LeaseTable table({}, -100'000);
  int64_t now = 0;
  table.Registered("a", 1, 0);
  table.Heard("a", 1, 1'000);
  table.PermitSent("a", 1'000);
  EXPECT_EQ(RunUntil(table, now, 60'000), "7000 WorkerSuspect, 26000 WorkerLost");
}

TEST(LeaseTable, ClosedStreamIsSuspectAfter2SecondsUnlessItComesBack) {
  LeaseTable table({}, -100'000);
  int64_t now = 0;
  table.Registered("a", 1, 0);
  table.StreamClosed("a", 1, 500);
  EXPECT_EQ(RunUntil(table, now, 3'000), "2500 WorkerSuspect");
  table.Registered("a", 2, 3'000);
  table.StreamClosed("a", 1, 3'100);  // the old session's: nothing
  EXPECT_EQ(RunUntil(table, now, 8'000), "");
}

// The network went away a moment after a start, when one of two workers was back.
TEST(LeaseTable, SilenceOfAllIsMassSilenceAlsoWhenOneWasBackForAMoment) {
  LeaseTable table({}, 0);
  int64_t now = 0;
  table.Recovered("a", 1, 0);
  table.Recovered("b", 1, 0);
  table.Registered("a", 2, 300);
  EXPECT_EQ(RunUntil(table, now, 600'000), "6300 WorkerSuspect");
  EXPECT_TRUE(table.mass_silence());
}

// The first is silent since the start; the second came back and fell silent much later, for the
// same broken network.
TEST(LeaseTable, NobodyIsLostWhileAllAreSilentHoweverFarApart) {
  LeaseTable table({}, 0);
  int64_t now = 0;
  table.Recovered("a", 1, 0);
  table.Recovered("b", 1, 0);
  EXPECT_EQ(RunUntil(table, now, 20'000), "");
  table.Registered("a", 2, 20'000);
  EXPECT_EQ(RunUntil(table, now, 600'000), "26000 WorkerSuspect");
  table.Registered("a", 3, 600'000);
  table.Heard("a", 3, 604'000);
  EXPECT_EQ(RunUntil(table, now, 609'000), "");
}

TEST(LeaseTable, HeardAgainIsTold) {
  LeaseTable table({}, -100'000);
  int64_t now = 0;
  table.Registered("a", 1, 0);
  EXPECT_EQ(RunUntil(table, now, 7'000), "6000 WorkerSuspect");
  table.Heard("a", 1, 7'000);
  EXPECT_EQ(Kinds(table.Poll(7'000)), "WorkerHeard");
}

TEST(LeaseTable, NobodyIsLostWhileAllAreSilent) {
  LeaseTable table({}, -100'000);
  int64_t now = 0;
  for (const char* worker : {"a", "b", "c"}) {
    table.Registered(worker, 1, 0);
  }
  EXPECT_EQ(RunUntil(table, now, 3'600'000), "6000 WorkerSuspect WorkerSuspect WorkerSuspect");
  EXPECT_TRUE(table.mass_silence());
}

TEST(LeaseTable, OneOfThreeSilentIsLost) {
  LeaseTable table({}, -100'000);
  int64_t now = 0;
  table.Registered("a", 1, 0);
  table.Registered("b", 1, 0);
  table.Registered("c", 1, 0);
  for (int64_t t = 2'000; t <= 40'000; t += 2'000) {
    table.Heard("b", 1, t);
    table.Heard("c", 1, t);
    const std::string text = RunUntil(table, now, t);
    if (t == 6'000) {
      EXPECT_EQ(text, "6000 WorkerSuspect");
    } else if (t == 26'000) {
      EXPECT_EQ(text, "25000 WorkerLost");
    } else {
      EXPECT_EQ(text, "") << t;
    }
  }
}

// Found by the simulation (seed 350).
TEST(LeaseTable, SilenceThatOutlastsARestartOfTheCoordinatorLosesNobody) {
  LeaseTable table({}, 0);
  int64_t now = 0;
  table.Recovered("a", 1, 0);
  table.Recovered("b", 1, 0);
  EXPECT_EQ(RunUntil(table, now, 600'000), "");
  table.Registered("a", 2, now);
  EXPECT_EQ(RunUntil(table, now, now + 5'000), "") << "b gets time to follow";
}

TEST(LeaseTable, RecoveredWorkerThatStaysAwayIsLostWhenTheOthersAreBack) {
  LeaseTable table({}, 0);
  int64_t now = 1'000;
  table.Recovered("a", 1, 0);
  table.Recovered("b", 1, 0);
  table.Registered("b", 2, 1'000);
  for (int64_t t = 2'000; t <= 60'000; t += 1'000) {
    table.Heard("b", 2, t);
    const std::string text = RunUntil(table, now, t);
    EXPECT_EQ(text, t == 35'000 ? "35000 WorkerLost" : "") << t;
  }
}

}  // namespace
}  // namespace heddle::state
