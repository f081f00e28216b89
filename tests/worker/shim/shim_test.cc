// heddle-shim as a process: real ranks, real signals, a daemon's end played by the test.
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "tests/support/worker/fake_daemon_end.h"
#include "tests/support/worker/processes.h"
#include "tests/support/worker/temp_dir.h"

namespace heddle::shim {
namespace {

using control::Frame;
using control::FrameType;
using control::KillReason;
using control::LaunchStep;
using control::RankExitedPod;
using control::StopTaskMode;
using std::chrono::milliseconds;
using test::FakeDaemonEnd;
using test::ProcessesWith;
using test::WaitUntil;

class Shim : public ::testing::Test {
 protected:
  // Nothing that belongs to the task is left, within `limit`.
  bool NothingLeft(milliseconds limit = milliseconds(10'000)) {
    return WaitUntil([this] { return ProcessesWith(task_dir()).empty(); }, limit);
  }
  std::string task_dir() const { return dir_.path() + "/task"; }
  std::vector<int> RankPids(const std::string& mark) { return ProcessesWith(mark); }

  test::TempDir dir_;
};

int64_t WallMs() {
  timespec now = {};
  clock_gettime(CLOCK_REALTIME, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

TEST_F(Shim, RunsRanksAndTellsHowTheyEnded) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(4, "echo out; echo err >&2; exit 3"),
                                        FakeDaemonEnd::Shell(5, "sleep 0.3; kill -SEGV $$")},
                                       /*control=*/false)),
            "ready");
  ASSERT_TRUE(daemon.Connect());
  ASSERT_TRUE(daemon.WaitFor(FrameType::kTaskState).has_value());
  EXPECT_TRUE(daemon.WaitFor(FrameType::kSpawned, 4).has_value());
  EXPECT_EQ(daemon.WaitForExit(4).code, 3);
  const RankExitedPod crashed = daemon.WaitForExit(5);
  EXPECT_EQ(crashed.code, -1);
  EXPECT_EQ(crashed.signal, SIGSEGV);
  EXPECT_EQ(crashed.by_shim, 0u);
  EXPECT_TRUE(daemon.WaitForEnd());
  EXPECT_EQ(daemon.Log(4), "out\nerr\n");
  EXPECT_TRUE(NothingLeft());
}

TEST_F(Shim, ExitFileSaysTheSameAsTheFrames) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "exit 9")}, false)), "ready");
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  const std::vector<Frame> frames = daemon.ExitFile();
  EXPECT_EQ(frames.front().header.type, FrameType::kTaskState);
  EXPECT_EQ(frames.back().header.type, FrameType::kRankExited);
  RankExitedPod pod;
  ASSERT_TRUE(control::Unpack(frames.back().payload, &pod));
  EXPECT_EQ(pod.code, 9);
  EXPECT_TRUE(WaitUntil([&] { return daemon.shim_pid() < 0; })) << "the shim leaves";
}

// As on a full disk: no daemon is there, and the folder takes no file.
TEST_F(Shim, WaitsUntilTheExitFileIsWritten) {
  FakeDaemonEnd daemon(task_dir());
  std::filesystem::create_directories(task_dir() + "/exit.tmp");
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "exit 9")}, false)), "ready");
  poll(nullptr, 0, 1'500);
  EXPECT_GT(daemon.shim_pid(), 0) << "it left, and nobody knows how the rank ended";
  ASSERT_TRUE(daemon.Connect());
  EXPECT_EQ(daemon.WaitForExit(0).code, 9);
  std::filesystem::remove(task_dir() + "/exit.tmp");
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  EXPECT_EQ(daemon.ExitFile().back().header.type, FrameType::kRankExited);
  EXPECT_TRUE(WaitUntil([&] { return daemon.shim_pid() < 0; })) << "the shim leaves";
}

TEST_F(Shim, LeavesWithItsFolder) {
  FakeDaemonEnd daemon(task_dir());
  std::filesystem::create_directories(task_dir() + "/exit.tmp");
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "exit 9")}, false)), "ready");
  const int shim = daemon.shim_pid();
  ASSERT_GT(shim, 0);
  poll(nullptr, 0, 500);  // it has failed to write the file, and will try again
  std::filesystem::remove_all(task_dir());
  EXPECT_TRUE(WaitUntil([&] { return !test::IsAlive(shim); }));
}

TEST_F(Shim, ReportsExitsAtOnce) {
  FakeDaemonEnd daemon(task_dir());
  std::vector<control::RankLaunch> ranks;
  for (uint32_t rank = 0; rank < 10; ++rank) {
    const double delay = 0.2 + 0.05 * rank;
    ranks.push_back(FakeDaemonEnd::Shell(
        rank,
        "sleep " + std::to_string(delay) + "; date +%s%N > time-$$; exec /bin/sh -c 'exit 1'"));
  }
  ASSERT_EQ(daemon.Start(daemon.Launch(ranks, false)), "ready");
  ASSERT_TRUE(daemon.Connect());
  std::vector<int64_t> latencies;
  for (uint32_t rank = 0; rank < 10; ++rank) {
    const int64_t at_ms = daemon.WaitForExit(rank).at_ms;
    latencies.push_back(WallMs() - at_ms);
  }
  std::sort(latencies.begin(), latencies.end());
  std::printf("exit to frame at the daemon: median %lld ms, worst %lld ms\n",
              static_cast<long long>(latencies[5]), static_cast<long long>(latencies[9]));
  // The promise is 50 ms on an idle machine; the test must also pass on a busy one.
  EXPECT_LE(latencies[5], 200);
}

TEST_F(Shim, NamesTheProgramThatDoesNotExist) {
  FakeDaemonEnd daemon(task_dir());
  control::RankLaunch missing;
  missing.argv = {"/no/such/program"};
  control::RankLaunch unfound;
  unfound.rank = 1;
  unfound.argv = {"no-such-word-in-path"};
  unfound.env = {"PATH=/usr/bin:/bin"};
  ASSERT_EQ(daemon.Start(daemon.Launch({missing, unfound}, false)), "ready");
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  int exits = 0;
  for (const Frame& frame : daemon.ExitFile()) {
    if (frame.header.type != FrameType::kRankExited) continue;
    RankExitedPod pod;
    ASSERT_TRUE(control::Unpack(frame.payload, &pod));
    EXPECT_EQ(pod.launch_step, static_cast<uint32_t>(LaunchStep::kExec));
    EXPECT_EQ(pod.launch_errno, ENOENT);
    ++exits;
  }
  EXPECT_EQ(exits, 2);
}

TEST_F(Shim, FindsProgramsInPathWithoutAShell) {
  FakeDaemonEnd daemon(task_dir());
  control::RankLaunch echo;
  echo.argv = {"echo", "$HOME", "a b"};
  echo.env = {"PATH=/nowhere:/usr/bin:/bin"};
  ASSERT_EQ(daemon.Start(daemon.Launch({echo}, false)), "ready");
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  EXPECT_EQ(daemon.Log(0), "$HOME a b\n");
}

TEST_F(Shim, StartsATaskFolderOnlyOnce) {
  FakeDaemonEnd daemon(task_dir());
  const control::LaunchFile launch =
      daemon.Launch({FakeDaemonEnd::Shell(0, "exec sleep 60")}, false);
  ASSERT_EQ(daemon.Start(launch), "ready");
  EXPECT_NE(daemon.Start(launch).find("started before"), std::string::npos);
  EXPECT_TRUE(
      WaitUntil([this] { return !ProcessesWith("HEDDLE_TEST_DIR=" + task_dir()).empty(); }));
  EXPECT_EQ(ProcessesWith("HEDDLE_TEST_DIR=" + task_dir()).size(), 1u) << "double start";
  ASSERT_TRUE(daemon.Connect());
  daemon.StopTask(StopTaskMode::kKill, 0);
  EXPECT_EQ(daemon.WaitForExit(0).signal, SIGKILL);
  EXPECT_TRUE(daemon.WaitForEnd());
  EXPECT_NE(daemon.Start(launch).find("started before"), std::string::npos);
}

TEST_F(Shim, DamagedLaunchFileIsAnError) {
  FakeDaemonEnd daemon(task_dir());
  const std::string word = daemon.Start(control::LaunchFile());
  EXPECT_EQ(word.rfind("error: launch file: no ranks", 0), 0u) << word;
}

TEST_F(Shim, KillNineOfTheShimEndsEveryRank) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "trap '' TERM; exec sleep 60"),
                                        FakeDaemonEnd::Shell(1, "exec sleep 60")},
                                       false)),
            "ready");
  ASSERT_TRUE(
      WaitUntil([&] { return ProcessesWith("HEDDLE_TEST_DIR=" + task_dir()).size() == 2; }));
  kill(daemon.shim_pid(), SIGKILL);
  EXPECT_TRUE(NothingLeft(milliseconds(2'000)));
  EXPECT_TRUE(daemon.ExitFile().empty());
}

TEST_F(Shim, TermIsFollowedByKill) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(
      daemon.Start(daemon.Launch(
          {FakeDaemonEnd::Shell(0, "trap '' TERM; echo up; while :; do sleep 0.05; done"),
           FakeDaemonEnd::Shell(1, "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")},
          false)),
      "ready");
  ASSERT_TRUE(WaitUntil([&] { return daemon.Log(0) == "up\n" && daemon.Log(1) == "up\n"; }));
  ASSERT_TRUE(daemon.Connect());
  const auto start = std::chrono::steady_clock::now();
  daemon.StopTask(StopTaskMode::kTerm, 700);
  EXPECT_EQ(daemon.WaitForExit(1).code, 5);
  const RankExitedPod stubborn = daemon.WaitForExit(0);
  const auto took = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(stubborn.signal, SIGKILL);
  EXPECT_EQ(stubborn.by_shim, static_cast<uint32_t>(KillReason::kGraceOver));
  EXPECT_GE(took, milliseconds(650));
  EXPECT_LE(took, milliseconds(3'000));
}

TEST_F(Shim, GracefulStopLetsARankLeaveByItself) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({daemon.Trainer(0, "steps=100000 step_ms=2")})), "ready");
  ASSERT_TRUE(daemon.Connect());
  daemon.ServeLaunch(0);
  ASSERT_TRUE(daemon.WaitFor(FrameType::kProgress, 0).has_value());
  daemon.StopTask(StopTaskMode::kGraceful, 60'000);
  daemon.Send(FrameType::kStop, 0, v1::StopRank().SerializeAsString());
  EXPECT_EQ(daemon.WaitForExit(0).code, 85);
  EXPECT_TRUE(daemon.WaitFor(FrameType::kExit, 0).has_value());
}

TEST_F(Shim, GraceEndsInTermAlsoForADeafRank) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({daemon.Trainer(0, "deaf steps=100000 step_ms=2")})),
            "ready");
  ASSERT_TRUE(daemon.Connect());
  daemon.ServeLaunch(0);
  ASSERT_TRUE(daemon.WaitFor(FrameType::kJoined, 0).has_value());
  daemon.StopTask(StopTaskMode::kGraceful, 300);
  daemon.Send(FrameType::kStop, 0, v1::StopRank().SerializeAsString());
  const RankExitedPod exited = daemon.WaitForExit(0);
  EXPECT_EQ(exited.signal, SIGTERM);
  EXPECT_EQ(exited.by_shim, static_cast<uint32_t>(KillReason::kGraceOver));
}

TEST_F(Shim, RepeatedOrdersNeverProlongTheGrace) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(
      daemon.Start(daemon.Launch(
          {FakeDaemonEnd::Shell(0, "trap '' TERM; echo up; while :; do sleep 0.05; done")}, false)),
      "ready");
  ASSERT_TRUE(daemon.Connect());
  ASSERT_TRUE(WaitUntil([&] { return daemon.Log(0) == "up\n"; }));
  const auto start = std::chrono::steady_clock::now();
  daemon.StopTask(StopTaskMode::kTerm, 400);
  for (int i = 0; i < 20; ++i) daemon.StopTask(StopTaskMode::kTerm, 60'000);
  EXPECT_EQ(daemon.WaitForExit(0).signal, SIGKILL);
  EXPECT_LE(std::chrono::steady_clock::now() - start, milliseconds(5'000));
}

TEST_F(Shim, OrphansEndAtTheirDeadlineAndContactMovesIt) {
  FakeDaemonEnd daemon(task_dir(), /*max_orphan_ms=*/600);
  ASSERT_EQ(daemon.Start(
                daemon.Launch({FakeDaemonEnd::Shell(0, "trap '' TERM; sleep 60 & wait")}, false)),
            "ready");
  // Refreshed for a second: nothing may happen.
  for (int i = 0; i < 10; ++i) {
    daemon.contact()->Refresh(control::BootTimeNs());
    poll(nullptr, 0, 100);
  }
  ASSERT_GT(daemon.shim_pid(), 0) << "killed although in contact";
  const int64_t last = control::BootTimeNs();
  daemon.contact()->Refresh(last);
  EXPECT_TRUE(NothingLeft(milliseconds(3'000)));
  const double after_ms = static_cast<double>(control::BootTimeNs() - last) / 1e6;
  std::printf("orphan killed %.0f ms after the last contact, limit 600 ms\n", after_ms);
  EXPECT_GE(after_ms, 590);
  const std::vector<Frame> frames = daemon.ExitFile();
  ASSERT_FALSE(frames.empty());
  RankExitedPod pod;
  ASSERT_TRUE(control::Unpack(frames.back().payload, &pod));
  EXPECT_EQ(pod.by_shim, static_cast<uint32_t>(KillReason::kOrphan));
}

TEST_F(Shim, NoDescendantEscapesAKill) {
  FakeDaemonEnd daemon(task_dir());
  // A child in the background, one in a session of its own, one that daemonized.
  ASSERT_EQ(daemon.Start(daemon.Launch(
                {FakeDaemonEnd::Shell(0,
                                      "sleep 60 & setsid sleep 61 & (setsid sh -c 'trap \"\" "
                                      "TERM HUP; sleep 62 & wait' & ) ; echo up; wait")},
                false)),
            "ready");
  ASSERT_TRUE(daemon.Connect());
  ASSERT_TRUE(
      WaitUntil([&] { return ProcessesWith("HEDDLE_TEST_DIR=" + task_dir()).size() >= 5; }));
  daemon.StopTask(StopTaskMode::kKill, 0);
  EXPECT_EQ(daemon.WaitForExit(0).signal, SIGKILL);
  EXPECT_TRUE(daemon.WaitForEnd());
  EXPECT_TRUE(NothingLeft(milliseconds(1'000)));
}

TEST_F(Shim, EndOfTheLastRankEndsWhatItLeftBehind) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(
      daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "setsid sleep 60 & exit 0")}, false)),
      "ready");
  EXPECT_TRUE(NothingLeft(milliseconds(5'000)));
  EXPECT_FALSE(daemon.ExitFile().empty());
}

TEST_F(Shim, FailureWithoutADaemonEndsTheOtherRanks) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "sleep 0.2; exit 1"),
                                        FakeDaemonEnd::Shell(1, "exec sleep 60")},
                                       false)),
            "ready");
  EXPECT_TRUE(NothingLeft(milliseconds(5'000)));
  bool found = false;
  for (const Frame& frame : daemon.ExitFile()) {
    RankExitedPod pod;
    if (frame.header.type != FrameType::kRankExited || frame.header.rank != 1) continue;
    ASSERT_TRUE(control::Unpack(frame.payload, &pod));
    EXPECT_EQ(pod.by_shim, static_cast<uint32_t>(KillReason::kPeerFailed));
    found = true;
  }
  EXPECT_TRUE(found);
}

TEST_F(Shim, FailureWithADaemonLeavesTheOthersToItsOrder) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "sleep 0.2; exit 1"),
                                        FakeDaemonEnd::Shell(1, "exec sleep 60")},
                                       false)),
            "ready");
  ASSERT_TRUE(daemon.Connect());
  EXPECT_EQ(daemon.WaitForExit(0).code, 1);
  EXPECT_FALSE(daemon.WaitFor(FrameType::kRankExited, 1, milliseconds(800)).has_value());
  daemon.StopTask(StopTaskMode::kKill, 0);
  EXPECT_EQ(daemon.WaitForExit(1).by_shim, static_cast<uint32_t>(KillReason::kOrdered));
}

TEST_F(Shim, FramesForAnAbsentDaemonWait) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({daemon.Trainer(0, "steps=5 save=5")})), "ready");
  ASSERT_TRUE(daemon.Connect());
  daemon.ServeLaunch(0);
  ASSERT_TRUE(daemon.WaitFor(FrameType::kOpenCheckpoint, 0).has_value());
  daemon.Disconnect();  // kill -9 of the daemon, before it acknowledged anything
  ASSERT_TRUE(daemon.Connect());
  for (const FrameType type :
       {FrameType::kSpawned, FrameType::kHello, FrameType::kReady, FrameType::kJoined,
        FrameType::kProgress, FrameType::kOpenCheckpoint}) {
    EXPECT_TRUE(daemon.WaitFor(type, 0).has_value()) << control::ToText(type);
  }
  v1::OpenCheckpoint open;
  uint64_t number = 0;
  for (size_t i = 0; i < daemon.frames().size(); ++i) {
    if (daemon.frames()[i].header.type != FrameType::kOpenCheckpoint) continue;
    ASSERT_TRUE(open.ParseFromString(daemon.frames()[i].payload));
    number = daemon.NumberOf(i);
  }
  v1::CheckpointReply reply;
  reply.set_request(open.request());
  reply.set_step(5);
  daemon.Send(FrameType::kCheckpointReply, 0, reply.SerializeAsString());
  daemon.Ack(number);
  ASSERT_TRUE(daemon.WaitFor(FrameType::kSeal, 0).has_value());
  ASSERT_TRUE(daemon.Connect());
  EXPECT_TRUE(daemon.WaitFor(FrameType::kSeal, 0).has_value());
  EXPECT_FALSE(daemon.WaitFor(FrameType::kOpenCheckpoint, 0, milliseconds(200)).has_value())
      << "acknowledged, so gone";
}

TEST_F(Shim, UnansweredSealAndLastWordsReachTheExitFile) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({daemon.Trainer(0, "steps=2 exit=88 words=loss")})),
            "ready");
  ASSERT_TRUE(daemon.Connect());
  daemon.ServeLaunch(0);
  daemon.Disconnect();
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  v1::RankExit words;
  for (const Frame& frame : daemon.ExitFile()) {
    if (frame.header.type == FrameType::kExit) {
      ASSERT_TRUE(words.ParseFromString(frame.payload));
    }
  }
  EXPECT_EQ(words.code(), 88);
  EXPECT_EQ(words.detail(), "loss");
}

TEST_F(Shim, EndOfFileComesBeforeTheExit) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({daemon.Trainer(0, "steps=100000")})), "ready");
  ASSERT_TRUE(daemon.Connect());
  daemon.ServeLaunch(0);
  const std::optional<Frame> spawned = daemon.WaitFor(FrameType::kSpawned, 0);
  ASSERT_TRUE(spawned.has_value());
  control::SpawnedPod pod;
  ASSERT_TRUE(control::Unpack(spawned->payload, &pod));
  kill(pod.pid, SIGKILL);
  const RankExitedPod exited = daemon.WaitForExit(0);
  EXPECT_EQ(exited.signal, SIGKILL);
  EXPECT_EQ(exited.by_shim, 0u) << "an outside kill is not ours";
  int eof = -1, exit = -1;
  for (size_t i = 0; i < daemon.frames().size(); ++i) {
    if (daemon.frames()[i].header.type == FrameType::kRankEof) eof = static_cast<int>(i);
    if (daemon.frames()[i].header.type == FrameType::kRankExited) exit = static_cast<int>(i);
  }
  EXPECT_GE(eof, 0);
  EXPECT_LT(eof, exit);
}

TEST_F(Shim, RandomBytesOfARankCloseOnlyItsOwnLink) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(
      daemon.Start(daemon.Launch({daemon.Trainer(0, "garbage"), daemon.Trainer(1, "steps=2")})),
      "ready");
  ASSERT_TRUE(daemon.Connect());
  daemon.ServeLaunch(1);
  EXPECT_EQ(daemon.WaitForExit(1).code, 0);
  EXPECT_EQ(daemon.WaitForExit(0).signal, SIGPIPE);
}

TEST_F(Shim, RandomBytesOfADaemonLoseOnlyTheConnection) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "exec sleep 60")}, false)),
            "ready");
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  unsigned state = seed;
  for (int round = 0; round < 20; ++round) {
    ASSERT_TRUE(daemon.Connect()) << "the shim died";
    std::string bytes(600, '\0');
    for (char& byte : bytes) byte = static_cast<char>(rand_r(&state));
    bytes[3] = '\x7f';  // a length no reader may believe
    daemon.SendRaw(bytes);
    EXPECT_TRUE(daemon.WaitForEnd(milliseconds(2'000)));
  }
  ASSERT_TRUE(daemon.Connect());
  daemon.SendRaw(control::EncodeFrame(FrameType::kStopTask, FakeDaemonEnd::kFence, 0, "short"));
  daemon.SendRaw(control::EncodeFrame(FrameType::kStopTask, FakeDaemonEnd::kFence - 1, 0,
                                      std::string(16, '\x02')));
  EXPECT_FALSE(daemon.WaitFor(FrameType::kRankExited, 0, milliseconds(300)).has_value())
      << "an order of another fence was obeyed";
  daemon.StopTask(StopTaskMode::kKill, 0);
  EXPECT_EQ(daemon.WaitForExit(0).signal, SIGKILL);
}

TEST_F(Shim, SocketAndFilesArePrivate) {
  FakeDaemonEnd daemon(task_dir());
  ASSERT_EQ(daemon.Start(daemon.Launch({FakeDaemonEnd::Shell(0, "exec sleep 60")}, false)),
            "ready");
  for (const char* name : {"/shim.sock", "/shim", "/logs/rank-0.log", "/shim.log"}) {
    struct stat info = {};
    ASSERT_EQ(stat((task_dir() + name).c_str(), &info), 0) << name;
    EXPECT_EQ(info.st_mode & 077, 0u) << name;
  }
}

TEST_F(Shim, RankSeesOnlyWhatItWasGiven) {
  FakeDaemonEnd daemon(task_dir());
  control::LaunchFile launch = daemon.Launch(
      {FakeDaemonEnd::Shell(0,
                            "ls /proc/self/fd | tr '\\n' ' '; echo; ulimit -c; grep -E "
                            "'NoNewPrivs|Cpus_allowed_list|SigIgn|SigBlk' /proc/self/status; "
                            "env | grep -c SECRET; pwd")},
      false);
  cpu_set_t own;
  CPU_ZERO(&own);
  ASSERT_EQ(sched_getaffinity(0, sizeof(own), &own), 0);
  uint32_t cpu = 0;
  while (!CPU_ISSET(cpu, &own)) ++cpu;
  launch.ranks[0].cpus = {cpu};
  setenv("SECRET", "x", 1);
  ASSERT_EQ(daemon.Start(launch), "ready");
  unsetenv("SECRET");
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  const std::string log = daemon.Log(0);
  EXPECT_EQ(log.substr(0, log.find('\n')), "0 1 2 3 ") << "3 is ls's own folder";
  EXPECT_NE(log.find("\n0\n"), std::string::npos) << "core dumps: " << log;
  EXPECT_NE(log.find("NoNewPrivs:\t1"), std::string::npos) << log;
  EXPECT_NE(log.find("Cpus_allowed_list:\t" + std::to_string(cpu) + "\n"), std::string::npos)
      << log;
  EXPECT_NE(log.find("SigBlk:\t0000000000000000"), std::string::npos) << log;
  EXPECT_NE(log.find("SigIgn:\t0000000000000000"), std::string::npos) << log;
  EXPECT_NE(log.find("/task/scratch\n"), std::string::npos) << log;
}

TEST_F(Shim, FullQuotaDropsAndCountsButNeverBlocks) {
  FakeDaemonEnd daemon(task_dir());
  control::LaunchFile launch =
      daemon.Launch({FakeDaemonEnd::Shell(0, "head -c 3000000 /dev/zero; exit 4")}, false);
  launch.log_bytes_max = 100'000;
  ASSERT_EQ(daemon.Start(launch), "ready");
  ASSERT_TRUE(WaitUntil([&] { return !daemon.ExitFile().empty(); }));
  EXPECT_EQ(daemon.Log(0).size(), 100'000u);
  struct stat lost = {};
  ASSERT_EQ(stat((task_dir() + "/logs/rank-0.lost").c_str(), &lost), 0);
  EXPECT_EQ(lost.st_size, 2'900'000);
  EXPECT_EQ(lost.st_blocks, 0) << "a full disk has none to give";
  control::TaskStatePod state;
  ASSERT_TRUE(control::Unpack(daemon.ExitFile().front().payload, &state));
  EXPECT_EQ(state.log_bytes_dropped, 2'900'000u);
}

TEST_F(Shim, MemoryLimitIsAnOomExit) {
  if (geteuid() != 0 || access("/sys/fs/cgroup/memory/memory.limit_in_bytes", W_OK) != 0) {
    GTEST_SKIP() << "needs root and a writable v1 memory cgroup";
  }
  FakeDaemonEnd daemon(task_dir());
  // tail keeps its last line, which has no end.
  control::LaunchFile launch =
      daemon.Launch({FakeDaemonEnd::Shell(0, "tail -n1 /dev/zero")}, false);
  launch.memory_bytes = 32 << 20;
  launch.cgroup_v1_memory = "/sys/fs/cgroup/memory";
  ASSERT_EQ(daemon.Start(launch), "ready");
  ASSERT_TRUE(daemon.Connect());
  const std::optional<Frame> frame =
      daemon.WaitFor(FrameType::kRankExited, 0, milliseconds(60'000));
  ASSERT_TRUE(frame.has_value());
  RankExitedPod pod;
  ASSERT_TRUE(control::Unpack(frame->payload, &pod));
  // The shell or tail itself: either way the kernel's counter rose.
  EXPECT_TRUE(pod.oom == 1 || pod.code == 137) << pod.code << " " << pod.signal;
  EXPECT_TRUE(daemon.WaitForEnd());
  const std::string name = "heddle-" + std::to_string(FakeDaemonEnd::kFence) + "-0-";
  for (const auto& entry : std::filesystem::directory_iterator(launch.cgroup_v1_memory)) {
    EXPECT_NE(entry.path().filename().string().rfind(name, 0), 0u) << "left: " << entry.path();
  }
}

TEST_F(Shim, IsSmallAndStatic) {
  const std::string path = FakeDaemonEnd::BinDir() + "/heddle-shim";
  struct stat info = {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_LE(info.st_size, 2 << 20);
}

}  // namespace
}  // namespace heddle::shim
