#include "worker/daemon/worker_state.h"

#include <gtest/gtest.h>
#include <sys/mount.h>

#include <filesystem>
#include <fstream>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"

namespace heddle::worker {
namespace {

TEST(WorkerState, KeepsItsIdAndGivesRisingSessions) {
  const test::TempDir dir;
  std::string id;
  uint64_t session = 0;
  for (int i = 0; i < 3; ++i) {
    auto state = WorkerState::Open(dir.path());
    ASSERT_OK(state);
    if (i == 0) id = (*state)->worker_id();
    EXPECT_EQ((*state)->worker_id(), id);
    EXPECT_EQ(id.rfind("n-", 0), 0u);
    for (int k = 0; k < 3; ++k) {
      const uint64_t next = (*state)->NewSession();
      EXPECT_GT(next, session);
      session = next;
    }
  }
}

TEST(WorkerState, CloneOfTheFolderBecomesAnotherWorker) {
  const test::TempDir dir;
  const std::string original = dir.path() + "/a", copy = dir.path() + "/b";
  std::string id;
  {
    auto state = WorkerState::Open(original);
    ASSERT_OK(state);
    id = (*state)->worker_id();
    ASSERT_OK((*state)->Accept("cluster", 5));
  }
  std::filesystem::copy(original, copy, std::filesystem::copy_options::recursive);
  auto clone = WorkerState::Open(copy);
  ASSERT_OK(clone);
  EXPECT_NE((*clone)->worker_id(), id);
}

TEST(WorkerState, RefusesALowerTermAlsoAfterARestart) {
  const test::TempDir dir;
  {
    auto state = WorkerState::Open(dir.path());
    ASSERT_OK(state);
    EXPECT_OK((*state)->Accept("cluster", 7));
    EXPECT_OK((*state)->Accept("cluster", 7));
    EXPECT_STATUS((*state)->Accept("cluster", 6), StatusCode::kAborted, "STALE_TERM");
  }
  auto state = WorkerState::Open(dir.path());
  ASSERT_OK(state);
  EXPECT_EQ((*state)->highest_term(), 7u);
  EXPECT_STATUS((*state)->Accept("cluster", 6), StatusCode::kAborted, "STALE_TERM");
  EXPECT_STATUS((*state)->Accept("other", 9), StatusCode::kFailedPrecondition, "cluster");
  EXPECT_EQ((*state)->highest_term(), 7u);
}

TEST(WorkerState, FullDiskTakesANewTerm) {
  const test::TempDir dir;
  const std::string disk = dir.path() + "/disk";
  std::filesystem::create_directory(disk);
  if (mount("heddle-test", disk.c_str(), "tmpfs", 0, "size=256k") != 0) {
    GTEST_SKIP() << "no mounts here";
  }
  {
    auto state = WorkerState::Open(disk);
    ASSERT_OK(state);
    ASSERT_OK((*state)->Accept("cluster", 9));
    std::ofstream filler(disk + "/filler", std::ios::binary);
    filler << std::string(1 << 20, 'x');
    filler.close();
    ASSERT_OK((*state)->Accept("cluster", 10));
    EXPECT_STATUS((*state)->Accept("cluster", 9), StatusCode::kAborted, "STALE_TERM");
  }
  {
    auto state = WorkerState::Open(disk);
    ASSERT_OK(state);
    EXPECT_EQ((*state)->highest_term(), 10u);
    EXPECT_EQ((*state)->cluster_id(), "cluster");
  }
  EXPECT_EQ(umount(disk.c_str()), 0);
}

TEST(WorkerState, OneDaemonPerFolder) {
  const test::TempDir dir;
  auto first = WorkerState::Open(dir.path());
  ASSERT_OK(first);
  EXPECT_STATUS(WorkerState::Open(dir.path()), StatusCode::kFailedPrecondition, "another");
  first->reset();
  EXPECT_OK(WorkerState::Open(dir.path()));
}

TEST(WorkerState, CountsInstances) {
  const test::TempDir dir;
  for (int i = 0; i < 2; ++i) {
    auto state = WorkerState::Open(dir.path());
    ASSERT_OK(state);
    EXPECT_EQ((*state)->boot(), 1u);
  }
  std::ofstream(dir.path() + "/boot") << "boot 00000000000000000041\ninstance before\n";
  auto state = WorkerState::Open(dir.path());
  ASSERT_OK(state);
  EXPECT_EQ((*state)->boot(), 42u);
}

TEST(WorkerState, InstanceStaysWhileTheMachineRuns) {
  EXPECT_EQ(CurrentInstance(), CurrentInstance());
  EXPECT_FALSE(CurrentInstance().empty());
}

}  // namespace
}  // namespace heddle::worker
