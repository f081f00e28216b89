// heddle-worker as a process between a fake coordinator and real shims with fake trainers: what
// tests of several files share.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "tests/support/worker/fake_coordinator.h"
#include "tests/support/worker/processes.h"
#include "tests/support/worker/temp_dir.h"
#include "worker/control/rank_page.h"
#include "worker/daemon/task_folder.h"

namespace heddle::worker {

using std::chrono::milliseconds;
using test::FakeCoordinator;
using test::ProcessesWith;
using test::WaitUntil;

inline int64_t WallMs() {
  timespec now = {};
  clock_gettime(CLOCK_REALTIME, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

class Daemon : public ::testing::Test {
 protected:
  Daemon() : coordinator_(dir_.path() + "/c.sock") { coordinator_.Start(); }
  ~Daemon() override {
    EndDaemon(SIGKILL);
    coordinator_.Stop();
    for (const int pid : ProcessesWith(state())) kill(pid, SIGKILL);
    WaitUntil([this] { return ProcessesWith(state()).empty(); });
    if (HasFailure()) {
      std::string log;
      control::ReadWholeFile(dir_.path() + "/worker.log", &log);
      std::fprintf(stderr, "---- worker.log\n%s", log.c_str());
    }
  }

  std::string state() const { return dir_.path() + "/w"; }
  static std::string Program(const std::string& name) {
    return std::string(getenv("HEDDLE_BIN") == nullptr ? "build/bin" : getenv("HEDDLE_BIN")) + "/" +
           name;
  }

  void StartDaemon(std::vector<std::string> flags = {}) {
    std::vector<std::string> words = {
        Program("heddle-worker"),          "--state",   state(), "--coordinator",
        "unix:" + dir_.path() + "/c.sock", "--trainer", trainer_};
    words.insert(words.end(), flags.begin(), flags.end());
    daemon_ = fork();
    if (daemon_ == 0) {
      const int log =
          open((dir_.path() + "/worker.log").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      dup2(log, STDOUT_FILENO);
      dup2(log, STDERR_FILENO);
      std::vector<char*> argv;
      for (std::string& word : words) argv.push_back(word.data());
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      _exit(126);
    }
  }
  // Signals and reaps it; its exit status, -1 after a signal or if it does not end.
  int EndDaemon(int signal, milliseconds limit = milliseconds(20'000)) {
    if (daemon_ <= 0) return -1;
    kill(daemon_, signal);
    int status = 0;
    const bool ended =
        WaitUntil([&] { return waitpid(daemon_, &status, WNOHANG) == daemon_; }, limit);
    if (!ended) {
      kill(daemon_, SIGKILL);
      waitpid(daemon_, &status, 0);
      status = SIGKILL;
    }
    daemon_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  static v1::TaskAssignment Train(uint64_t fence, const std::string& wishes, uint32_t ranks = 1) {
    v1::TaskAssignment assignment;
    assignment.set_job(500);
    assignment.set_attempt(1);
    assignment.set_fence(fence);
    assignment.set_task(0);
    for (uint32_t rank = 0; rank < ranks; ++rank) assignment.add_ranks(rank);
    assignment.set_world_size(ranks);
    assignment.set_cpus_per_rank(1);
    (*assignment.mutable_config()->mutable_command()->mutable_env())["FAKE_TRAINER"] = wishes;
    return assignment;
  }
  static v1::TaskAssignment Command(uint64_t fence, const std::vector<std::string>& argv) {
    v1::TaskAssignment assignment = Train(fence, "");
    assignment.mutable_config()->set_kind(v1::RunConfig::KIND_COMMAND);
    for (const std::string& word : argv) {
      assignment.mutable_config()->mutable_command()->add_argv(word);
    }
    return assignment;
  }
  // Until every rank of the task has joined.
  void RunTask(const v1::TaskAssignment& assignment) {
    coordinator_.Assign(assignment);
    ASSERT_TRUE(coordinator_.WaitForState(assignment.fence(), v1::TASK_STATE_READY));
    coordinator_.StartTask(assignment);
    ASSERT_TRUE(coordinator_.WaitForState(assignment.fence(), v1::TASK_STATE_RUNNING));
  }
  // Processes of the ranks, without shims.
  std::vector<int> RankPids() { return ProcessesWith("HEDDLE_TASK_DIR=" + state()); }
  int PidOfRank(uint32_t rank) {
    const std::vector<int> pids = ProcessesWith("HEDDLE_RANK=" + std::to_string(rank));
    const std::vector<int> ours = RankPids();
    for (const int pid : pids) {
      if (std::find(ours.begin(), ours.end(), pid) != ours.end()) return pid;
    }
    return -1;
  }
  int ShimPid(uint64_t fence) {
    StatusOr<TaskFolder> folder = TaskFolder::Open(FolderOf(fence));
    return folder.ok() && folder->Shim().has_value() ? folder->Shim()->pid : -1;
  }
  std::string FolderOf(uint64_t fence) const {
    return state() + "/tasks/" + ToText(TaskKey{fence, 0});
  }
  size_t CountMessages(const std::function<bool(const v1::WorkerMsg&)>& wanted) {
    const std::vector<v1::WorkerMsg> messages = coordinator_.messages();
    return static_cast<size_t>(std::count_if(messages.begin(), messages.end(), wanted));
  }
  static bool IsSeal(const v1::WorkerMsg& message) { return message.has_seal_shard(); }
  // Task 10 saves its first step; the checkpoint is opened, its seal stays without an answer.
  void RunToAnUnansweredSeal() {
    coordinator_.on_message = [this](const v1::WorkerMsg& message) {
      if (!message.has_open_checkpoint()) return;
      v1::CoordMsg answer;
      answer.mutable_checkpoint()->set_fence(10);
      answer.mutable_checkpoint()->mutable_reply()->set_step(1);
      answer.mutable_checkpoint()->mutable_reply()->set_request(
          message.open_checkpoint().open().request());
      coordinator_.Send(answer);
    };
    StartDaemon();
    ASSERT_TRUE(coordinator_.WaitForSessions(1));
    RunTask(Train(10, "steps=3 save=1"));
    ASSERT_TRUE(coordinator_.WaitFor([&] { return CountMessages(IsSeal) == 1; }));
  }
  std::set<uint64_t> Steps() {
    std::set<uint64_t> steps;
    for (const v1::WorkerMsg& message : coordinator_.messages()) {
      for (const v1::MetricPoint& point : message.points().points()) steps.insert(point.step());
    }
    return steps;
  }

  test::TempDir dir_;
  FakeCoordinator coordinator_;
  std::string trainer_ = Program("heddle-fake-trainer");
  pid_t daemon_ = -1;
};

}  // namespace heddle::worker
