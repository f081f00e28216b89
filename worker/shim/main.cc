// heddle-shim: `run TASKDIR` starts and owns the ranks of one task, `init -- CMD...` is process 1
// of a container. Static and small: one stays beside every task.

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <utility>

#include "worker/control/rank_page.h"
#include "worker/control/task_files.h"
#include "worker/shim/init.h"
#include "worker/shim/task.h"

namespace heddle::shim {
namespace {

constexpr char kUsage[] =
    "usage: heddle-shim run TASKDIR     start the ranks of the task; prints `ready` or the error\n"
    "       heddle-shim init -- CMD...  process 1 of a container around heddle-worker\n"
    "       heddle-shim version\n";

// The one line the daemon waits for on our stdout.
int Refuse(const std::string& error) {
  dprintf(STDOUT_FILENO, "error: %s\n", error.c_str());
  return 1;
}

// stdin from nowhere, stdout and stderr to shim.log; everything else inherited is closed.
void ArrangeFiles(int log_fd) {
  const int null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (null_fd >= 0) dup2(null_fd, STDIN_FILENO);
  if (log_fd >= 0) dup2(log_fd, STDERR_FILENO);
  syscall(SYS_close_range, 3, ~0U, 0);
}

// The shim itself, in its own session.
int Own() {
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  prctl(PR_SET_NAME, "heddle-shim");
  std::string bytes;
  std::string error;
  control::LaunchFile launch;
  if (!control::ReadWholeFile("launch", &bytes)) {
    return Refuse(std::string("launch: ") + strerror(errno));
  }
  if (!control::DecodeLaunch(bytes, &launch, &error)) return Refuse(error);
  std::unique_ptr<control::ContactFile> contact = control::ContactFile::Open("contact");
  if (contact == nullptr) return Refuse(std::string("contact: ") + strerror(errno));
  Task task(std::move(launch), std::move(contact));
  error = task.Prepare();
  if (!error.empty()) return Refuse(error);
  task.Spawn();
  dprintf(STDOUT_FILENO, "ready\n");
  dup2(STDERR_FILENO, STDOUT_FILENO);
  task.Run();
  return 0;
}

// Twice forked: no controlling terminal, no relation to the daemon.
int RunTask(const char* folder) {
  if (chdir(folder) != 0) return Refuse(std::string(folder) + ": " + strerror(errno));
  ArrangeFiles(open("shim.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  const pid_t first = fork();
  if (first < 0) return Refuse(std::string("fork: ") + strerror(errno));
  if (first > 0) return 0;
  setsid();
  const pid_t second = fork();
  if (second < 0) return Refuse(std::string("fork: ") + strerror(errno));
  if (second > 0) _exit(0);
  return Own();
}

int Main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "run" && argc == 3) return RunTask(argv[2]);
  if (verb == "init" && argc > 3 && std::string(argv[2]) == "--") return RunInit(argv + 3);
  if (verb == "version") {
    printf("heddle-shim protocol %u\n", static_cast<unsigned>(control::kProtocolVersion));
    return 0;
  }
  fputs(kUsage, stderr);
  return 2;
}

}  // namespace
}  // namespace heddle::shim

int main(int argc, char** argv) { return heddle::shim::Main(argc, argv); }
