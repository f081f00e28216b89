// Whose cgroup is whose.
#include "worker/shim/cgroup.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "tests/support/worker/temp_dir.h"

namespace heddle::shim {
namespace {

// Two clusters on one host count their fences alike. The end of one's task must not be that of the
// other's ranks.
TEST(Cgroup, TasksOfTwoClustersWithOneFenceAreApart) {
  const test::TempDir parent;
  control::LaunchFile launch;
  launch.fence = 10;
  launch.cgroup_v2 = parent.path();
  launch.cgroup_v1_memory = parent.path();
  const pid_t other = fork();
  if (other == 0) _exit(Cgroup(launch).folder().empty() ? 1 : 0);
  int status = -1;
  ASSERT_EQ(waitpid(other, &status, 0), other);
  ASSERT_EQ(status, 0);
  const Cgroup own(launch);
  EXPECT_EQ(own.notes(), "");
  int folders = 0;
  for (const auto& entry : std::filesystem::directory_iterator(parent.path())) {
    EXPECT_EQ(entry.path().filename().string().rfind("heddle-10-0-", 0), 0u) << entry.path();
    ++folders;
  }
  EXPECT_EQ(folders, 2);
  EXPECT_TRUE(std::filesystem::exists(own.folder()));
}

}  // namespace
}  // namespace heddle::shim
