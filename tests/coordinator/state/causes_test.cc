#include "coordinator/state/causes.h"

#include <gtest/gtest.h>

#include "coordinator/state/secret.h"

namespace heddle::state {
namespace {

using heddle::v1::RankOutcome;

RankOutcome Exit(int code) {
  RankOutcome exit;
  exit.set_exit_code(code);
  return exit;
}

TEST(Causes, ExitCodesMeanWhatTheDesignSays) {
  EXPECT_TRUE(IsClean(Exit(0)));
  EXPECT_TRUE(IsPeerFailure(Exit(86)));
  EXPECT_EQ(CauseOfExit(Exit(87), "n").category(), "STORAGE");
  EXPECT_EQ(CauseOfExit(Exit(88), "n").category(), "NUMERIC");
  EXPECT_EQ(CauseOfExit(Exit(89), "n").category(), "OOM_GPU");
  EXPECT_EQ(CauseOfExit(Exit(93), "n").category(), "USER_CODE");
  EXPECT_EQ(CauseOfExit(Exit(1), "n").category(), "UNKNOWN");
  RankOutcome oom;
  oom.set_signal(9);
  oom.set_oom(true);
  EXPECT_EQ(CauseOfExit(oom, "n").category(), "OOM_HOST");
  RankOutcome said = Exit(1);
  said.set_category("USER_CONFIG");
  EXPECT_EQ(CauseOfExit(said, "n").category(), "USER_CONFIG") << "the last words win";
}

TEST(Causes, CategoriesDecideRetryBudgetAndBlame) {
  EXPECT_FALSE(RuleOf("NUMERIC").retry);
  EXPECT_TRUE(RuleOf("OOM_HOST").burns_budget);
  EXPECT_TRUE(RuleOf("STORAGE").blames_node);
  EXPECT_TRUE(RuleOf("NODE_LOST").retry);
  EXPECT_FALSE(RuleOf("NODE_LOST").burns_budget);
  EXPECT_STREQ(RuleOf("no such word").name, "UNKNOWN");
}

TEST(Causes, DamagedDataEndTheJobAndBlameNoNode) {
  RankOutcome exit = Exit(93);
  exit.set_category("USER_DATA");
  const heddle::v1::CauseRecord cause = CauseOfExit(exit, "n");
  EXPECT_EQ(cause.code(), "BAD_DATA");
  EXPECT_FALSE(RuleOf(cause.category()).retry);
  EXPECT_FALSE(RuleOf(cause.category()).blames_node);
  EXPECT_NE(AdviceFor(cause.code(), "").find("heddle data inspect DIR --verify"),
            std::string::npos);
}

// Nobody finds a reason in the log of a rank that was asked to stop.
TEST(Causes, WhoWasAskedToStopIsNotSentToTheRanksLog) {
  const std::pair<const char*, const char*> ends[] = {
      {"USER_PREEMPTED", "queued again"},      {"USER_PAUSED", "heddle resume JOB"},
      {"USER_CANCELLED", "heddle resume JOB"}, {"NODE_DRAINED", "nodes that are open"},
      {"TIME_LIMIT", "schedule.time_limit"},   {"SUCCEEDED", ""}};
  for (const auto& [code, hint] : ends) {
    ASSERT_NE(FindCode(code), nullptr) << code;
    const std::string advice = AdviceFor(code, FindCode(code)->category);
    EXPECT_EQ(advice.find("log"), std::string::npos) << code << ": " << advice;
    EXPECT_NE(advice.find(hint), std::string::npos) << code << ": " << advice;
    EXPECT_EQ(advice.empty(), hint[0] == '\0') << code << ": " << advice;
  }
  EXPECT_NE(AdviceFor("A_LATER_CODE", "HUNG").find("heddle doctor"), std::string::npos);
}

TEST(Causes, BackOffDoublesUpToItsLimitWithinTwentyPercent) {
  EXPECT_EQ(BackoffMs(1, 0, 10'000, 600'000), 0);
  int64_t plain = 10'000;
  for (uint32_t n = 1; n < 40; ++n) {
    const int64_t delay = BackoffMs(7, n, 10'000, 600'000);
    EXPECT_GE(delay, plain * 8 / 10) << n;
    EXPECT_LE(delay, plain * 12 / 10) << n;
    EXPECT_EQ(delay, BackoffMs(7, n, 10'000, 600'000));
    plain = std::min<int64_t>(600'000, plain * 2);
  }
}

TEST(Secret, SipHashGivesThePublishedValue) {
  std::string key;
  std::string data;
  for (char c = 0; c < 16; ++c) {
    key.push_back(c);
  }
  data = key.substr(0, 15);
  EXPECT_EQ(SipHash24(key, data), 0xa129ca6149be45e5u);
}

}  // namespace
}  // namespace heddle::state
