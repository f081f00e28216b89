#include "worker/control/rank_page.h"

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <fstream>
#include <thread>

#include "tests/support/worker/temp_dir.h"

namespace heddle::control {
namespace {

TEST(RankPage, TwoMappingsSeeTheSamePermitAndProgress) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/page-0";
  const auto daemon = RankPage::Create(path);
  const auto trainer = RankPage::Open(path);
  ASSERT_NE(daemon, nullptr);
  ASSERT_NE(trainer, nullptr);
  EXPECT_FALSE(trainer->HoldsPermit(7)) << "a fresh page permits nothing";
  daemon->PublishPermit({.fence = 7, .deadline_ns = BootTimeNs() + 1'000'000'000});
  EXPECT_TRUE(trainer->HoldsPermit(7));
  EXPECT_FALSE(trainer->HoldsPermit(8)) << "another fence's permit";
  daemon->PublishPermit({.fence = 7, .deadline_ns = BootTimeNs() - 1});
  EXPECT_FALSE(trainer->HoldsPermit(7)) << "run out";
  trainer->PublishProgress({.step = 12, .phase = 3, .at_ns = 99});
  EXPECT_EQ(daemon->ReadProgress().step, 12u);
  EXPECT_EQ(daemon->ReadProgress().phase, 3u);
  trainer->ring()[4095].seq = 77;
  trainer->ring_head() = 4096;
  EXPECT_EQ(daemon->ring()[4095].seq, 77u);
  EXPECT_EQ(daemon->ring_head(), 4096u);
}

TEST(RankPage, FileIsPrivateAndMadeOnce) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/page-0";
  ASSERT_NE(RankPage::Create(path), nullptr);
  struct stat info = {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_EQ(RankPage::Create(path), nullptr);
  EXPECT_EQ(errno, EEXIST);
}

// A file with holes: the first store into one on a full disk is a SIGBUS.
TEST(RankPage, EveryBlockOfTheFilesIsAllocatedWhenTheyAreMade) {
  const test::TempDir dir;
  ASSERT_NE(RankPage::Create(dir.path() + "/page-0"), nullptr);
  ASSERT_NE(ContactFile::Create(dir.path() + "/contact", 1), nullptr);
  for (const char* name : {"/page-0", "/contact"}) {
    struct stat info = {};
    ASSERT_EQ(stat((dir.path() + name).c_str(), &info), 0);
    EXPECT_GE(int64_t{info.st_blocks} * 512, info.st_size) << name;
  }
}

TEST(RankPage, AFullDiskIsAnErrorAndLeavesNoFile) {
  const test::TempDir dir;
  if (mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "NOT TESTED: a full disk needs the right to mount a tmpfs";
  }
  const std::string path = dir.path() + "/page-0";
  const std::unique_ptr<RankPage> page = RankPage::Create(path);
  const int error = errno;
  const bool left = access(path.c_str(), F_OK) == 0;
  umount2(dir.path().c_str(), MNT_DETACH);
  EXPECT_EQ(page, nullptr);
  EXPECT_EQ(error, ENOSPC);
  EXPECT_FALSE(left);
}

TEST(RankPage, RefusesForeignAndShortFiles) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/page-0";
  EXPECT_EQ(RankPage::Open(path), nullptr);
  EXPECT_EQ(errno, ENOENT);
  std::ofstream(path) << "short";
  EXPECT_EQ(RankPage::Open(path), nullptr);
  EXPECT_EQ(errno, EINVAL);
  ASSERT_EQ(truncate(path.c_str(), 4 << 20), 0);
  EXPECT_EQ(RankPage::Open(path), nullptr);
  EXPECT_EQ(errno, EINVAL);
  EXPECT_EQ(ContactFile::Open(path), nullptr);
}

TEST(RankPage, ReadersNeverSeeHalfAPermit) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  ASSERT_NE(page, nullptr);
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (uint64_t i = 1; !stop; ++i) {
      page->PublishPermit({.fence = i, .deadline_ns = static_cast<int64_t>(i * 3)});
    }
  });
  int whole = 0;
  while (whole < 100'000) {
    const Permit permit = page->ReadPermit();
    if (permit.fence == 0) continue;  // nothing written yet, or the writer was paused in between
    EXPECT_EQ(permit.deadline_ns, static_cast<int64_t>(permit.fence * 3));
    ++whole;
  }
  stop = true;
  writer.join();
}

TEST(ContactFile, CountsTheOrphanDeadlineFromTheLastContact) {
  const test::TempDir dir;
  const auto daemon = ContactFile::Create(dir.path() + "/contact", 5'000);
  const auto shim = ContactFile::Open(dir.path() + "/contact");
  ASSERT_NE(daemon, nullptr);
  ASSERT_NE(shim, nullptr);
  EXPECT_NEAR(static_cast<double>(shim->last_contact_ns()), static_cast<double>(BootTimeNs()), 1e9);
  daemon->Refresh(1'000);
  EXPECT_EQ(shim->deadline_ns(), 6'000);
  daemon->SetMaxOrphan(10);
  EXPECT_EQ(shim->deadline_ns(), 1'010);
}

}  // namespace
}  // namespace heddle::control
