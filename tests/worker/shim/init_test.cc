#include "worker/shim/init.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "tests/support/worker/temp_dir.h"
#include "worker/control/task_files.h"

namespace heddle::shim {
namespace {

// `heddle-shim init -- /bin/sh -c SCRIPT` as a child of the test.
struct Init {
  explicit Init(const std::string& script) {
    pid = fork();
    if (pid != 0) return;
    const std::string shim =
        std::string(getenv("HEDDLE_BIN") == nullptr ? "build/bin" : getenv("HEDDLE_BIN")) +
        "/heddle-shim";
    execl(shim.c_str(), shim.c_str(), "init", "--", "/bin/sh", "-c", script.c_str(), nullptr);
    _exit(126);
  }
  int Wait() {
    int status = 0;
    const bool ended = test::WaitUntil([&] { return waitpid(pid, &status, WNOHANG) == pid; });
    if (!ended) {
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      return -1;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  pid_t pid;
};

int Lines(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  int count = 0;
  while (std::getline(file, line)) ++count;
  return count;
}

TEST(Init, RestartsACrashedDaemonAndEndsWithAGoodOne) {
  const test::TempDir dir;
  const std::string runs = dir.path() + "/runs";
  Init init("echo x >> " + runs + "; test $(wc -l < " + runs + ") -ge 3 || kill -SEGV $$");
  EXPECT_EQ(init.Wait(), 0);
  EXPECT_EQ(Lines(runs), 3);
}

TEST(Init, UsageErrorsAreNotRetried) {
  const test::TempDir dir;
  Init init("echo x >> " + dir.path() + "/runs; exit 2");
  EXPECT_EQ(init.Wait(), 2);
  EXPECT_EQ(Lines(dir.path() + "/runs"), 1);
}

TEST(Init, ForwardsSigtermAndDoesNotRestartAfterIt) {
  const test::TempDir dir;
  const std::string mark = dir.path() + "/mark";
  Init init("trap 'echo term > " + mark + "; exit 7' TERM; echo > " + dir.path() +
            "/up; while :; do sleep 0.05; done");
  ASSERT_TRUE(test::WaitUntil([&] { return access((dir.path() + "/up").c_str(), F_OK) == 0; }));
  kill(init.pid, SIGTERM);
  EXPECT_EQ(init.Wait(), 7);
  EXPECT_EQ(Lines(mark), 1);
}

TEST(Init, ReapsWhatTheDaemonLeftBehind) {
  const test::TempDir dir;
  // The grandchild is orphaned, adopted by init and ends there.
  Init init("( sleep 0.1 & echo $! > " + dir.path() + "/pid ); sleep 0.5; exit 0");
  EXPECT_EQ(init.Wait(), 0);
  std::string pid;
  ASSERT_TRUE(control::ReadWholeFile(dir.path() + "/pid", &pid));
  EXPECT_EQ(control::ProcessStartTicks(std::stoi(pid)), 0u) << "a zombie is left";
}

}  // namespace
}  // namespace heddle::shim
