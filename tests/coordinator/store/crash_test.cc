// kill -9 and a full disk against the real store. A child process (this executable again) appends
// numbered records and publishes each acknowledged number in a shared page; after each kill the
// parent finds every acknowledged record again (reliability T5, T8).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>
#include <thread>

#include "coordinator/store/state_folder.h"
#include "tests/coordinator/store/store_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::store::test {
namespace {

std::string KeyOf(uint64_t number) {
  std::string key;
  AppendBigEndian64(&key, number);
  return key;
}

// The oracle outlives the child: one page of a file, mapped by both.
std::atomic<uint64_t>* MapAcknowledged(const std::string& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || ftruncate(fd, 4096) != 0) {
    return nullptr;
  }
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return page == MAP_FAILED ? nullptr : static_cast<std::atomic<uint64_t>*>(page);
}

// The child's body: runs only when the parent starts it.
TEST(StoreChild, DISABLED_AppendsUntilKilled) {
  const char* dir = getenv("HEDDLE_STORE_DIR");
  ASSERT_NE(dir, nullptr);
  std::atomic<uint64_t>* acknowledged = MapAcknowledged(std::string(dir) + "/oracle");
  ASSERT_NE(acknowledged, nullptr);
  auto log = OpenLog(dir);
  if (!log.ok()) {
    std::cerr << log.status() << "\n";
    _exit(3);
  }
  std::atomic<uint64_t> pending = 0;
  for (uint64_t number = acknowledged->load() + 1;; ++number) {
    while (pending.load() > 256) {
      std::this_thread::yield();
    }
    ++pending;
    Batch batch;
    batch.Put(Family::kJobs, KeyOf(number), Str("record ", number));
    batch.Put(Family::kEvents, KeyOf(number), std::string(200, 'e'));
    const Status queued =
        (*log)->Append(std::move(batch), [&, number](StatusOr<CommitSeq> committed) {
          if (!committed.ok()) {
            _exit(4);
          }
          acknowledged->store(number);
          --pending;
        });
    if (!queued.ok()) {
      _exit(5);
    }
  }
}

pid_t StartChild(const std::string& dir) {
  const pid_t pid = fork();
  if (pid == 0) {
    setenv("HEDDLE_STORE_DIR", dir.c_str(), 1);
    execl("/proc/self/exe", "store_child", "--gtest_also_run_disabled_tests",
          "--gtest_filter=StoreChild.DISABLED_AppendsUntilKilled", nullptr);
    _exit(127);
  }
  return pid;
}

TEST(StoreCrash, KillNineLosesNothingAcknowledged) {
  TempDir dir;
  const uint64_t seed = std::random_device()();
  std::mt19937_64 random(seed);
  std::atomic<uint64_t>* acknowledged = MapAcknowledged(dir.path() + "/oracle");
  ASSERT_NE(acknowledged, nullptr);
  constexpr int kKills = 25;
  uint64_t lost = 0;
  for (int kill_number = 0; kill_number < kKills; ++kill_number) {
    const uint64_t before = acknowledged->load();
    const pid_t pid = StartChild(dir.path());
    ASSERT_GT(pid, 0);
    while (acknowledged->load() == before) {
      ASSERT_EQ(waitpid(pid, nullptr, WNOHANG), 0) << "the child ended by itself";
      std::this_thread::yield();
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 60000));
    ASSERT_EQ(kill(pid, SIGKILL), 0);
    ASSERT_EQ(waitpid(pid, nullptr, 0), pid);
    auto log = OpenLog(dir.path());
    ASSERT_OK(log) << "seed " << seed;
    uint64_t expected = 1;
    ASSERT_OK((*log)->Scan(Family::kJobs, "", "", [&](const std::string& key, const std::string&) {
      lost += ReadBigEndian64(key) != expected ? 1 : 0;
      ++expected;
      return true;
    }));
    lost += expected <= acknowledged->load() ? acknowledged->load() + 1 - expected : 0;
    // What was committed but not yet published counts as acknowledged from here on.
    acknowledged->store(expected - 1);
  }
  std::cout << "{\"test\":\"store_kill9\",\"seed\":" << seed << ",\"kills\":" << kKills
            << ",\"acknowledged\":" << acknowledged->load() << ",\"lost\":" << lost << "}\n";
  EXPECT_EQ(lost, 0u) << "seed " << seed;
  EXPECT_GT(acknowledged->load(), uint64_t{kKills} * 10);
}

class SmallDisk {
 public:
  explicit SmallDisk(const char* size) {
    mounted_ = mount("heddle-test", dir_.path().c_str(), "tmpfs", 0, size) == 0;
  }
  ~SmallDisk() {
    if (mounted_) {
      umount2(dir_.path().c_str(), MNT_DETACH);
    }
  }
  bool mounted() const { return mounted_; }
  const std::string& path() const { return dir_.path(); }

 private:
  TempDir dir_;
  bool mounted_ = false;
};

TEST(StoreCrash, FullDiskPoisonsAndAReopenKeepsEveryAcknowledgedRecord) {
  SmallDisk disk("size=64m");
  if (!disk.mounted()) {
    GTEST_SKIP() << "SKIPPED LOUDLY: mounting a tmpfs needs root (CAP_SYS_ADMIN)";
  }
  const std::string state = disk.path() + "/state";
  ASSERT_OK(MakeFolders(state));
  DiskLimits limits;
  limits.ballast_bytes = 24 << 20;  // room to flush a recovered memtable
  ASSERT_OK(RestoreBallast(state, limits));
  auto log = OpenLog(state);
  ASSERT_OK(log);
  uint64_t acknowledged = 0;
  Status error;
  for (uint64_t number = 1; number < 100000 && error.ok(); ++number) {
    error = PutAndWait(log->get(), Family::kJobs, KeyOf(number), std::string(16 << 10, 'j'));
    acknowledged += error.ok() ? 1 : 0;
  }
  EXPECT_STATUS(error, StatusCode::kUnavailable, "");
  EXPECT_EQ((*log)->role(), Role::kPoisoned);
  EXPECT_FALSE(PutAndWait(log->get(), Family::kJobs, "x", "y").ok()) << "poison must hold";
  EXPECT_EQ(CountRecords(**log, Family::kJobs), acknowledged) << "reads go on";
  log->reset();

  ASSERT_OK(DropBallast(state));
  auto reopened = OpenLog(state);
  ASSERT_OK(reopened);
  std::cout << "{\"test\":\"store_disk_full\",\"acknowledged\":" << acknowledged
            << ",\"found\":" << CountRecords(**reopened, Family::kJobs) << ",\"aborts\":0}\n";
  EXPECT_GE(CountRecords(**reopened, Family::kJobs), acknowledged);
  EXPECT_OK(PutAndWait(reopened->get(), Family::kJobs, "small", "record"));
}

}  // namespace
}  // namespace heddle::store::test
