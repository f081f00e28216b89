#include "cli/commands/local_cluster.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <sstream>
#include <thread>

#include "base/clock/clock.h"
#include "cli/commands/client.h"
#include "cli/commands/verb.h"

namespace heddle::cli {
namespace {

using std::chrono::milliseconds;

constexpr int64_t kPollMs = 20;
constexpr size_t kLogTailBytes = 600;
constexpr off_t kDaemonLogBytesMax = off_t{64} << 20;

std::string Address(const LocalClusterOptions& options) {
  return Str("unix:", options.state, "/coordinator.sock");
}

std::string WorkerState(const LocalClusterOptions& options, int64_t number) {
  return Str(options.state, "/worker-", number);
}

// State folders of workers that were ever part of this cluster.
std::vector<std::string> WorkerStates(const LocalClusterOptions& options) {
  std::vector<std::string> states;
  DIR* folder = opendir(options.state.c_str());
  for (dirent* entry = folder == nullptr ? nullptr : readdir(folder); entry != nullptr;
       entry = readdir(folder)) {
    const std::string name = entry->d_name;
    if (name.rfind("worker-", 0) == 0 && name.find('.') == std::string::npos) {
      states.push_back(Str(options.state, "/", name));
    }
  }
  if (folder != nullptr) {
    closedir(folder);
  }
  return states;
}

CommandContext ContextOf(const LocalClusterOptions& options) {
  CommandContext context;
  context.coordinator = Address(options);
  context.timeout_ms = 2'000;
  return context;
}

// The number of a folder of /proc; 0 for its other entries.
int PidOf(const std::string& name) {
  int pid = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), pid);
  return error == std::errc() && end == name.data() + name.size() ? pid : 0;
}

std::vector<std::string> ReadArguments(const std::string& pid) {
  std::ifstream file(Str("/proc/", pid, "/cmdline"), std::ios::binary);
  std::vector<std::string> arguments;
  for (std::string word; std::getline(file, word, '\0');) {
    arguments.push_back(word);
  }
  return arguments;
}

std::string LogTail(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  const std::string all = text.str();
  return all.size() <= kLogTailBytes ? all : all.substr(all.size() - kLogTailBytes);
}

// Daemons append over all their lives: a log that became long is put aside when one starts, in
// place of the one before it.
void PutLongLogAside(const std::string& log) {
  struct stat info = {};
  if (stat(log.c_str(), &info) == 0 && info.st_size > kDaemonLogBytesMax) {
    (void)rename(log.c_str(), (log + ".1").c_str());  // else it grows on: no reason not to start
  }
}

// Starts a program in its own session with its output in `log`. A double fork: the daemon belongs
// to init, not to this short-lived command.
Status Spawn(const std::vector<std::string>& arguments, const std::string& log) {
  std::vector<char*> argv;
  for (const std::string& word : arguments) {
    argv.push_back(const_cast<char*>(word.c_str()));
  }
  argv.push_back(nullptr);
  if (access(argv[0], X_OK) != 0) {
    return FromErrno("cannot run", arguments[0]);
  }
  PutLongLogAside(log);
  const pid_t child = fork();
  if (child < 0) {
    return FromErrno("cannot fork for", arguments[0]);
  }
  if (child == 0) {
    sigset_t none;  // what this command blocks is not the daemon's business
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    setsid();
    if (fork() != 0) {
      _exit(0);
    }
    const int out = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
    const int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(in, 0);
    dup2(out, 1);
    dup2(out, 2);
    for (int fd = 3; fd < 256; ++fd) {
      close(fd);
    }
    execv(argv[0], argv.data());
    _exit(127);
  }
  int ignored = 0;
  waitpid(child, &ignored, 0);
  return OkStatus();
}

// An existing folder belongs to its owner: its mode is not ours to change. But whoever can write to
// it could put another socket or other state in place of ours (reliability S1, S18).
Status CheckFolder(const std::string& path) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0) {
    return FromErrno("cannot read", path);
  }
  if (!S_ISDIR(info.st_mode)) {
    return InvalidArgument(Str(path, ": is not a folder; give another one: --state DIR"));
  }
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return FailedPrecondition(Str(path, ": other users can write to this folder: chmod go-w ", path,
                                  ", or give another one: --state DIR"));
  }
  return OkStatus();
}

// New ones are private.
Status MakeFolder(const std::string& path) {
  for (size_t slash = path.find('/', 1); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    mkdir(path.substr(0, slash).c_str(), 0755);
  }
  if (mkdir(path.c_str(), 0700) == 0) {
    return OkStatus();
  }
  return errno == EEXIST ? CheckFolder(path) : FromErrno("cannot make", path);
}

// Polls `ready` until true; `alive` false ends it early with the end of the log.
Status AwaitStart(const std::string& what, const std::string& log, int64_t timeout_ms,
                  const std::function<bool()>& ready, const std::function<bool()>& alive) {
  const SystemClock clock;
  const int64_t start = clock.NowSteady();
  while (!ready()) {
    const int64_t waited = (clock.NowSteady() - start) / 1'000'000;
    if (waited > 500 && !alive()) {
      return Unavailable(Str(what, " ended while starting; the end of ", log, ":\n", LogTail(log)));
    }
    if (waited > timeout_ms) {
      return Unavailable(Str(what, " did not answer in ", timeout_ms / 1000, " s; see ", log));
    }
    std::this_thread::sleep_for(milliseconds(kPollMs));
  }
  return OkStatus();
}

// A coordinator that lives but cannot be reached: somebody removed its socket.
Status ExplainSilence(const LocalClusterOptions& options, const Status& silence) {
  const std::vector<int> pids = FindDaemons("heddle-coordinator", options.state);
  const std::string socket = Str(options.state, "/coordinator.sock");
  if (pids.empty() || access(socket.c_str(), F_OK) == 0) {
    return silence;
  }
  return FailedPrecondition(Str("heddle-coordinator runs (pid ", pids.front(), "), but its socket ",
                                socket, " is gone, so nobody can reach it: kill ", pids.front(),
                                ", then heddle up again; jobs go on meanwhile"));
}

Status StartCoordinator(const LocalClusterOptions& options, Client& client) {
  const std::string log = Str(options.state, "/coordinator.log");
  if (FindDaemons("heddle-coordinator", options.state).empty()) {
    RETURN_IF_ERROR(Spawn({Str(options.program_dir, "/heddle-coordinator"), "--state",
                           options.state, "--listen", Address(options)},
                          log));
  }
  const Status started = AwaitStart(
      "heddle-coordinator", log, options.start_timeout_ms,
      [&] { return client.ClusterStatus().ok(); },
      [&] { return !FindDaemons("heddle-coordinator", options.state).empty(); });
  return started.ok() ? started : ExplainSilence(options, started);
}

// What this command was granted (affinity, cgroup) its daemons inherit: they divide that, not the
// machine.
Status StartWorkers(const LocalClusterOptions& options) {
  for (int64_t i = 1; i <= options.workers; ++i) {
    const std::string state = WorkerState(options, i);
    RETURN_IF_ERROR(MakeFolder(state));
    if (!FindDaemons("heddle-worker", state).empty()) {
      continue;
    }
    std::vector<std::string> words = {Str(options.program_dir, "/heddle-worker"),
                                      "--state",
                                      state,
                                      "--coordinator",
                                      Address(options),
                                      "--share",
                                      Str(options.workers),
                                      "--data-address",
                                      "127.0.0.1"};
    // A GPU that two workers offered would be booked twice.
    if (i > 1) words.insert(words.end(), {"--gpus", "0"});
    RETURN_IF_ERROR(Spawn(words, Str(options.state, "/worker-", i, ".log")));
  }
  return OkStatus();
}

// Of how many workers the running cluster is: what those that live were told to share with, also if
// others died since. 0: none runs.
int64_t WorkersOf(const LocalClusterOptions& options) {
  int64_t workers = 0;
  for (const std::string& state : WorkerStates(options)) {
    for (const int pid : FindDaemons("heddle-worker", state)) {
      const std::vector<std::string> argv = ReadArguments(Str(pid));
      const auto share = std::find(argv.begin(), argv.end(), "--share");
      if (share != argv.end() && share + 1 != argv.end()) {
        workers = std::max<int64_t>(workers, std::atoll((share + 1)->c_str()));
      }
    }
  }
  return workers;
}

StatusOr<int64_t> WorkersToRun(const LocalClusterOptions& options) {
  const int64_t running = WorkersOf(options);
  if (running == 0) {
    return options.workers == 0 ? kLocalWorkers : options.workers;
  }
  if (options.workers != 0 && options.workers != running) {
    return FailedPrecondition(Str("the cluster in ", options.state, " is of ", running,
                                  " workers, not ", options.workers,
                                  ": for another number, heddle down first"));
  }
  return running;
}

int Connected(Client& client) {
  const StatusOr<v1::StatusReply> status = client.ClusterStatus();
  return status.ok() ? static_cast<int>(status->nodes().connected()) : 0;
}

// A drain that `down` asked for is over once the cluster is wanted again.
Status ReopenNodes(Client& client) {
  ASSIGN_OR_RETURN(const v1::NodeList nodes, client.Nodes());
  for (const v1::Node& node : nodes.nodes()) {
    if (node.admin() == "DRAINING" || node.admin() == "DRAINED") {
      v1::NodeAdminRequest request;
      request.set_node(node.id());
      request.set_verb(v1::NODE_VERB_REOPEN);
      request.set_reason("heddle up");
      request.set_request_id(NewRequestId());
      RETURN_IF_ERROR(client.Administer(request).status());
    }
  }
  return OkStatus();
}

std::vector<int> AllDaemons(const LocalClusterOptions& options) {
  std::vector<int> all = FindDaemons("heddle-coordinator", options.state);
  for (const std::string& state : WorkerStates(options)) {
    const std::vector<int> workers = FindDaemons("heddle-worker", state);
    all.insert(all.end(), workers.begin(), workers.end());
  }
  return all;
}

// Shims and ranks of this cluster: their argv or environment names the state folder.
std::vector<int> AllTasks(const LocalClusterOptions& options) {
  std::vector<int> all;
  DIR* proc = opendir("/proc");
  for (dirent* entry = readdir(proc); entry != nullptr; entry = readdir(proc)) {
    const int pid = PidOf(entry->d_name);
    const std::vector<std::string> argv =
        pid > 0 ? ReadArguments(entry->d_name) : std::vector<std::string>{};
    if (argv.size() >= 3 && argv[0].ends_with("heddle-shim") && argv[1] == "run" &&
        argv[2].rfind(options.state + "/", 0) == 0) {
      all.push_back(pid);
    }
  }
  closedir(proc);
  return all;
}

void Drain(const LocalClusterOptions& options, Client& client) {
  const StatusOr<v1::NodeList> nodes = client.Nodes();
  if (!nodes.ok()) {
    return;
  }
  for (const v1::Node& node : nodes->nodes()) {
    v1::NodeAdminRequest request;
    request.set_node(node.id());
    request.set_verb(v1::NODE_VERB_DRAIN);
    request.set_reason("heddle down");
    request.set_grace_ms(options.stop_timeout_ms / 2);
    request.set_request_id(NewRequestId());
    (void)client.Administer(request);  // a worker that is away is ended by signal below
  }
  const SystemClock clock;
  const Deadline deadline(clock, milliseconds(options.stop_timeout_ms));
  while (!AllTasks(options).empty() && !deadline.Passed(clock)) {
    std::this_thread::sleep_for(milliseconds(50));
  }
}

void SignalAll(const std::vector<int>& pids, int signal) {
  for (const int pid : pids) {
    kill(pid, signal);
  }
}

}  // namespace

std::vector<int> FindDaemons(const std::string& program, const std::string& state) {
  std::vector<int> found;
  DIR* proc = opendir("/proc");
  for (dirent* entry = readdir(proc); entry != nullptr; entry = readdir(proc)) {
    const int pid = PidOf(entry->d_name);
    if (pid <= 0) {
      continue;
    }
    const std::vector<std::string> argv = ReadArguments(entry->d_name);
    if (argv.empty() || !(argv[0] == program || argv[0].ends_with("/" + program))) {
      continue;
    }
    for (size_t i = 1; i + 1 < argv.size(); ++i) {
      if (argv[i] == "--state" && argv[i + 1] == state) {
        found.push_back(pid);
        break;
      }
    }
  }
  closedir(proc);
  return found;
}

StatusOr<RunningCluster> StartLocalCluster(const LocalClusterOptions& wanted) {
  LocalClusterOptions options = wanted;
  RETURN_IF_ERROR(MakeFolder(options.state));
  ASSIGN_OR_RETURN(options.workers, WorkersToRun(options));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(ContextOf(options)));
  RETURN_IF_ERROR(StartCoordinator(options, *client));
  RETURN_IF_ERROR(StartWorkers(options));
  const auto all_live = [&] {
    return static_cast<int64_t>(AllDaemons(options).size()) >= options.workers + 1;
  };
  // One that was killed a moment ago may still count as connected: its follower must be there too.
  RETURN_IF_ERROR(AwaitStart(
      "heddle-worker", Str(options.state, "/worker-1.log"), options.start_timeout_ms,
      [&] { return Connected(*client) >= options.workers && all_live(); }, all_live));
  RETURN_IF_ERROR(ReopenNodes(*client));
  return RunningCluster{.coordinator = Address(options), .workers = options.workers};
}

Status StopLocalCluster(const LocalClusterOptions& options) {
  if (!FindDaemons("heddle-coordinator", options.state).empty()) {
    ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(ContextOf(options)));
    Drain(options, *client);
  }
  SignalAll(AllDaemons(options), SIGTERM);
  const SystemClock clock;
  const Deadline deadline(clock, milliseconds(10'000));
  while (!AllDaemons(options).empty() && !deadline.Passed(clock)) {
    std::this_thread::sleep_for(milliseconds(20));
  }
  SignalAll(AllDaemons(options), SIGKILL);
  SignalAll(AllTasks(options), SIGKILL);  // their ranks die with them
  return OkStatus();
}

}  // namespace heddle::cli
