// The limit of a job's logs: what is lost is counted, and a restart keeps the count.
#include "coordinator/rpc/log_files.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>

#include "tests/support/status_matchers.h"

namespace heddle::rpc {
namespace {

class LogFilesTest : public ::testing::Test {
 protected:
  LogFilesTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "logs-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~LogFilesTest() override { std::filesystem::remove_all(folder_); }

  static v1::LogChunk Chunk(uint32_t rank, uint64_t offset, const std::string& data) {
    v1::LogChunk chunk;
    chunk.set_job(7);
    chunk.set_attempt(1);
    chunk.set_rank(rank);
    chunk.set_offset(offset);
    chunk.set_data(data);
    return chunk;
  }

  std::string folder_;
};

TEST_F(LogFilesTest, WhatIsOverTheLimitIsCountedOnceAndOverRestarts) {
  {
    LogFiles logs(folder_ + "/logs", 10);
    EXPECT_EQ(*logs.Append(Chunk(0, 0, "12345678")), 8u);
    EXPECT_EQ(*logs.Append(Chunk(0, 8, "90abc")), 13u) << "two bytes had room";
    EXPECT_EQ(*logs.Append(Chunk(0, 8, "90abc")), 13u) << "a repeat is not counted again";
    EXPECT_EQ(*logs.Append(Chunk(1, 0, "xy")), 2u);
  }
  LogFiles logs(folder_ + "/logs", 10);
  EXPECT_EQ(*logs.Append(Chunk(0, 10, "abcdefg")), 17u);
  const std::vector<LogFile> files = logs.List(JobId{7});
  ASSERT_EQ(files.size(), 2u);
  EXPECT_EQ(*LogFiles::Read(files[0].path, 0, 100), "1234567890");
  EXPECT_EQ(files[0].dropped, 7u);
  EXPECT_EQ(files[1].dropped, 2u);
}

TEST_F(LogFilesTest, WhatAWorkerLostIsKeptAndNeverFalls) {
  {
    LogFiles logs(folder_ + "/logs", 10);
    EXPECT_TRUE(logs.Losses(JobId{7}).empty());
    EXPECT_EQ(*logs.Append(Chunk(0, 0, "1234")), 4u);
    v1::LogChunk chunk = Chunk(2, 0, "");
    for (const uint64_t lost : {1'000ul, 5'000'000'000ul, 30ul}) {
      chunk.set_lost(lost);
      EXPECT_EQ(*logs.Append(chunk), 0u) << "no byte of the log";
    }
    EXPECT_EQ(*logs.Append(Chunk(1, 0, "1234567")), 7u) << "one had no room";
  }
  LogFiles logs(folder_ + "/logs", 10);
  const std::vector<LogFile> losses = logs.Losses(JobId{7});
  ASSERT_EQ(losses.size(), 2u) << "rank 0 is whole";
  EXPECT_EQ(losses[0].rank, 1u);
  EXPECT_EQ(losses[0].dropped, 1u);
  EXPECT_EQ(losses[0].lost, 0u);
  EXPECT_EQ(losses[1].rank, 2u);
  EXPECT_EQ(losses[1].lost, 5'000'000'000u);
  EXPECT_EQ(logs.List(JobId{7})[2].missing(), 5'000'000'000u);
}

}  // namespace
}  // namespace heddle::rpc
