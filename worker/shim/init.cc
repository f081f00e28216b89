#include "worker/shim/init.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "worker/control/rank_page.h"

namespace heddle::shim {
namespace {

constexpr int kFirstBackoffMs = 100;
constexpr int kBackoffMsMax = 10'000;
constexpr int64_t kHealthyNs = int64_t{60} * 1'000'000'000;
constexpr int kUsageStatus = 2;

pid_t Start(char** argv) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execvp(argv[0], argv);
  dprintf(STDERR_FILENO, "heddle-shim init: %s: %s\n", argv[0], strerror(errno));
  _exit(kUsageStatus);
}

struct Init {
  pid_t child = -1;
  bool stopping = false;
  int status = 0;  // of the last child, as a shell tells it

  // Reaps everything; true if the daemon was among it.
  bool ReapAll() {
    bool ended = false;
    int wait_status = 0;
    pid_t pid = 0;
    while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
      if (pid != child) continue;
      ended = true;
      child = -1;
      status = WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status);
    }
    return ended;
  }

  void Forward(int signal_number) {
    if (signal_number == SIGTERM || signal_number == SIGINT) stopping = true;
    if (child > 0) kill(child, signal_number);
  }
};

}  // namespace

int RunInit(char** argv) {
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  sigset_t set;
  sigemptyset(&set);
  for (const int number : {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2}) {
    sigaddset(&set, number);
  }
  sigprocmask(SIG_BLOCK, &set, nullptr);
  const int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  if (signals < 0) return 1;

  Init init;
  int backoff_ms = kFirstBackoffMs;
  while (true) {
    const int64_t started_ns = control::BootTimeNs();
    init.child = Start(argv);
    bool ended = init.child < 0;
    while (!ended) {
      pollfd fd = {signals, POLLIN, 0};
      poll(&fd, 1, -1);
      signalfd_siginfo info = {};
      while (read(signals, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
        if (info.ssi_signo != SIGCHLD) init.Forward(static_cast<int>(info.ssi_signo));
      }
      ended = init.ReapAll();
    }
    if (init.stopping || init.status == 0 || init.status == kUsageStatus) return init.status;
    if (control::BootTimeNs() - started_ns > kHealthyNs) backoff_ms = kFirstBackoffMs;
    dprintf(STDERR_FILENO, "heddle-shim init: %s ended with %d, again in %d ms\n", argv[0],
            init.status, backoff_ms);
    // Signals wake the wait: a stop must not wait for the back-off.
    const int64_t until_ns = control::BootTimeNs() + int64_t{backoff_ms} * 1'000'000;
    int64_t left_ns = 0;
    while ((left_ns = until_ns - control::BootTimeNs()) > 0) {
      pollfd fd = {signals, POLLIN, 0};
      poll(&fd, 1, static_cast<int>(left_ns / 1'000'000) + 1);
      signalfd_siginfo info = {};
      while (read(signals, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
        if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT) return init.status;
      }
      init.ReapAll();
    }
    backoff_ms = std::min(backoff_ms * 2, kBackoffMsMax);
  }
}

}  // namespace heddle::shim
