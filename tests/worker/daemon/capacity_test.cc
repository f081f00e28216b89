#include "worker/daemon/capacity.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "tests/checkpoint/temp_dir.h"

namespace heddle::worker {
namespace {

constexpr char kMounts[] =
    "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - tmpfs tmpfs ro,mode=755\n"
    "31 30 0:27 / /tmp rw - cgroup2 cgroup2 rw,nsdelegate\n"
    "32 30 0:28 /docker/abc /usr rw,relatime shared:12 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:29 / /nowhere rw - cgroup cgroup rw,memory\n";

TEST(CgroupFolder, FollowsV2AndV1) {
  const std::string own = "0::/\n4:cpu,cpuacct:/docker/abc/bin\n5:memory:/x\n";
  EXPECT_EQ(CgroupFolder(own, kMounts, ""), "/tmp");
  // The mount shows the hierarchy from /docker/abc on.
  EXPECT_EQ(CgroupFolder(own, kMounts, "cpu"), "/usr/bin");
  EXPECT_EQ(CgroupFolder(own, kMounts, "cpuacct"), "/usr/bin");
  // The own path is not visible in this container: the mount itself.
  EXPECT_EQ(CgroupFolder(own, kMounts, "memory"), "/nowhere");
  EXPECT_EQ(CgroupFolder(own, kMounts, "freezer"), "") << "not listed";
  EXPECT_EQ(CgroupFolder("", kMounts, ""), "");
  EXPECT_EQ(CgroupFolder(own, "", ""), "");
  EXPECT_EQ(CgroupFolder("garbage\n::\n:", "- - -\nx", ""), "");
}

TEST(Capacity, IsWhatWasGrantedNotWhatTheHostHas) {
  const std::vector<uint32_t> before = GrantedCpus();
  ASSERT_FALSE(before.empty());
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(before.back(), &one);
  cpu_set_t old;
  ASSERT_EQ(sched_getaffinity(0, sizeof(old), &old), 0);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(GrantedCpus(), std::vector<uint32_t>{before.back()});
  EXPECT_LE(GrantedCpuTime(), 1.0);
  Options options;
  EXPECT_LE(MakeCapacity(options, {}).cpus(), 1.0);
  options.share = 2;
  EXPECT_EQ(MakeCapacity(options, {}).cpus(), 1.0) << "none would be of no use";
  EXPECT_EQ(MakeCapacity(options, {}).memory_bytes(), GrantedMemory() / 2);
  options.cpus = 3.5;
  options.memory_bytes = 1 << 20;
  options.labels = {"disk=nvme"};
  EXPECT_EQ(MakeCapacity(options, {}).cpus(), 3.5);
  EXPECT_EQ(MakeCapacity(options, {}).memory_bytes(), 1u << 20);
  EXPECT_EQ(MakeCapacity(options, {}).labels(0), "disk=nvme");
  ASSERT_EQ(sched_setaffinity(0, sizeof(old), &old), 0);
  const uint64_t physical =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  EXPECT_GT(GrantedMemory(), 0u);
  EXPECT_LE(GrantedMemory(), physical);
}

TEST(Capacity, WarnsOfOffersBeyondWhatWasGranted) {
  v1::Capacity granted;
  granted.set_cpus(2);
  granted.set_memory_bytes(uint64_t{8} << 30);
  Options options;
  EXPECT_EQ(OvercommitOf(options, granted), "");
  options.cpus = 2;
  options.memory_bytes = int64_t{8} << 30;
  EXPECT_EQ(OvercommitOf(options, granted), "");
  options.cpus = 4;
  EXPECT_EQ(OvercommitOf(options, granted),
            "4 CPUs are offered and 2 were granted: ranks will share cores");
  options.memory_bytes = int64_t{9} << 30;
  EXPECT_NE(OvercommitOf(options, granted).find("9GiB of memory are offered and 8GiB"),
            std::string::npos);
}

TEST(Capacity, FindsMpiByItsServerOnly) {
  const std::string bin = std::string(std::getenv("HEDDLE_BIN")) + "/";
  EXPECT_TRUE(FindsMpi(bin)) << "./dev setup installs OpenMPI and the build its server";
  EXPECT_FALSE(FindsMpi("/nowhere/"));
  const checkpoint::TempDir folder;  // a server without its plug-in
  std::filesystem::copy_file(bin + "heddle-mpi-server", folder.path() + "/heddle-mpi-server");
  EXPECT_FALSE(FindsMpi(folder.path() + "/"));
}

}  // namespace
}  // namespace heddle::worker
