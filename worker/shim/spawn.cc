#include "worker/shim/spawn.h"

#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace heddle::shim {
namespace {

using control::LaunchStep;

constexpr int kErrorFd = control::kControlFd + 1;

// Everything the child needs, built before the fork so that it allocates nothing after it.
struct ChildPlan {
  pid_t shim = 0;
  int control_fd = -1;
  int log_fd = -1;
  int error_fd = -1;
  bool bind_cpus = false;
  cpu_set_t cpus;
  std::vector<char*> argv;
  std::vector<char*> env;
  std::vector<std::string> programs;  // candidates for execve, in order
  const SpawnOptions* options = nullptr;
};

[[noreturn]] void Fail(int fd, LaunchStep step, int error) {
  const LaunchFailure failure = {static_cast<uint32_t>(step), error};
  if (write(fd, &failure, sizeof(failure)) < 0) _exit(126);
  _exit(127);
}

// Moves the child's ends to their numbers and closes everything else.
void ArrangeFiles(ChildPlan* plan) {
  // First out of the way of the numbers they will get.
  const int log_fd = fcntl(plan->log_fd, F_DUPFD, 16);
  const int error_fd = fcntl(plan->error_fd, F_DUPFD_CLOEXEC, 16);
  const int control_fd = plan->control_fd < 0 ? -1 : fcntl(plan->control_fd, F_DUPFD, 16);
  if (log_fd < 0 || error_fd < 0) Fail(plan->error_fd, LaunchStep::kPipes, errno);
  const int null_fd = open("/dev/null", O_RDONLY);
  if (null_fd < 0 || dup2(null_fd, 0) < 0 || dup2(log_fd, 1) < 0 || dup2(log_fd, 2) < 0) {
    Fail(error_fd, LaunchStep::kPipes, errno);
  }
  if (dup3(error_fd, kErrorFd, O_CLOEXEC) < 0) Fail(error_fd, LaunchStep::kPipes, errno);
  plan->error_fd = kErrorFd;
  if (plan->control_fd < 0) {
    close(control::kControlFd);
  } else if (control_fd < 0 || dup2(control_fd, control::kControlFd) < 0) {
    Fail(kErrorFd, LaunchStep::kPipes, errno);
  }
  if (syscall(SYS_close_range, kErrorFd + 1, ~0U, 0) != 0) {
    for (int fd = kErrorFd + 1; fd < 4096; ++fd) close(fd);
  }
}

void JoinCgroups(const ChildPlan& plan) {
  for (const std::string& file : plan.options->cgroup_files) {
    const int fd = open(file.c_str(), O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "0", 1) != 1) Fail(plan.error_fd, LaunchStep::kCgroup, errno);
    close(fd);
  }
}

void SetLimits(const ChildPlan& plan) {
  const rlimit no_core = {0, 0};
  rlimit files = {};
  if (setrlimit(RLIMIT_CORE, &no_core) != 0 || getrlimit(RLIMIT_NOFILE, &files) != 0) {
    Fail(plan.error_fd, LaunchStep::kLimits, errno);
  }
  files.rlim_cur = files.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &files) != 0) Fail(plan.error_fd, LaunchStep::kLimits, errno);
  if (plan.bind_cpus && sched_setaffinity(0, sizeof(plan.cpus), &plan.cpus) != 0) {
    Fail(plan.error_fd, LaunchStep::kAffinity, errno);
  }
}

void ResetSignals() {
  for (int number = 1; number < NSIG; ++number) signal(number, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
}

void ChangeUser(const ChildPlan& plan) {
  const SpawnOptions& options = *plan.options;
  if (options.uid < 0) return;
  const uid_t uid = static_cast<uid_t>(options.uid);
  const gid_t gid = static_cast<gid_t>(options.gid);
  if (setgroups(1, &gid) != 0 || setresgid(gid, gid, gid) != 0 || setresuid(uid, uid, uid) != 0) {
    Fail(plan.error_fd, LaunchStep::kUser, errno);
  }
}

// Own cgroup -> limits -> files -> user -> no_new_privs -> PDEATHSIG -> execve (S21). Private
// mounts, Landlock and seccomp have their place before execve.
[[noreturn]] void RunChild(ChildPlan* plan) {
  setpgid(0, 0);
  JoinCgroups(*plan);
  SetLimits(*plan);
  ArrangeFiles(plan);
  ResetSignals();
  ChangeUser(*plan);
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  // After the change of user, which clears it (D12); the shim may be gone already.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != plan->shim) Fail(plan->error_fd, LaunchStep::kParentGone, ESRCH);
  const std::string& folder = plan->options->working_dir;
  if (!folder.empty() && chdir(folder.c_str()) != 0) {
    Fail(plan->error_fd, LaunchStep::kFolder, errno);
  }
  int error = ENOENT;
  for (const std::string& program : plan->programs) {
    execve(program.c_str(), plan->argv.data(), plan->env.data());
    if (errno != ENOENT && errno != ENOTDIR) error = errno;
  }
  Fail(plan->error_fd, LaunchStep::kExec, error);
}

// argv[0] as it is if it has a slash, else each folder of PATH in the rank's environment.
std::vector<std::string> Candidates(const control::RankLaunch& launch) {
  const std::string& program = launch.argv.front();
  if (program.find('/') != std::string::npos) return {program};
  std::string path = "/usr/local/bin:/usr/bin:/bin";
  for (const std::string& variable : launch.env) {
    if (variable.compare(0, 5, "PATH=") == 0) path = variable.substr(5);
  }
  std::vector<std::string> candidates;
  size_t start = 0;
  while (start <= path.size()) {
    size_t end = path.find(':', start);
    if (end == std::string::npos) end = path.size();
    if (end > start) candidates.push_back(path.substr(start, end - start) + "/" + program);
    start = end + 1;
  }
  return candidates;
}

ChildPlan MakePlan(const control::RankLaunch& launch, const SpawnOptions& options) {
  ChildPlan plan;
  plan.shim = getpid();
  plan.options = &options;
  plan.programs = Candidates(launch);
  for (const std::string& word : launch.argv) plan.argv.push_back(const_cast<char*>(word.c_str()));
  for (const std::string& word : launch.env) plan.env.push_back(const_cast<char*>(word.c_str()));
  plan.argv.push_back(nullptr);
  plan.env.push_back(nullptr);
  CPU_ZERO(&plan.cpus);
  for (const uint32_t cpu : launch.cpus) {
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &plan.cpus);
  }
  plan.bind_cpus = CPU_COUNT(&plan.cpus) > 0;
  return plan;
}

void CloseAll(std::initializer_list<int> fds) {
  for (const int fd : fds) {
    if (fd >= 0) close(fd);
  }
}

}  // namespace

SpawnedRank SpawnRank(const control::RankLaunch& launch, const SpawnOptions& options) {
  SpawnedRank rank;
  int log[2] = {-1, -1};
  int error[2] = {-1, -1};
  int link[2] = {-1, -1};
  const bool ready =
      pipe2(log, O_CLOEXEC) == 0 && pipe2(error, O_CLOEXEC) == 0 &&
      (!options.control || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, link) == 0);
  if (!ready) {
    rank.error = errno;
    rank.failed_step = LaunchStep::kPipes;
    CloseAll({log[0], log[1], error[0], error[1], link[0], link[1]});
    return rank;
  }
  ChildPlan plan = MakePlan(launch, options);
  plan.log_fd = log[1];
  plan.error_fd = error[1];
  plan.control_fd = link[1];
  const pid_t pid = fork();
  if (pid == 0) RunChild(&plan);
  rank.error = errno;
  CloseAll({log[1], error[1], link[1]});
  if (pid < 0) {
    rank.failed_step = LaunchStep::kFork;
    CloseAll({log[0], error[0], link[0]});
    return rank;
  }
  setpgid(pid, pid);  // whoever is first; the kill path relies on it
  rank.pid = pid;
  rank.error = 0;
  rank.control_fd = link[0];
  rank.log_fd = log[0];
  rank.error_fd = error[0];
  for (const int fd : {rank.control_fd, rank.log_fd, rank.error_fd}) {
    if (fd >= 0) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  }
  return rank;
}

}  // namespace heddle::shim
