#include "worker/control/task_files.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <random>

#include "tests/support/worker/temp_dir.h"

namespace heddle::control {
namespace {

LaunchFile Example() {
  LaunchFile launch;
  launch.fence = 0xffffffffffffffff;
  launch.task = 3;
  launch.control = false;
  launch.memory_bytes = 1 << 30;
  launch.log_bytes_max = 5;
  launch.uid = 1000;
  launch.gid = 1001;
  launch.working_dir = "/some where";
  launch.cgroup_v2 = "/sys/fs/cgroup";
  RankLaunch rank;
  rank.rank = 9;
  rank.argv = {"/bin/echo", "", "a\nb", "ü"};
  rank.env = {"A=1", "EMPTY="};
  rank.cpus = {1, 63};
  launch.ranks = {rank, rank};
  launch.ranks[1].rank = 10;
  return launch;
}

TEST(LaunchFile, ComesBackAsItWasWritten) {
  LaunchFile back;
  std::string error;
  const LaunchFile launch = Example();
  ASSERT_TRUE(DecodeLaunch(EncodeLaunch(launch), &back, &error)) << error;
  EXPECT_EQ(back.fence, launch.fence);
  EXPECT_EQ(back.task, 3u);
  EXPECT_FALSE(back.control);
  EXPECT_EQ(back.uid, 1000);
  EXPECT_EQ(back.gid, 1001);
  EXPECT_EQ(back.memory_bytes, launch.memory_bytes);
  EXPECT_EQ(back.working_dir, launch.working_dir);
  EXPECT_EQ(back.cgroup_v2, launch.cgroup_v2);
  ASSERT_EQ(back.ranks.size(), 2u);
  EXPECT_EQ(back.ranks[0].argv, launch.ranks[0].argv);
  EXPECT_EQ(back.ranks[1].env, launch.ranks[1].env);
  EXPECT_EQ(back.ranks[1].cpus, launch.ranks[1].cpus);
  EXPECT_EQ(back.ranks[1].rank, 10u);
}

TEST(LaunchFile, EveryCutAndEveryFlippedBitIsRefused) {
  const std::string good = EncodeLaunch(Example());
  LaunchFile back;
  std::string error;
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(DecodeLaunch(std::string_view(good).substr(0, size), &back, &error)) << size;
  }
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(DecodeLaunch(bad, &back, &error)) << "bit " << bit;
  }
}

TEST(LaunchFile, NeedsRanksWithPrograms) {
  LaunchFile launch = Example();
  LaunchFile back;
  std::string error;
  launch.ranks[1].argv.clear();
  EXPECT_FALSE(DecodeLaunch(EncodeLaunch(launch), &back, &error));
  EXPECT_NE(error.find("10 has no program"), std::string::npos) << error;
  launch.ranks.clear();
  EXPECT_FALSE(DecodeLaunch(EncodeLaunch(launch), &back, &error));
  EXPECT_NE(error.find("no ranks"), std::string::npos) << error;
}

TEST(ShimIdentity, RoundTripsAndRefusesNonsense) {
  ShimIdentity identity;
  identity.pid = getpid();
  identity.start_ticks = ProcessStartTicks(getpid());
  identity.cgroup = "/sys/fs/cgroup/x y";
  ShimIdentity back;
  ASSERT_TRUE(DecodeShimIdentity(EncodeShimIdentity(identity), &back));
  EXPECT_EQ(back.pid, identity.pid);
  EXPECT_EQ(back.start_ticks, identity.start_ticks);
  EXPECT_EQ(back.cgroup, identity.cgroup);
  for (const char* text : {"", "pid", "pid x\n", "pid 12", "start 5\n"}) {
    EXPECT_FALSE(DecodeShimIdentity(text, &back)) << text;
  }
}

TEST(ProcessStartTicks, IsZeroForNoProcess) {
  EXPECT_GT(ProcessStartTicks(getpid()), 0u);
  EXPECT_EQ(ProcessStartTicks(1 << 30), 0u);
}

TEST(WriteFileDurably, ReplacesTheWholeFileOrNothing) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/file";
  ASSERT_TRUE(WriteFileDurably(path, "first, longer"));
  ASSERT_TRUE(WriteFileDurably(path, "second"));
  std::string text;
  ASSERT_TRUE(ReadWholeFile(path, &text));
  EXPECT_EQ(text, "second");
  EXPECT_NE(access((path + ".tmp").c_str(), F_OK), 0);
  EXPECT_FALSE(WriteFileDurably(dir.path() + "/missing/file", "x"));
}

}  // namespace
}  // namespace heddle::control
