// LogShipper against a coordinator that is away for longer than it waits for the last bytes.
#include "worker/daemon/log_shipper.h"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <string>

#include <boost/asio/io_context.hpp>

#include "base/net/grpc_channel.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/fake_coordinator.h"
#include "tests/support/worker/temp_dir.h"

namespace heddle::worker {
namespace {

using std::chrono::milliseconds;

bool RunUntil(boost::asio::io_context* io, const std::function<bool()>& condition,
              milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    io->restart();
    io->run_for(milliseconds(10));
  }
  return true;
}

TEST(LogShipper, LastBytesWaitForACoordinatorThatIsAway) {
  const test::TempDir dir;
  v1::TaskAssignment assignment;
  assignment.set_job(500);
  assignment.set_fence(10);
  assignment.add_ranks(0);
  assignment.set_world_size(1);
  StatusOr<TaskFolder> folder = TaskFolder::Create(dir.path(), assignment, {}, 0);
  ASSERT_OK(folder);
  std::ofstream(folder->LogPath(0)) << "last words\n";
  test::FakeCoordinator coordinator(dir.path() + "/c.sock");
  boost::asio::io_context io;
  StatusOr<net::Endpoint> endpoint = net::ParseEndpoint("unix:" + dir.path() + "/c.sock");
  ASSERT_OK(endpoint);
  StatusOr<std::shared_ptr<grpc::Channel>> channel = net::OpenChannel(*endpoint, {});
  ASSERT_OK(channel);
  LogShipper shipper(&io, *channel, "n-1", milliseconds(200));
  bool done = false;
  shipper.Watch(*folder);
  shipper.Connect();
  shipper.Finish(folder->key(), [&done] { done = true; });
  EXPECT_FALSE(RunUntil(
      &io, [&] { return done; }, milliseconds(1'000)))
      << "dropped, and the folder with it";
  coordinator.Start();
  EXPECT_TRUE(RunUntil(
      &io, [&] { return done; }, milliseconds(10'000)));
  EXPECT_EQ(coordinator.Log(10, 0), "last words\n");
  bool stopped = false;
  shipper.Stop([&stopped] { stopped = true; });
  EXPECT_TRUE(RunUntil(
      &io, [&] { return stopped; }, milliseconds(5'000)));
}

}  // namespace
}  // namespace heddle::worker
