// What of a rank's log the coordinator does not get is told as a number.
#include "worker/daemon/log_shipper.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <boost/asio/io_context.hpp>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/fake_coordinator.h"
#include "tests/support/worker/temp_dir.h"
#include "worker/daemon/task_folder.h"

namespace heddle::worker {
namespace {

using std::chrono::milliseconds;

class LogShipperTest : public ::testing::Test {
 protected:
  LogShipperTest() : coordinator_(dir_.path() + "/coordinator.sock") {
    v1::TaskAssignment assignment;
    assignment.set_job(1);
    assignment.set_attempt(1);
    assignment.set_fence(20);
    assignment.set_world_size(1);
    assignment.add_ranks(0);
    folder_ = *TaskFolder::Create(dir_.path(), assignment, {}, 1);
    coordinator_.Start();
    shipper_.Watch(*folder_);
  }
  ~LogShipperTest() override {
    bool stopped = false;
    shipper_.Stop([&] { stopped = true; });
    EXPECT_TRUE(RunUntil([&] { return stopped; }));
  }

  void Print(const std::string& text) { std::ofstream(folder_->LogPath(0), std::ios::app) << text; }
  void Lose(uint64_t bytes) {
    std::ofstream(folder_->LogLossPath(0), std::ios::app);
    std::filesystem::resize_file(folder_->LogLossPath(0), bytes);
  }
  bool RunUntil(const std::function<bool()>& condition, milliseconds limit = milliseconds(10'000)) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (!condition()) {
      if (std::chrono::steady_clock::now() > end) return false;
      io_.run_for(milliseconds(5));
      io_.restart();
    }
    return true;
  }
  bool FinishIn(milliseconds limit) {
    bool done = false;
    shipper_.Finish(folder_->key(), [&] { done = true; });
    return RunUntil([&] { return done; }, limit);
  }

  const test::TempDir dir_;
  test::FakeCoordinator coordinator_;
  boost::asio::io_context io_;
  std::optional<TaskFolder> folder_;
  LogShipper shipper_{&io_,
                      grpc::CreateChannel("unix:" + dir_.path() + "/coordinator.sock",
                                          grpc::InsecureChannelCredentials()),
                      "worker", milliseconds(300)};
};

TEST_F(LogShipperTest, TellsWhatTheShimLostWhileItRuns) {
  Print("one\n");
  shipper_.Connect();
  ASSERT_TRUE(RunUntil([&] { return coordinator_.Log(20, 0) == "one\n"; }));
  EXPECT_EQ(coordinator_.LogLost(20, 0), 0u);
  Lose(5'000'000'000);
  EXPECT_TRUE(RunUntil([&] { return coordinator_.LogLost(20, 0) == 5'000'000'000; }));
  Lose(5'000'000'001);
  Print("two\n");
  EXPECT_TRUE(FinishIn(milliseconds(10'000)));
  EXPECT_EQ(coordinator_.Log(20, 0), "one\ntwo\n");
  EXPECT_EQ(coordinator_.LogLost(20, 0), 5'000'000'001u);
}

TEST_F(LogShipperTest, TellsHowMuchACoordinatorDidNotTake) {
  coordinator_.log_bytes_max = 100;
  shipper_.Connect();
  Lose(7);
  Print(std::string(2'500, 'x'));
  EXPECT_TRUE(FinishIn(milliseconds(10'000)));
  EXPECT_EQ(coordinator_.Log(20, 0).size(), 100u);
  EXPECT_EQ(coordinator_.LogLost(20, 0), 2'407u);
}

TEST_F(LogShipperTest, WaitsForACoordinatorThatIsAway) {
  coordinator_.Stop();
  shipper_.Connect();
  Print("last words\n");
  bool done = false;
  shipper_.Finish(folder_->key(), [&] { done = true; });
  EXPECT_FALSE(RunUntil([&] { return done; }, milliseconds(1'000))) << "three times the limit";
  coordinator_.Start();
  EXPECT_TRUE(RunUntil([&] { return done; }));
  EXPECT_EQ(coordinator_.Log(20, 0), "last words\n");
  EXPECT_EQ(coordinator_.LogLost(20, 0), 0u);
}

}  // namespace
}  // namespace heddle::worker
