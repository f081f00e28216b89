#include "base/log/log.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/status_matchers.h"

namespace heddle::log {
namespace {

class LogTest : public ::testing::Test {
 protected:
  LogTest() {
    std::string folder = ::testing::TempDir() + "heddle_log_XXXXXX";
    HEDDLE_CHECK(mkdtemp(folder.data()) != nullptr);
    folder_ = folder;
  }
  ~LogTest() override {
    EXPECT_OK(Init({}));
    std::filesystem::remove_all(folder_);
  }
  std::string path(const std::string& name) const { return folder_ / name; }
  static std::vector<std::string> Lines(const std::string& file) {
    std::ifstream in(file);
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) {
      lines.push_back(line);
    }
    return lines;
  }
  std::filesystem::path folder_;
};

TEST_F(LogTest, LineHasTimeLevelNameTextAndPairs) {
  ASSERT_OK(Init({.file = path("log"), .name = "worker"}));
  HEDDLE_WARN("attempt lost", {"job", 7}, {"cause", "node lost"});
  const std::vector<std::string> lines = Lines(path("log"));
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_TRUE(
      std::regex_match(lines[0], std::regex(R"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z W worker: )"
                                            R"(attempt lost job=7 cause="node lost")")))
      << lines[0];
}

TEST_F(LogTest, LevelHidesLinesAndDoesNotEvaluateThem) {
  ASSERT_OK(Init({.level = Level::kWarn, .file = path("log")}));
  int evaluated = 0;
  HEDDLE_INFO("hidden", {"n", ++evaluated});
  HEDDLE_DEBUG("hidden");
  HEDDLE_ERROR("shown", {"n", ++evaluated});
  EXPECT_EQ(evaluated, 1);
  ASSERT_EQ(Lines(path("log")).size(), 1u);
}

TEST_F(LogTest, ValuesCannotForgeALineOrAKey) {
  EXPECT_EQ(FormatLine("x", {{"k", "a\nE forged"}}), "x k=\"a\\nE forged\"");
  EXPECT_EQ(FormatLine("x", {{"k", "a=b"}, {"q", "say \"hi\"\\"}}),
            "x k=\"a=b\" q=\"say \\\"hi\\\"\\\\\"");
  EXPECT_EQ(FormatLine("x", {{"k", ""}, {"c", std::string("\x1b[1m\x7f")}}),
            "x k=\"\" c=\"\\x1b[1m\\x7f\"");
  EXPECT_EQ(FormatLine("braces {} %s", {{"k", "{}"}}), "braces {} %s k={}");
}

TEST_F(LogTest, BracesAndPercentsPassThroughTheBackEnd) {
  ASSERT_OK(Init({.file = path("log")}));
  HEDDLE_INFO("braces {} %v {0}");
  EXPECT_TRUE(Lines(path("log")).at(0).ends_with("I braces {} %v {0}"));
}

TEST_F(LogTest, ThreadsNeverMixLines) {
  ASSERT_OK(Init({.file = path("log")}));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 250; ++i) {
        HEDDLE_INFO("tick", {"pad", std::string(200, static_cast<char>('a' + t))}, {"i", i});
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const std::vector<std::string> lines = Lines(path("log"));
  ASSERT_EQ(lines.size(), 1000u);
  const std::regex line(R"(\S+ I tick pad=(a{200}|b{200}|c{200}|d{200}) i=\d+)");
  for (const std::string& text : lines) {
    ASSERT_TRUE(std::regex_match(text, line)) << text;
  }
}

TEST_F(LogTest, AppendsAndReopensAfterRotation) {
  ASSERT_OK(Init({.file = path("log")}));
  HEDDLE_INFO("one");
  ASSERT_OK(Init({.file = path("log")}));
  HEDDLE_INFO("two");
  std::filesystem::rename(path("log"), path("log.1"));
  ASSERT_OK(Reopen());
  HEDDLE_INFO("three");
  EXPECT_EQ(Lines(path("log.1")).size(), 2u);
  ASSERT_EQ(Lines(path("log")).size(), 1u);
  struct stat info;
  ASSERT_EQ(stat(path("log").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07, 0u) << "a log is not for everybody";
}

TEST_F(LogTest, FailedInitKeepsTheOldLog) {
  ASSERT_OK(Init({.file = path("log")}));
  EXPECT_STATUS(Init({.file = path("no/such/folder/log")}), StatusCode::kNotFound, "no/such");
  HEDDLE_INFO("still here");
  EXPECT_EQ(Lines(path("log")).size(), 1u);
}

TEST(LogLevel, ParsesItsNamesOnly) {
  ASSERT_OK_AND_ASSIGN(const Level level, ParseLevel("warn"));
  EXPECT_EQ(level, Level::kWarn);
  EXPECT_STATUS(ParseLevel("WARN"), StatusCode::kInvalidArgument, "debug, info, warn");
}

}  // namespace
}  // namespace heddle::log
