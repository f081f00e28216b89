#include "worker/offload/spill_file.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

// Runs `body` in a thread with mounts of its own, with a file system at `path`. False: not allowed
// here.
struct Mount {
  const char* type = "tmpfs";
  unsigned long flags = 0;
  const char* options = "size=1m";
};
bool WithMount(const std::string& path, const Mount& what, const std::function<void()>& body) {
  bool mounted = false;
  std::thread([&] {
    mounted = unshare(CLONE_NEWNS) == 0 &&
              mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
              mount("test", path.c_str(), what.type, what.flags, what.options) == 0;
    if (mounted) body();
  }).join();
  return mounted;
}

StatusOr<std::unique_ptr<Spill>> MakeSpill(const std::string& dir, const BlockTable& table) {
  return Spill::Create(dir, table, MakeThreadDisk());
}

TEST(Spill, KeepsEveryKindOfBlocksOfUnequalSizes) {
  const DiskDir dir;
  const std::vector<SlotBytes> slots = {{5000, 4096, 1}, {0, 12288, 70000}, {4097, 0, 3}};
  const BlockTable table = *BlockTable::Make(slots);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Spill> spill, MakeSpill(dir.path(), table));
  BlockMemory memory(1 << 20);
  std::vector<std::byte*> data(table.size());
  std::vector<TransferEnd> ends;
  const auto move_all = [&](bool write) {
    size_t moving = 0;
    for (uint32_t block = 0; block < table.size(); ++block) {
      if (table.Bytes(block) == 0) continue;
      if (write) {
        data[block] = memory.Take(table.MemoryBytes(block));
        std::ranges::copy(Contents(block, 1, table.Bytes(block)), data[block]);
      } else {
        std::memset(data[block], 0, static_cast<size_t>(table.MemoryBytes(block)));
      }
      spill->Begin({write, block, data[block]});
      ++moving;
    }
    for (ends.clear(); ends.size() < moving;) spill->Wait(ends);
    for (const TransferEnd& end : ends) EXPECT_OK(end.status);
  };
  move_all(true);
  move_all(false);
  for (uint32_t block = 0; block < table.size(); ++block) {
    if (data[block] == nullptr) continue;
    EXPECT_TRUE(Equal(data[block], Contents(block, 1, table.Bytes(block)))) << block;
    memory.Give(data[block], table.MemoryBytes(block));
  }
}

TEST(Spill, LeavesNoNameThatAKillCouldLeaveBehind) {
  const DiskDir dir;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Spill> spill,
                       MakeSpill(dir.path(), WeightSlots(4, 100'000)));
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(Spill, AllocatesItsBlocksBeforeTheFirstWrite) {
  const DiskDir dir;
  ASSERT_OK_AND_ASSIGN(const SpillFd file, OpenSpillFile(dir.path()));
  ASSERT_OK_AND_ASSIGN(const bool allocated, AllocateSpillFile(file, dir.path(), 1 << 20));
  if (!allocated) GTEST_SKIP() << "the file system of " << dir.path() << " cannot allocate";
  struct stat status = {};
  ASSERT_EQ(fstat(file.value, &status), 0);
  EXPECT_GE(status.st_blocks * 512, 1 << 20);
}

TEST(Spill, RefusesAFolderThatIsNotThereAndSaysWhatToDo) {
  const DiskDir dir;
  const BlockTable table = WeightSlots(1, 1);
  std::ofstream(dir.path() + "/file") << "x";
  for (const char* name : {"/missing", "/file/below", "/file"}) {
    EXPECT_STATUS(MakeSpill(dir.path() + name, table), StatusCode::kInvalidArgument,
                  "create the folder on this machine");
  }
}

TEST(Spill, RefusesAReadOnlyFileSystem) {
  const DiskDir dir;
  Status status = OkStatus();
  const bool mounted = WithMount(dir.path(), {.flags = MS_RDONLY}, [&] {
    status = ::heddle::status_internal::ToStatus(MakeSpill(dir.path(), WeightSlots(1, 1)));
  });
  if (!mounted) GTEST_SKIP() << "mounts are not allowed here";
  EXPECT_STATUS(status, StatusCode::kFailedPrecondition, "EROFS");
  EXPECT_STATUS(status, StatusCode::kFailedPrecondition, "that this user can write");
}

// Runs `body` with the path of such a disk, in a thread with mounts of its own. False: not allowed
// here.
bool WithSmallDisk(const char* type, const char* options,
                   const std::function<void(const std::string&)>& body) {
  bool mounted = false;
  std::thread([&] {
    if (unshare(CLONE_NEWNS) != 0) return;
    if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return;
    const test::SmallDisk disk(type, options);
    mounted = disk.mounted();
    if (mounted) body(disk.path());
  }).join();
  return mounted;
}

TEST(Spill, RefusesAFullDiskAtTheStartWithTheNumbers) {
  Status status = OkStatus();
  Status fits = Internal("not tried");
  const bool mounted = WithSmallDisk("tmpfs", "size=1m", [&](const std::string& dir) {
    status = MakeSpill(dir, WeightSlots(3, 409'600)).status();
    fits = MakeSpill(dir, WeightSlots(2, 409'600)).status();
  });
  if (!mounted) GTEST_SKIP() << "mounts are not allowed here";
  EXPECT_STATUS(status, StatusCode::kResourceExhausted, "need 1228800 bytes, 1048576 bytes");
  EXPECT_OK(fits);
}

// It would take the memory that spilling is to save.
TEST(Spill, RefusesAFolderInMemoryAndSaysWhatToDo) {
  for (const std::string type : {"tmpfs", "ramfs"}) {
    const DiskDir dir;
    Status status = OkStatus();
    const bool mounted = WithMount(dir.path(), {.type = type.c_str(), .options = ""}, [&] {
      status = MakeSpill(dir.path(), WeightSlots(1, 1)).status();
    });
    if (!mounted) GTEST_SKIP() << "mounts are not allowed here";
    EXPECT_STATUS(
        status, StatusCode::kInvalidArgument,
        Str("memory.expert_offloading.spill_dir: ", dir.path(), " lies in memory (", type, ")"));
    EXPECT_STATUS(status, StatusCode::kInvalidArgument, "name a folder on a disk, or leave");
  }
}

// What statvfs promises, fallocate may refuse: a quota, another process.
TEST(Spill, RefusesWhatCannotBeAllocated) {
  Status status = OkStatus();
  const bool mounted = WithSmallDisk("tmpfs", "size=1m", [&](const std::string& dir) {
    const StatusOr<SpillFd> file = OpenSpillFile(dir);
    ASSERT_OK(file);
    status = AllocateSpillFile(*file, dir, 2 << 20).status();
  });
  if (!mounted) GTEST_SKIP() << "mounts are not allowed here";
  EXPECT_STATUS(status, StatusCode::kResourceExhausted, "need 2097152 bytes, 1048576 bytes");
}

// ramfs has no O_DIRECT, cannot allocate, and knows no sizes.
TEST(Spill, WorksOnAFileSystemThatCanDoLittle) {
  Status status = Internal("not tried");
  std::string text;
  const BlockTable table = WeightSlots(6, 10'000);
  const bool mounted = WithSmallDisk("ramfs", "", [&](const std::string& dir) {
    StatusOr<std::unique_ptr<Spill>> spill = MakeSpill(dir, table);
    ASSERT_OK(spill);
    text = (*spill)->Describe();
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ResidentSet> set,
                         ResidentSet::Create(table, {.budget_bytes = 25'000}, *std::move(spill)));
    for (uint32_t slot = 0; slot < 6; ++slot) ASSERT_OK(Fill(*set, slot, 1, 10'000));
    for (uint32_t slot = 0; slot < 6; ++slot) ASSERT_OK(Check(*set, slot, 1, 10'000));
    status = OkStatus();
  });
  if (!mounted) GTEST_SKIP() << "mounts are not allowed here";
  EXPECT_OK(status);
  EXPECT_NE(text.find("buffered: no O_DIRECT here, not allocated in advance"), std::string::npos)
      << text;
}

TEST(Spill, RemovesTheNameWhereAFileNeedsOne) {
  const DiskDir dir;
  ASSERT_OK_AND_ASSIGN(const SpillFd first, OpenNamedSpillFile(dir.path()));
  ASSERT_OK_AND_ASSIGN(const SpillFd second, OpenNamedSpillFile(dir.path()));
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  EXPECT_OK(AllocateSpillFile(first, dir.path(), kPageBytes));
  EXPECT_OK(AllocateSpillFile(second, dir.path(), kPageBytes));
  EXPECT_STATUS(OpenNamedSpillFile(dir.path() + "/missing"), StatusCode::kInvalidArgument,
                "create the folder");
}

TEST(Spill, KnowsFileSystemsThatAreNotADisk) {
  EXPECT_NE(FileSystemNote(0x6969).find("network"), std::string_view::npos);
  EXPECT_NE(FileSystemNote(static_cast<int32_t>(0xff534d42)).find("network"),
            std::string_view::npos);
  EXPECT_NE(FileSystemNote(0x65735546).find("FUSE"), std::string_view::npos);
  EXPECT_EQ(FileSystemNote(0xef53), "");  // ext4
}

TEST(Spill, SaysHowItReachesTheDisk) {
  const DiskDir dir;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Spill> spill,
                       MakeSpill(dir.path(), WeightSlots(2, 1 << 20)));
  const std::string text = spill->Describe();
  EXPECT_NE(text.find("spill files of 2MiB in " + dir.path() + " (threads"), std::string::npos)
      << text;
}

}  // namespace
}  // namespace heddle::offload
