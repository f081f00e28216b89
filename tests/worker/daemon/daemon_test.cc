// The life of tasks, of their daemon and of their coordinator.
#include "tests/worker/daemon/daemon_fixture.h"

namespace heddle::worker {
namespace {

// What a heartbeat tells of a rank is read from its page and /proc: it holds for a stopped rank
// too.
TEST_F(Daemon, ShowsWhatRanksDoAlsoWhenTheyAreStopped) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  v1::TaskAssignment assignment = Train(40, "steps=1000000 step_ms=5 phase=9", 2);
  assignment.mutable_config()->mutable_model()->set_n_layers(4);
  assignment.set_memory_per_rank(0);
  RunTask(assignment);
  const auto head = [this](uint32_t rank) {
    v1::RankHead newest;
    for (const v1::WorkerMsg& message : coordinator_.messages()) {
      for (const v1::Heartbeat::TaskBeat& beat : message.heartbeat().tasks()) {
        for (const v1::RankHead& one : beat.heads()) {
          if (one.rank() == rank) newest = one;
        }
      }
    }
    return newest;
  };
  ASSERT_TRUE(WaitUntil([&] { return head(1).step() > 3; }));
  const v1::RankHead running = head(1);
  EXPECT_EQ(running.phase(), 9u);
  EXPECT_EQ(running.seq(), running.step());
  EXPECT_EQ(running.op(), 3u);
  EXPECT_EQ(running.unit(), 2u);
  EXPECT_EQ(running.fingerprint(), 7u);
  ASSERT_EQ(running.phase_ns_size(), 16);
  EXPECT_GT(running.phase_ns(9), 1'000'000u);
  EXPECT_LT(running.phase_age_ms(), 2'000);

  const int pid = PidOfRank(1);
  ASSERT_GT(pid, 0);
  kill(pid, SIGSTOP);
  ASSERT_TRUE(
      WaitUntil([&] { return head(1).process_state() == "T" && head(1).phase_age_ms() > 500; }));
  EXPECT_NE(head(0).process_state(), "T");

  v1::CoordMsg collect;
  collect.mutable_collect_stacks()->set_fence(40);
  collect.mutable_collect_stacks()->set_task(0);
  ASSERT_TRUE(coordinator_.Send(collect));
  v1::StackReport report;
  ASSERT_TRUE(WaitUntil([&] {
    for (const v1::WorkerMsg& message : coordinator_.messages()) {
      if (message.stacks().stacks_size() == 2) report = message.stacks();
    }
    return report.stacks_size() == 2;
  }));
  EXPECT_EQ(report.fence(), 40u);
  EXPECT_EQ(report.heads_size(), 2);
  EXPECT_NE(report.stacks(0).text().find("main+0x"), std::string::npos)
      << "a rank that runs writes its own stack: " << report.stacks(0).text();
  EXPECT_NE(report.stacks(1).text().find(" T"), std::string::npos) << report.stacks(1).text();

  kill(pid, SIGKILL);
  ASSERT_TRUE(WaitUntil([&] { return coordinator_.Report(40)->exits_size() >= 1; }));
  const v1::RankOutcome outcome = coordinator_.Report(40)->exits(0);
  EXPECT_EQ(outcome.rank(), 1u);
  EXPECT_EQ(outcome.signal(), 9);
  EXPECT_EQ(outcome.detail().rfind("in backward of block.1 at step ", 0), 0u) << outcome.detail();
  EXPECT_GT(outcome.step(), 3u) << "of its own page: only rank 0 reports steps";
}

TEST_F(Daemon, RegistersAndBeats) {
  StartDaemon({"--cpus", "3", "--memory", "2GiB", "--labels", "a=b"});
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  const v1::RegisterRequest request = coordinator_.registrations().front();
  EXPECT_EQ(request.capacity().cpus(), 3);
  EXPECT_EQ(request.capacity().memory_bytes(), 2ull << 30);
  EXPECT_EQ(request.capacity().labels(0), "a=b");
  EXPECT_EQ(request.protocol(), control::kProtocolVersion);
  EXPECT_FALSE(request.instance().empty());
  EXPECT_EQ(request.tasks_size(), 0);
  const auto beats = [](const v1::WorkerMsg& message) { return message.has_heartbeat(); };
  ASSERT_TRUE(coordinator_.WaitFor([&] { return CountMessages(beats) >= 5; }));
  const v1::WorkerMsg last = coordinator_.messages().back();
  EXPECT_EQ(last.cluster_id(), "fake-cluster");
  EXPECT_EQ(last.worker_id(), request.worker_id());
  EXPECT_EQ(last.session(), request.session());
}

TEST_F(Daemon, IdleDaemonIsSmall) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  poll(nullptr, 0, 500);
  std::string status;
  ASSERT_TRUE(control::ReadWholeFile("/proc/" + std::to_string(daemon_) + "/status", &status));
  const long kb = std::atol(status.c_str() + status.find("VmRSS:") + 6);
  std::printf("idle RSS %ld kB\n", kb);
  EXPECT_LE(kb, 30 * 1024);
}

TEST_F(Daemon, WalksATaskThroughItsStates) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  const v1::TaskAssignment assignment = Train(10, "steps=4", 2);
  const int64_t assigned_ms = WallMs();
  RunTask(assignment);
  const std::optional<v1::TaskReport> running = coordinator_.Report(10);
  EXPECT_TRUE(running->acknowledged());
  EXPECT_EQ(running->joined_ranks_size(), 2);
  EXPECT_EQ(running->data_address(), "127.0.0.1");
  ASSERT_EQ(running->hello_ms_size(), 2);
  std::printf(
      "assignment to main() of both ranks: %lld ms\n",
      static_cast<long long>(std::max(running->hello_ms(0), running->hello_ms(1)) - assigned_ms));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  const std::optional<v1::TaskReport> ended = coordinator_.Report(10);
  ASSERT_EQ(ended->exits_size(), 2);
  for (const v1::RankOutcome& exit : ended->exits()) {
    EXPECT_TRUE(exit.has_exit_code());
    EXPECT_EQ(exit.exit_code(), 0);
    EXPECT_EQ(exit.step(), 4u);
  }
  EXPECT_EQ(Steps(), (std::set<uint64_t>{1, 2, 3, 4}));
  coordinator_.Forget(10);
  EXPECT_TRUE(WaitUntil([&] { return access(FolderOf(10).c_str(), F_OK) != 0; }));
  EXPECT_NE(coordinator_.Log(10, 0).find("rank 0 of 2 threads 1\n"), std::string::npos);
  EXPECT_NE(coordinator_.Log(10, 1).find("leaving with 0\n"), std::string::npos);
  EXPECT_TRUE(ProcessesWith(FolderOf(10)).empty());
}

TEST_F(Daemon, RepeatedAssignmentStartsNothingTwice) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  const v1::TaskAssignment assignment = Train(10, "steps=100000");
  for (int i = 0; i < 5; ++i) coordinator_.Assign(assignment);
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_READY));
  for (int i = 0; i < 5; ++i) coordinator_.Assign(assignment);
  poll(nullptr, 0, 200);
  EXPECT_EQ(RankPids().size(), 1u);
}

TEST_F(Daemon, RunsCommandsWithoutFrames) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  const v1::TaskAssignment assignment = Command(
      20, {"sh", "-c", "echo $HEDDLE_RANK/$HEDDLE_WORLD_SIZE/$HEDDLE_ATTEMPT; sleep 0.3; exit 7"});
  RunTask(assignment);
  ASSERT_TRUE(coordinator_.WaitForState(20, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(20)->exits(0).exit_code(), 7);
  EXPECT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Log(20, 0) == "0/1/1\n"; }));
}

TEST_F(Daemon, GivesEachTaskItsOwnGpusAlsoAfterARestart) {
  // Names of this test alone: the table is shared by all daemons of the user.
  const std::string a = "MIG-a-" + std::to_string(getpid());
  const std::string b = "MIG-b-" + std::to_string(getpid());
  setenv("CUDA_VISIBLE_DEVICES", (a + "," + b).c_str(), 1);
  StartDaemon({"--gpus", "2"});
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  EXPECT_EQ(coordinator_.registrations().front().capacity().gpus(), 2u);
  const std::vector<std::string> show = {"sh", "-c", "echo [$CUDA_VISIBLE_DEVICES]"};
  coordinator_.Assign(Command(20, show));
  EXPECT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Log(20, 0) == "[]\n"; }));
  v1::TaskAssignment holder = Command(21, {"sh", "-c", show[2] + "; sleep 100"});
  holder.add_gpu_indices(1);
  RunTask(holder);
  EXPECT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Log(21, 0) == "[" + b + "]\n"; }));
  EndDaemon(SIGKILL);
  StartDaemon({"--gpus", "2"});
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  // The coordinator would not: index 1 is held still, so the task gets the other one.
  v1::TaskAssignment next = Command(22, show);
  next.add_gpu_indices(1);
  coordinator_.Assign(next);
  EXPECT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Log(22, 0) == "[" + a + "]\n"; }));
  // What it printed may come before its end, which gives the GPU back.
  ASSERT_TRUE(coordinator_.WaitForState(22, v1::TASK_STATE_EXITED));
  next = Command(23, show);
  next.add_gpu_indices(0);
  next.add_gpu_indices(1);
  coordinator_.Assign(next);
  ASSERT_TRUE(coordinator_.WaitForState(23, v1::TASK_STATE_EXITED));
  EXPECT_NE(coordinator_.Report(23)->detail().find("2 GPUs assigned, 1 of the 2"),
            std::string::npos)
      << coordinator_.Report(23)->detail();
  unsetenv("CUDA_VISIBLE_DEVICES");
}

TEST_F(Daemon, QuickCommandIsNeverRefused) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  for (uint64_t fence = 20; fence < 30; ++fence) {
    coordinator_.Assign(Command(fence, {"/bin/true"}));
    ASSERT_TRUE(coordinator_.WaitForState(fence, v1::TASK_STATE_EXITED));
    EXPECT_TRUE(coordinator_.Report(fence)->acknowledged()) << "ended before the folder was synced";
    EXPECT_EQ(coordinator_.Report(fence)->exits(0).exit_code(), 0);
  }
}

TEST_F(Daemon, ProgramThatDoesNotExistIsAClearOutcome) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  coordinator_.Assign(Command(21, {"/no/such/program"}));
  ASSERT_TRUE(coordinator_.WaitForState(21, v1::TASK_STATE_EXITED));
  const v1::RankOutcome outcome = coordinator_.Report(21)->exits(0);
  EXPECT_EQ(outcome.category(), "USER_CONFIG");
  EXPECT_NE(outcome.detail().find("/no/such/program: No such file"), std::string::npos)
      << outcome.detail();
  EXPECT_TRUE(coordinator_.Report(21)->acknowledged());
}

TEST_F(Daemon, MissingTrainerAndMissingShimAreClearOutcomes) {
  trainer_ = "/no/such/heddle-trainer";
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  coordinator_.Assign(Train(10, ""));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_NE(coordinator_.Report(10)->exits(0).detail().find("/no/such/heddle-trainer"),
            std::string::npos);
  EndDaemon(SIGKILL);
  StartDaemon({"--shim", "/no/such/heddle-shim"});
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  coordinator_.Assign(Train(11, ""));
  ASSERT_TRUE(coordinator_.WaitForState(11, v1::TASK_STATE_EXITED));
  EXPECT_NE(coordinator_.Report(11)->exits(0).detail().find("/no/such/heddle-shim"),
            std::string::npos);
}

TEST_F(Daemon, KillNineOfARankIsReportedAtOnce) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  std::vector<int64_t> latencies;
  for (uint64_t fence = 10; fence < 15; ++fence) {
    RunTask(Train(fence, "steps=100000"));
    const std::vector<int> pids = ProcessesWith("HEDDLE_TASK_DIR=" + FolderOf(fence));
    ASSERT_EQ(pids.size(), 1u);
    ASSERT_TRUE(coordinator_.WaitFor([&] {
      return CountMessages([fence](const v1::WorkerMsg& message) {
               return message.points().fence() == fence;
             }) > 0;
    }));
    const int64_t killed_ms = WallMs();
    kill(pids[0], SIGKILL);
    ASSERT_TRUE(coordinator_.WaitForState(fence, v1::TASK_STATE_EXITED));
    latencies.push_back(WallMs() - killed_ms);
    const v1::RankOutcome outcome = coordinator_.Report(fence)->exits(0);
    EXPECT_EQ(outcome.signal(), SIGKILL);
    EXPECT_FALSE(outcome.has_exit_code());
    EXPECT_GT(outcome.step(), 0u);
  }
  std::sort(latencies.begin(), latencies.end());
  std::printf("kill -9 of a rank to the report at the coordinator: median %lld ms, worst %lld ms\n",
              static_cast<long long>(latencies[2]), static_cast<long long>(latencies[4]));
  // The promise is 50 ms on an idle machine; the test must also pass on a busy one.
  EXPECT_LE(latencies[2], 200);
}

TEST_F(Daemon, RestartedDaemonAdoptsItsRanks) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 step_ms=2", 2));
  const std::vector<int> pids = RankPids();
  ASSERT_EQ(pids.size(), 2u);
  uint64_t seq = coordinator_.Report(10)->seq();
  for (size_t round = 2; round <= 5; ++round) {
    EndDaemon(SIGKILL);
    StartDaemon();
    ASSERT_TRUE(coordinator_.WaitForSessions(round));
    const v1::RegisterRequest request = coordinator_.registrations().back();
    ASSERT_EQ(request.tasks_size(), 1);
    EXPECT_EQ(request.tasks(0).state(), v1::TASK_STATE_RUNNING);
    EXPECT_EQ(request.tasks(0).joined_ranks_size(), 2);
    EXPECT_TRUE(request.tasks(0).acknowledged());
    EXPECT_GE(request.tasks(0).seq(), seq);
    seq = request.tasks(0).seq();
    EXPECT_EQ(RankPids(), pids) << "a rank was killed or started twice";
  }
  coordinator_.StopTask(10, 30'000, false);
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  const v1::TaskReport last = *coordinator_.Report(10);
  for (const v1::RankOutcome& exit : last.exits()) EXPECT_EQ(exit.exit_code(), 85);
}

TEST_F(Daemon, NoStepIsLostOverAKillOfTheDaemon) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=300 step_ms=5"));
  for (size_t round = 2; round <= 4; ++round) {
    poll(nullptr, 0, 200);
    EndDaemon(SIGKILL);
    poll(nullptr, 0, 100);
    StartDaemon();
    ASSERT_TRUE(coordinator_.WaitForSessions(round));
  }
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  // A daemon that finds its task ended tells of the end first, then of what the shim kept.
  EXPECT_TRUE(WaitUntil([&] { return Steps().size() == 300u; })) << Steps().size() << " of 300";
}

TEST_F(Daemon, KillNineOfTheShimLeavesNothing) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 child", 2));
  ASSERT_TRUE(WaitUntil([&] { return RankPids().size() == 4; }));
  kill(ShimPid(10), SIGKILL);
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_TRUE(RankPids().empty()) << "reported as ended while something ran";
  ASSERT_EQ(coordinator_.Report(10)->exits_size(), 2);
  const v1::TaskReport last = *coordinator_.Report(10);
  for (const v1::RankOutcome& exit : last.exits()) {
    EXPECT_EQ(exit.category(), "CONTROL_PLANE");
    EXPECT_NE(exit.detail().find("SHIM_LOST"), std::string::npos);
  }
}

TEST_F(Daemon, ShimKilledWhileTheDaemonWasAway) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 child"));
  EndDaemon(SIGKILL);
  const uint64_t told = coordinator_.Report(10)->seq();
  kill(ShimPid(10), SIGKILL);
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  const v1::TaskReport report = coordinator_.registrations().back().tasks(0);
  EXPECT_EQ(report.state(), v1::TASK_STATE_EXITED);
  EXPECT_GT(report.seq(), told);
  EXPECT_NE(report.detail().find("SHIM_LOST"), std::string::npos);
  EXPECT_TRUE(RankPids().empty());
}

TEST_F(Daemon, AnotherInstanceMeansGone) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000"));
  EndDaemon(SIGKILL);
  kill(ShimPid(10), SIGKILL);
  const uint64_t told = coordinator_.Report(10)->seq();
  ASSERT_TRUE(control::WriteFileDurably(FolderOf(10) + "/instance", "before-the-reboot"));
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  const v1::TaskReport report = coordinator_.registrations().back().tasks(0);
  EXPECT_EQ(report.state(), v1::TASK_STATE_GONE);
  EXPECT_GT(report.seq(), told);
}

TEST_F(Daemon, RestartOfTheCoordinatorTouchesNoRank) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=400 step_ms=5"));
  const std::vector<int> pids = RankPids();
  for (size_t round = 2; round <= 3; ++round) {
    coordinator_.Stop();
    poll(nullptr, 0, 300);
    ++coordinator_.term;
    const int64_t up_ms = WallMs();
    coordinator_.Start();
    ASSERT_TRUE(coordinator_.WaitForSessions(round));
    std::printf("coordinator up to re-attached: %lld ms\n",
                static_cast<long long>(WallMs() - up_ms));
    EXPECT_EQ(coordinator_.registrations().back().tasks(0).state(), v1::TASK_STATE_RUNNING);
    EXPECT_EQ(RankPids(), pids);
  }
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(10)->exits(0).exit_code(), 0);
  EXPECT_EQ(Steps().size(), 400u) << "a step is missing in the series";
}

TEST_F(Daemon, QuestionsSurviveALostStream) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  coordinator_.Assign(Train(10, "steps=3 save=2 rendezvous=addr"));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_READY));
  coordinator_.StartTask(Train(10, ""));
  const auto asked = [](const v1::WorkerMsg& message) { return message.has_rendezvous(); };
  ASSERT_TRUE(coordinator_.WaitFor([&] { return CountMessages(asked) == 1; }));
  // Unanswered: lost with the coordinator, then with the daemon. Now everything gets its answer.
  coordinator_.Stop();
  coordinator_.on_message = [this](const v1::WorkerMsg& message) {
    v1::CoordMsg answer;
    if (message.has_rendezvous()) {
      answer.mutable_rendezvous()->set_fence(10);
      answer.mutable_rendezvous()->set_rank(0);
      answer.mutable_rendezvous()->mutable_reply()->set_n(message.rendezvous().request().n());
      answer.mutable_rendezvous()->mutable_reply()->add_values("10.1.2.3");
    } else if (message.has_open_checkpoint() || message.has_seal_shard()) {
      answer.mutable_checkpoint()->set_fence(10);
      answer.mutable_checkpoint()->add_ranks(0);
      v1::CheckpointReply* reply = answer.mutable_checkpoint()->mutable_reply();
      reply->set_step(2);
      reply->set_request(message.has_seal_shard() ? message.seal_shard().seal().request()
                                                  : message.open_checkpoint().open().request());
      reply->set_verdict(message.has_seal_shard() ? v1::CHECKPOINT_VERDICT_COMMITTED
                                                  : v1::CHECKPOINT_VERDICT_OK);
    } else {
      return;
    }
    coordinator_.Send(answer);
  };
  EndDaemon(SIGKILL);
  coordinator_.Start();
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(10)->exits(0).exit_code(), 0)
      << coordinator_.Report(10)->DebugString();
  EXPECT_TRUE(coordinator_.WaitFor(
      [&] { return coordinator_.Log(10, 0).find("rendezvous 10.1.2.3\n") != std::string::npos; }));
}

TEST_F(Daemon, StopAsksThenTermsThenKills) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000"));
  coordinator_.StopTask(10, 30'000, false);
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(10)->exits(0).exit_code(), 85);
  RunTask(Train(11, "steps=100000 deaf"));
  coordinator_.StopTask(11, 300, false);
  EXPECT_TRUE(coordinator_.WaitForState(11, v1::TASK_STATE_STOPPING));
  ASSERT_TRUE(coordinator_.WaitForState(11, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(11)->exits(0).signal(), SIGTERM);
  RunTask(Train(12, "steps=100000 deaf ignore_term child"));
  const int64_t start_ms = WallMs();
  coordinator_.StopTask(12, 300'000, false);
  EXPECT_TRUE(coordinator_.WaitForState(12, v1::TASK_STATE_STOPPING));
  coordinator_.StopTask(12, 0, true);
  ASSERT_TRUE(coordinator_.WaitForState(12, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(12)->exits(0).signal(), SIGKILL);
  EXPECT_LE(WallMs() - start_ms, 5'000);
  EXPECT_TRUE(WaitUntil([&] { return RankPids().empty(); }));
}

TEST_F(Daemon, RankThatIgnoresTermIsKilledAfterTenSeconds) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 deaf ignore_term"));
  const int64_t start_ms = WallMs();
  coordinator_.StopTask(10, 200, false);
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(10)->exits(0).signal(), SIGKILL);
  EXPECT_GE(WallMs() - start_ms, 10'000);
  EXPECT_LE(WallMs() - start_ms, 20'000);
}

TEST_F(Daemon, FencedTaskIsKilled) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 deaf ignore_term"));
  v1::CoordMsg message;
  message.mutable_kill_fenced()->set_fence(10);
  message.mutable_kill_fenced()->set_task(0);
  ASSERT_TRUE(coordinator_.Send(message));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_TRUE(WaitUntil([&] { return RankPids().empty(); }));
}

TEST_F(Daemon, PermitRunsOutWithTheCoordinator) {
  coordinator_.permit_ttl_ms = 1'000;
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000"));
  const auto page = control::RankPage::Open(FolderOf(10) + "/page-0");
  ASSERT_NE(page, nullptr);
  EXPECT_FALSE(page->HoldsPermit(10)) << "never granted";
  coordinator_.permitted = {10};
  ASSERT_TRUE(WaitUntil([&] { return page->HoldsPermit(10); }));
  // Counted from when the heartbeat was sent, so never more than the time to live from now.
  EXPECT_LE(page->ReadPermit().deadline_ns, control::BootTimeNs() + 1'000'000'000);
  coordinator_.Stop();
  EXPECT_TRUE(WaitUntil([&] { return !page->HoldsPermit(10); }, milliseconds(1'500)));
  EXPECT_EQ(RankPids().size(), 1u) << "silence takes the permit, not the rank";
}

TEST_F(Daemon, OrphansEndWithoutDaemonAndCoordinator) {
  coordinator_.max_orphan_ms = 1'500;
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 deaf ignore_term child"));
  poll(nullptr, 0, 2'000);
  EXPECT_EQ(RankPids().size(), 2u) << "in contact";
  coordinator_.Stop();
  EndDaemon(SIGKILL);
  EXPECT_TRUE(WaitUntil([&] { return ProcessesWith(FolderOf(10)).empty(); }, milliseconds(4'000)));
}

TEST_F(Daemon, SilentCoordinatorIsLeftAndFoundAgain) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  coordinator_.answer_heartbeats = false;
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  coordinator_.answer_heartbeats = true;
  v1::CoordMsg message;
  message.mutable_stale()->set_reason("test");
  const size_t sessions = coordinator_.sessions();
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Send(message); }));
  EXPECT_TRUE(coordinator_.WaitForSessions(sessions + 1));
}

TEST_F(Daemon, LogsGoOnWhereTheyStopped) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  const v1::TaskAssignment assignment = Command(
      20,
      {"sh", "-c", "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.005; done"});
  RunTask(assignment);
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Log(20, 0).size() > 100; }));
  EndDaemon(SIGKILL);
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  coordinator_.Stop();
  poll(nullptr, 0, 200);
  coordinator_.Start();
  ASSERT_TRUE(coordinator_.WaitForState(20, v1::TASK_STATE_EXITED));
  coordinator_.Forget(20);
  ASSERT_TRUE(WaitUntil([&] { return access(FolderOf(20).c_str(), F_OK) != 0; }));
  std::string expected;
  for (int i = 0; i < 400; ++i) expected += "line " + std::to_string(i) + "\n";
  EXPECT_EQ(coordinator_.Log(20, 0), expected);
  EXPECT_EQ(coordinator_.log_bytes_repeated(), 0u);
}

TEST_F(Daemon, TermDetachesOrDrains) {
  StartDaemon({"--on-term", "detach"});
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000"));
  const std::vector<int> pids = RankPids();
  EXPECT_EQ(EndDaemon(SIGTERM), 0);
  EXPECT_EQ(RankPids(), pids);
  StartDaemon({"--on-term", "drain"});
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  kill(daemon_, SIGTERM);
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_EQ(coordinator_.Report(10)->exits(0).exit_code(), 85);
  coordinator_.Forget(10);
  EXPECT_EQ(EndDaemon(SIGCONT), 0);
  const auto leaves = [](const v1::WorkerMsg& message) { return message.has_leave(); };
  EXPECT_EQ(CountMessages(leaves), 1u);
}

TEST_F(Daemon, SurvivesHangupBrokenPipesAndGarbageFolders) {
  std::filesystem::create_directories(state() + "/tasks/junk");
  std::filesystem::create_directories(state() + "/tasks/5-0");
  std::ofstream(state() + "/tasks/5-0/spec") << "x";
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  EXPECT_EQ(coordinator_.registrations().back().tasks_size(), 0);
  for (const int number : {SIGHUP, SIGPIPE}) kill(daemon_, number);
  RunTask(Train(10, "steps=3"));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
}

TEST_F(Daemon, BadFlagsAreUsageErrors) {
  StartDaemon({"--memory", "lots"});
  EXPECT_EQ(EndDaemon(0), 2);
  StartDaemon({"--data-address"});
  EXPECT_EQ(EndDaemon(0), 2);
}

}  // namespace
}  // namespace heddle::worker
