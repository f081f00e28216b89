#include "worker/offload/disk.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cstring>
#include <thread>

#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

class DiskTest : public ::testing::TestWithParam<DiskMethod> {
 protected:
  void SetUp() override {
    StatusOr<std::unique_ptr<Disk>> disk = MakeDisk(GetParam());
    if (!disk.ok()) GTEST_SKIP() << disk.status().ToString();
    disk_ = *std::move(disk);
    ASSERT_OK_AND_ASSIGN(file_, OpenSpillFile(dir_.path()));
  }

  // Replies by tag.
  std::vector<int64_t> Collect(size_t count) {
    std::vector<DiskReply> replies;
    while (replies.size() < count) disk_->Wait(replies);
    std::vector<int64_t> results(count);
    for (const DiskReply& reply : replies) results.at(reply.tag) = reply.result;
    return results;
  }

  DiskDir dir_;
  SpillFd file_;
  std::unique_ptr<Disk> disk_;
};

TEST_P(DiskTest, MovesManyRequestsAtATimeToTheirPlaces) {
  constexpr int64_t kCount = 32;
  constexpr int64_t kBytes = 3 * kPageBytes;
  BlockMemory memory(2 * kCount * kBytes);
  std::vector<std::byte*> written;
  std::vector<std::byte*> read;
  for (uint32_t i = 0; i < kCount; ++i) {
    written.push_back(memory.Take(kBytes));
    read.push_back(memory.Take(kBytes));
    std::ranges::copy(Contents(i, 1, kBytes), written[i]);
    disk_->Submit({true, file_.value, written[i], kBytes, (kCount - i) * kBytes, i});
  }
  EXPECT_EQ(Collect(kCount), std::vector<int64_t>(kCount, kBytes));
  for (uint32_t i = 0; i < kCount; ++i) {
    disk_->Submit({false, file_.value, read[i], kBytes, (kCount - i) * kBytes, i});
  }
  EXPECT_EQ(Collect(kCount), std::vector<int64_t>(kCount, kBytes));
  for (uint32_t i = 0; i < kCount; ++i) {
    EXPECT_TRUE(Equal(read[i], Contents(i, 1, kBytes))) << i;
    memory.Give(written[i], kBytes);
    memory.Give(read[i], kBytes);
  }
}

TEST_P(DiskTest, RepliesWithTheErrorAndWithWhatAFileHas) {
  BlockMemory memory(2 * kPageBytes);
  std::byte* const data = memory.Take(2 * kPageBytes);
  disk_->Submit({true, file_.value, data, kPageBytes, 0, 0});
  EXPECT_EQ(Collect(1), std::vector<int64_t>({kPageBytes}));
  disk_->Submit({false, -1, data, kPageBytes, 0, 0});
  disk_->Submit({false, file_.value, data, 2 * kPageBytes, 0, 1});
  EXPECT_EQ(Collect(2), std::vector<int64_t>({-EBADF, kPageBytes}));
  memory.Give(data, 2 * kPageBytes);
}

TEST_P(DiskTest, WakeEndsTheWaitOfNowOrTheNextOne) {
  std::vector<DiskReply> replies;
  for (int i = 0; i < 3; ++i) {
    disk_->Wake();
    disk_->Wake();
    disk_->Wait(replies);
  }
  std::thread waker([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    disk_->Wake();
  });
  disk_->Wait(replies);
  waker.join();
  EXPECT_TRUE(replies.empty());
}

INSTANTIATE_TEST_SUITE_P(Methods, DiskTest,
                         ::testing::Values(DiskMethod::kUring, DiskMethod::kThreads),
                         [](const auto& method) {
                           return method.param == DiskMethod::kUring ? "Uring" : "Threads";
                         });

// As container runtimes do; for the calling thread only.
bool ForbidUring() {
  const sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {std::size(rules), const_cast<sock_filter*>(rules)};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(Disk, TakesThreadsWhereIoUringIsForbidden) {
  bool forbidden = false;
  StatusOr<std::unique_ptr<Disk>> any = Internal("not tried");
  StatusOr<std::unique_ptr<Disk>> uring = Internal("not tried");
  std::thread([&] {
    forbidden = ForbidUring();
    if (!forbidden) return;
    any = MakeDisk(DiskMethod::kAuto);
    uring = MakeDisk(DiskMethod::kUring);
  }).join();
  if (!forbidden) GTEST_SKIP() << "seccomp filters are not allowed here";
  ASSERT_OK(any);
  EXPECT_EQ((*any)->Name(), "threads");
  EXPECT_STATUS(uring, StatusCode::kFailedPrecondition, "EPERM");
}

}  // namespace
}  // namespace heddle::offload
