// Looking at ranks without their help: real child processes, running and stopped.
#include "worker/daemon/rank_watch.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "worker/control/stack_dump.h"
#include "worker/control/task_files.h"
#include "worker/daemon/process_probe.h"
#include "worker/daemon/symbols.h"

// With a name in the symbol table, and never inlined.
extern "C" __attribute__((noinline)) void heddle_test_sleeps_here() {
  while (true) {
    pause();
    asm volatile("");
  }
}

namespace heddle::worker {
namespace {

using control::RankPage;

// A child that shows its stacks on request: one thread besides the main one.
class Child {
 public:
  explicit Child(const std::string& page_path, bool shows_stacks = true) {
    int ready[2];
    EXPECT_EQ(pipe(ready), 0);
    pid_ = fork();
    if (pid_ == 0) {
      static std::unique_ptr<RankPage> page = RankPage::Open(page_path);
      if (page == nullptr) _exit(3);
      if (shows_stacks) control::DumpStacksOnSignal(page.get());
      std::thread other([&] {
        pthread_setname_np(pthread_self(), "second");
        EXPECT_EQ(write(ready[1], "x", 1), 1);
        heddle_test_sleeps_here();
      });
      heddle_test_sleeps_here();
    }
    char byte = 0;
    EXPECT_EQ(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    for (int i = 0; i < 500 && Sleeping() < 2; ++i) usleep(10'000);
    EXPECT_EQ(Sleeping(), 2);
  }
  ~Child() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  int pid() const { return pid_; }
  void WaitFor(const std::string& state) const {
    for (int i = 0; i < 500 && ProcessState(pid_) != state; ++i) usleep(10'000);
    EXPECT_EQ(ProcessState(pid_), state);
  }

 private:
  // Threads that are in pause().
  int Sleeping() const {
    int count = 0;
    std::error_code ignored;
    for (const auto& task :
         std::filesystem::directory_iterator("/proc/" + std::to_string(pid_) + "/task", ignored)) {
      std::ifstream file(task.path() / "syscall");
      int number = -1;
      count += file >> number && number == SYS_pause ? 1 : 0;
    }
    return count;
  }

  pid_t pid_ = -1;
};

RankTarget TargetOf(const Child& child, RankPage* page) {
  return {.rank = 1,
          .pid = child.pid(),
          .start_ticks = control::ProcessStartTicks(child.pid()),
          .page = page};
}

TEST(DescribeStacks, NamesTheFunctionThatEveryThreadIsIn) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  const Child child(dir.path() + "/page-0");
  const std::string text = DescribeStacks(TargetOf(child, page.get()));
  EXPECT_NE(text.find("heddle_test_sleeps_here"), std::string::npos) << text;
  EXPECT_NE(text.find("heddle_test_sleeps_here", text.find("second")), std::string::npos) << text;
  EXPECT_EQ(text.rfind("thread " + std::to_string(child.pid()), 0), 0u) << "main first:\n" << text;
  // It goes on as before, and may be asked again.
  EXPECT_NE(DescribeStacks(TargetOf(child, page.get())).find("heddle_test_sleeps_here"),
            std::string::npos);
  EXPECT_EQ(ProcessState(child.pid()), "S");
}

TEST(DescribeStacks, AStoppedProcessIsDescribedByTheKernel) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  const Child child(dir.path() + "/page-0");
  kill(child.pid(), SIGSTOP);
  child.WaitFor("T");
  const std::string text = DescribeStacks(TargetOf(child, page.get()));
  EXPECT_NE(text.find(" T"), std::string::npos) << text;
  EXPECT_NE(text.find("second"), std::string::npos) << text;
  EXPECT_EQ(text.find("heddle_test_sleeps_here"), std::string::npos) << text;
  std::string shown;  // root's alone
  if (control::ReadWholeFile("/proc/self/stack", &shown) && !shown.empty()) {
    EXPECT_NE(text.find(", kernel do_signal_stop < "), std::string::npos) << text;
  }
}

// SIGUSR2 ends a process that does not handle it.
TEST(DescribeStacks, NeverSignalsAProcessThatDidNotAllowIt) {
  const test::TempDir dir;
  const auto page = RankPage::Create(dir.path() + "/page-0");
  const Child child(dir.path() + "/page-0", /*shows_stacks=*/false);
  EXPECT_NE(DescribeStacks(TargetOf(child, page.get())).find("second"), std::string::npos);
  EXPECT_EQ(ProcessState(child.pid()), "S");
  RankTarget other = TargetOf(child, page.get());
  page->AllowStackSignal();
  other.start_ticks += 1;  // the number belongs to another process by now
  EXPECT_EQ(DescribeStacks(other), "the process is gone\n");
  EXPECT_EQ(ProcessState(child.pid()), "S");
}

TEST(ProcessProbe, TellsStateMemoryAndIdentity) {
  EXPECT_EQ(ProcessState(getpid()), "R");
  EXPECT_GT(PeakResidentBytes(getpid()), uint64_t{1} << 20);
  EXPECT_TRUE(IsSameProcess(getpid(), control::ProcessStartTicks(getpid())));
  EXPECT_FALSE(IsSameProcess(getpid(), 1));
  const pid_t gone = fork();
  if (gone == 0) _exit(0);
  waitpid(gone, nullptr, 0);
  EXPECT_EQ(ProcessState(gone), "");
  EXPECT_EQ(PeakResidentBytes(gone), 0u);
  EXPECT_TRUE(ThreadsOf(gone, 8).empty());
  EXPECT_EQ(ProcessState(0), "");
}

// The memory plan does not count them.
TEST(ProcessProbe, PagesOfFilesAreNoMemoryOfTheProcess) {
  const int file = open("/proc/self/exe", O_RDONLY);
  ASSERT_GE(file, 0);
  struct stat info = {};
  ASSERT_EQ(fstat(file, &info), 0);
  const auto size = static_cast<size_t>(info.st_size);
  const uint64_t before = PeakResidentBytes(getpid());
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  EXPECT_LT(PeakResidentBytes(getpid()), before + size / 2);
  munmap(mapped, size);
  close(file);
}

TEST(Symbols, ParsesLinesOfMapsAndRefusesOthers) {
  Mapping mapping;
  ASSERT_TRUE(
      ParseMapping("7f1200-7f3400 r-xp 00001000 08:01 42     /usr/lib/a file.so", &mapping));
  EXPECT_EQ(mapping.begin, 0x7f1200u);
  EXPECT_EQ(mapping.end, 0x7f3400u);
  EXPECT_EQ(mapping.offset, 0x1000u);
  EXPECT_EQ(mapping.file, "/usr/lib/a file.so");
  EXPECT_FALSE(ParseMapping("7f1200-7f3400 rw-p 00001000 08:01 42     /usr/lib/a.so", &mapping));
  EXPECT_FALSE(ParseMapping("7f1200-7f3400 r-xp 00000000 00:00 0      [vdso]", &mapping));
  EXPECT_FALSE(ParseMapping("7f1200-7f3400 r-xp 00000000 00:00 0", &mapping));
  EXPECT_FALSE(ParseMapping("", &mapping));
  EXPECT_FALSE(ParseMapping("nonsense", &mapping));
}

TEST(Symbols, NamesOwnFunctionsAndLeavesTheRestAsNumbers) {
  const std::vector<Mapping> mappings = ReadMappings(getpid());
  ASSERT_FALSE(mappings.empty());
  const auto here = reinterpret_cast<uint64_t>(&heddle_test_sleeps_here);
  const std::vector<std::string> names = NameAddresses(mappings, {here + 5, 0, uint64_t{1} << 60});
  ASSERT_EQ(names.size(), 3u);
  EXPECT_EQ(names[0], "heddle_test_sleeps_here+0x5");
  EXPECT_EQ(names[1], "0x0");
  EXPECT_EQ(names[2], "0x1000000000000000");
}

// A file that is no ELF file, or one cut short, gives no names and no crash.
TEST(Symbols, FilesThatAreNoProgramsGiveNumbers) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/odd.so";
  for (const std::string& bytes : {std::string(), std::string("hello"),
                                   std::string("\x7f"
                                               "ELF\x02") +
                                       std::string(200, '\xff')}) {
    FILE* file = fopen(path.c_str(), "wb");
    fwrite(bytes.data(), 1, bytes.size(), file);
    fclose(file);
    const std::vector<std::string> names =
        NameAddresses({{.begin = 0x1000, .end = 0x2000, .offset = 0, .file = path}}, {0x1010});
    EXPECT_EQ(names[0], "odd.so+0x10");
  }
}

}  // namespace
}  // namespace heddle::worker
