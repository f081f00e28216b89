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

TEST(RankPage, TimeIsCountedByPhaseAndWaitsApart) {
  const test::TempDir dir;
  const auto trainer = RankPage::Create(dir.path() + "/page-0");
  const auto daemon = RankPage::Open(dir.path() + "/page-0");
  ASSERT_NE(daemon, nullptr);
  EXPECT_FALSE(daemon->ReadActivity().waiting);
  EXPECT_EQ(daemon->ReadActivity().unit, -1);
  const int64_t now = BootTimeNs();
  trainer->PublishProgress({.step = 0, .phase = 2, .at_ns = now - 5000});
  trainer->PublishProgress({.step = 0, .phase = 3, .at_ns = now - 4000});
  trainer->PublishProgress({.step = 0, .phase = 9, .at_ns = now - 1000});
  trainer->PublishProgress({.step = 1, .phase = 2, .at_ns = now});
  trainer->NoteUnit(4);
  Activity activity = daemon->ReadActivity();
  EXPECT_EQ(activity.phase_ns[3], 3000u);
  EXPECT_EQ(activity.phase_ns[9], 1000u);
  EXPECT_GE(activity.phase_ns[2], 1000u) << "the phase of now counts on";
  EXPECT_EQ(activity.unit, 4);
  trainer->PublishProgress({.step = 1, .phase = 9, .at_ns = BootTimeNs()});
  trainer->BeginWait();
  EXPECT_TRUE(daemon->ReadActivity().waiting);
  const int64_t until = BootTimeNs() + 2'000'000;
  while (BootTimeNs() < until) {
  }
  EXPECT_GE(daemon->ReadActivity().waited_ns, 1'000'000u) << "seen while it lasts";
  trainer->EndWait();
  activity = daemon->ReadActivity();
  EXPECT_FALSE(activity.waiting);
  EXPECT_GE(activity.waited_ns, 2'000'000u);
}

// Else an evaluation's waits would be taken off the time that its rank computes.
TEST(RankPage, OnlyWaitsOfPhasesThatComputeAreCounted) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  ASSERT_NE(page, nullptr);
  for (const uint32_t phase : {2u, 6u, 7u}) {
    page->PublishProgress({.step = 1, .phase = phase, .at_ns = BootTimeNs()});
    page->BeginWait();
    const int64_t until = BootTimeNs() + 1'000'000;
    while (BootTimeNs() < until) {
    }
    EXPECT_TRUE(page->ReadActivity().waiting);
    EXPECT_EQ(page->ReadActivity().waited_ns, 0u) << phase;
    page->EndWait();
    EXPECT_EQ(page->ReadActivity().waited_ns, 0u) << phase;
  }
}

// A rank that an older daemon started goes on under this one.
TEST(RankPage, APageWithoutTheNewerPartsStillWorks) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/page-0";
  ASSERT_NE(RankPage::Create(path), nullptr);
  const off_t former = 4096 + static_cast<off_t>(kRingEntries * sizeof(CollectiveEntry));
  ASSERT_EQ(truncate(path.c_str(), former), 0);
  const auto page = RankPage::Open(path);
  ASSERT_NE(page, nullptr);
  page->PublishProgress({.step = 7, .phase = 3, .at_ns = BootTimeNs()});
  page->PublishProgress({.step = 8, .phase = 3, .at_ns = BootTimeNs()});
  page->BeginWait();
  page->EndWait();
  page->AllowStackSignal();
  page->BeginStacks();
  EXPECT_EQ(page->ReadProgress().step, 8u);
  EXPECT_EQ(page->ReadActivity().waited_ns, 0u);
  EXPECT_FALSE(page->StackSignalAllowed());
  EXPECT_TRUE(page->ReadStacks().empty());
}

TEST(RankPage, StacksOfThreadsAreKeptUntilTheNextAreAskedFor) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  void* frames[kStackFrames + 2] = {};
  for (size_t i = 0; i < kStackFrames + 2; ++i) frames[i] = reinterpret_cast<void*>(i + 1);
  page->BeginStacks();
  for (uint32_t thread = 1; thread <= kStackThreads + 3; ++thread) {
    page->AddStack(thread, frames, kStackFrames + 2);
  }
  const std::vector<ThreadStack> stacks = page->ReadStacks();
  ASSERT_EQ(stacks.size(), kStackThreads);
  EXPECT_EQ(stacks[2].thread, 3u);
  ASSERT_EQ(stacks[2].frames.size(), kStackFrames);
  EXPECT_EQ(stacks[2].frames[1], 2u);
  page->BeginStacks();
  EXPECT_TRUE(page->ReadStacks().empty());
}

TEST(RankPage, TheNewestCollectiveIsOneThatIsWhole) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  EXPECT_EQ(page->NewestCollective().seq, 0u);
  page->ring()[5].seq = 5;
  page->ring()[5].op = 3;
  page->ring_head() = 5;
  EXPECT_EQ(page->NewestCollective().op, 3u);
  page->ring()[5].seq = 5 + kRingEntries;  // being overwritten
  EXPECT_EQ(page->NewestCollective().seq, 0u);
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
