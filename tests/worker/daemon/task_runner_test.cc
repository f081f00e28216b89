// TaskRunner beside a daemon that the test plays: what a slow start, a failing disk and repeated
// orders do.
#include "worker/daemon/task_runner.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/post.hpp>

#include "tests/support/worker/processes.h"
#include "tests/support/worker/temp_dir.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

using std::chrono::milliseconds;
using test::ProcessesWith;

std::string Program(const std::string& name) {
  return std::string(getenv("HEDDLE_BIN") == nullptr ? "build/bin" : getenv("HEDDLE_BIN")) + "/" +
         name;
}

class Host : public TaskHost {
 public:
  explicit Host(const std::string& dir) : cpus_(dir + "/cpus", {}, {}), gpus_(dir + "/gpus", {}) {
    options_.shim = Program("heddle-shim");
    options_.trainer = Program("heddle-fake-trainer");
  }
  boost::asio::io_context& io() override { return io_; }
  const Clock& clock() const override { return clock_; }
  const Options& options() const override { return options_; }
  const CgroupParents& cgroups() const override { return cgroups_; }
  CpuTable& cpus() override { return cpus_; }
  GpuTable& gpus() override { return gpus_; }
  std::string data_address() override { return "127.0.0.1"; }
  void RunOnDisk(std::function<Status()> work, std::function<void(Status)> done) override {
    boost::asio::post(io_, [this, work = std::move(work), done = std::move(done)] {
      const Status status = work();
      done(disk.ok() ? status : disk);
    });
  }
  bool Send(v1::WorkerMsg message) override {
    sent.push_back(std::move(message));
    return true;
  }
  uint64_t last_heartbeat() const override { return heartbeat; }
  void LogsMayHaveGrown(const TaskKey&) override {}

  // Runs what is due until `condition`; false after `limit`.
  bool RunUntil(const std::function<bool()>& condition, milliseconds limit) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!condition()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      io_.restart();
      io_.run_for(milliseconds(10));
    }
    return true;
  }
  size_t Damages() const {
    return static_cast<size_t>(
        std::count_if(sent.begin(), sent.end(),
                      [](const v1::WorkerMsg& message) { return message.has_damage(); }));
  }

  Options& mutable_options() { return options_; }
  Status disk;
  uint64_t heartbeat = 0;
  std::vector<v1::WorkerMsg> sent;

 private:
  boost::asio::io_context io_;
  SystemClock clock_;
  Options options_;
  CgroupParents cgroups_;
  CpuTable cpus_;
  GpuTable gpus_;
};

class Runner : public ::testing::Test {
 protected:
  ~Runner() override {
    if (runner_ != nullptr) runner_->Detach();
    for (const int pid : ProcessesWith(dir_.path())) kill(pid, SIGKILL);
  }
  std::shared_ptr<TaskRunner> Make(const std::string& wishes) {
    v1::TaskAssignment assignment;
    assignment.set_job(500);
    assignment.set_attempt(1);
    assignment.set_fence(10);
    assignment.add_ranks(0);
    assignment.set_world_size(1);
    assignment.set_cpus_per_rank(1);
    (*assignment.mutable_config()->mutable_command()->mutable_env())["FAKE_TRAINER"] = wishes;
    StatusOr<TaskFolder> folder = TaskFolder::Create(dir_.path(), assignment, {}, 600'000'000'000);
    EXPECT_TRUE(folder.ok());
    path_ = folder->path();
    TaskHost* const host = &host_;
    runner_ = std::make_shared<TaskRunner>(host, *std::move(folder));
    return runner_;
  }
  std::vector<int> RankPids() { return ProcessesWith("HEDDLE_TASK_DIR=" + path_); }

  test::TempDir dir_;
  Host host_{dir_.path()};
  std::string path_;
  std::shared_ptr<TaskRunner> runner_;
};

TEST_F(Runner, LaunchThatFailsWhileTheShimStartsLeavesNoRank) {
  const std::string slow = dir_.path() + "/slow-shim";
  std::ofstream(slow) << "#!/bin/sh\nsleep 0.5\nexec " << Program("heddle-shim") << " \"$@\"\n";
  chmod(slow.c_str(), 0700);
  host_.mutable_options().shim = slow;
  host_.disk = DataLoss("the folder was not synced");
  Make("steps=100000")->Launch();
  ASSERT_TRUE(host_.RunUntil([&] { return runner_->ended(); }, milliseconds(10'000)));
  EXPECT_TRUE(RankPids().empty());
  host_.RunUntil([] { return false; }, milliseconds(1'500));
  EXPECT_TRUE(RankPids().empty()) << "reported as ended, then the shim came up";
}

// The daemon died after it had started the shim; the next one is told at once to kill the task.
TEST_F(Runner, ShimThatComesUpAfterItsTaskWasKilledStartsNothing) {
  const std::string slow = dir_.path() + "/slow-shim";
  std::ofstream(slow) << "#!/bin/sh\nsleep 0.5\nexec " << Program("heddle-shim") << " \"$@\"\n";
  chmod(slow.c_str(), 0700);
  host_.mutable_options().shim = slow;
  Make("steps=100000")->Launch();
  runner_->Detach();
  StatusOr<TaskFolder> folder = TaskFolder::Open(path_);
  ASSERT_TRUE(folder.ok());
  TaskHost* const host = &host_;
  runner_ = std::make_shared<TaskRunner>(host, *std::move(folder));
  runner_->Adopt(/*same_instance=*/true);
  runner_->OnKill("KILL_FENCED");
  EXPECT_TRUE(runner_->ended());
  host_.RunUntil([] { return false; }, milliseconds(1'500));
  EXPECT_TRUE(RankPids().empty()) << "reported as gone, then the shim came up";
}

TEST_F(Runner, OrderToKillDoesNotStopTheLookForALostShim) {
  std::shared_ptr<TaskRunner> runner = Make("");
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  // A shim that lives, but whose socket is gone.
  control::ShimIdentity shim;
  shim.pid = child;
  shim.start_ticks = control::ProcessStartTicks(child);
  std::ofstream(path_ + "/shim") << control::EncodeShimIdentity(shim);
  runner->Adopt(/*same_instance=*/true);
  host_.RunUntil([] { return false; }, milliseconds(150));
  runner->OnKill("KILL_FENCED");
  EXPECT_TRUE(host_.RunUntil([&] { return runner->ended(); }, milliseconds(6'000)));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

TEST_F(Runner, DamageIsKeptUntilALaterHeartbeatIsAnswered) {
  std::shared_ptr<TaskRunner> runner = Make("");
  v1::DamageReport damage;
  damage.set_checkpoint_step(7);
  control::RankExitedPod exited;
  exited.code = 0;
  std::ofstream(path_ + "/exit", std::ios::binary)
      << control::EncodeFrame(control::FrameType::kDamage, 10, 0, damage.SerializeAsString())
      << control::EncodeFrame(control::FrameType::kRankExited, 10, 0, control::AsBytes(exited));
  host_.heartbeat = 3;
  runner->Adopt(/*same_instance=*/true);
  ASSERT_TRUE(runner->ended());
  EXPECT_EQ(host_.Damages(), 1u);
  runner->OnHeartbeatReply(3);  // it was sent before the damage was
  runner->Resend();
  EXPECT_EQ(host_.Damages(), 2u) << "nobody may have heard of it";
  runner->OnHeartbeatReply(4);
  runner->Resend();
  EXPECT_EQ(host_.Damages(), 2u);
}

}  // namespace
}  // namespace heddle::worker
