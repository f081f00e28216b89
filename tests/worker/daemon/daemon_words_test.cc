// What must be heard, and heard in its order, whoever was away; what must not be taken.
#include "tests/worker/daemon/daemon_fixture.h"

namespace heddle::worker {
namespace {

TEST_F(Daemon, NoStepIsLostWhenATaskEndsWithoutACoordinator) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=60 step_ms=10"));
  coordinator_.Stop();
  ASSERT_TRUE(WaitUntil([&] { return ProcessesWith(FolderOf(10)).empty(); }));
  coordinator_.Start();
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_TRUE(WaitUntil([&] { return Steps().size() == 60u; })) << Steps().size() << " of 60";
}

TEST_F(Daemon, ExitsWhileTheDaemonWasAwayAreReported) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=200 step_ms=2 exit=88 words=diverged"));
  EndDaemon(SIGKILL);
  ASSERT_TRUE(WaitUntil([&] { return ProcessesWith(FolderOf(10)).empty(); }));
  const uint64_t told = coordinator_.Report(10)->seq();
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  const v1::RegisterRequest request = coordinator_.registrations().back();
  ASSERT_EQ(request.tasks_size(), 1);
  EXPECT_EQ(request.tasks(0).state(), v1::TASK_STATE_EXITED);
  EXPECT_GT(request.tasks(0).seq(), told) << "under an old number the end is no news";
  ASSERT_EQ(request.tasks(0).exits_size(), 1);
  EXPECT_EQ(request.tasks(0).exits(0).exit_code(), 88);
  EXPECT_EQ(request.tasks(0).exits(0).detail(), "diverged");
  EXPECT_TRUE(WaitUntil([&] { return access(FolderOf(10).c_str(), F_OK) != 0; })) << "FORGET";
}

TEST_F(Daemon, UnansweredSealIsSentAgainAfterReconnecting) {
  ASSERT_NO_FATAL_FAILURE(RunToAnUnansweredSeal());
  coordinator_.Stop();
  coordinator_.Start();
  ASSERT_TRUE(coordinator_.WaitFor([&] { return CountMessages(IsSeal) >= 2; }));
  // Fenced meanwhile: the ranks die, the seal still arrives so that its refusal is on record.
  EndDaemon(SIGKILL);
  coordinator_.verdict = [](const v1::TaskReport&) { return v1::TASK_VERDICT_KILL_FENCED; };
  StartDaemon();
  EXPECT_TRUE(coordinator_.WaitFor([&] { return CountMessages(IsSeal) >= 3; }));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
}

// The attempt must not end before it: what was saved would be thrown away.
TEST_F(Daemon, UnansweredSealComesBeforeTheEndOfItsTask) {
  ASSERT_NO_FATAL_FAILURE(RunToAnUnansweredSeal());
  for (const bool with_daemon : {true, false}) {
    const size_t before = coordinator_.messages().size();
    const size_t sessions = coordinator_.sessions();
    coordinator_.Stop();
    if (with_daemon) {
      kill(RankPids().front(), SIGKILL);
    } else {
      EndDaemon(SIGKILL);
    }
    ASSERT_TRUE(WaitUntil([&] { return ProcessesWith(FolderOf(10)).empty(); }));
    coordinator_.verdict = [](const v1::TaskReport&) { return v1::TASK_VERDICT_ADOPT; };
    coordinator_.Start();
    if (!with_daemon) StartDaemon();
    ASSERT_TRUE(coordinator_.WaitForSessions(sessions + 1));
    EXPECT_LT(coordinator_.registrations().back().tasks(0).state(), v1::TASK_STATE_EXITED);
    ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
    const std::vector<v1::WorkerMsg> messages = coordinator_.messages();
    const auto first = messages.begin() + static_cast<ptrdiff_t>(before);
    const auto seal = std::find_if(first, messages.end(), IsSeal);
    const auto end = std::find_if(first, messages.end(), [](const v1::WorkerMsg& message) {
      return message.report().state() == v1::TASK_STATE_EXITED;
    });
    EXPECT_NE(seal, messages.end());
    EXPECT_LT(seal - first, end - first);
  }
}

// The state folder was full: no number was kept. What comes under old numbers is not heard.
TEST_F(Daemon, LostCountOfReportsGoesOnFromTheCoordinators) {
  coordinator_.numbers_may_fall = true;
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000"));
  for (int i = 0; i < 10; ++i) {
    coordinator_.Assign(Train(10, ""));
    poll(nullptr, 0, 20);
  }
  const uint64_t told = coordinator_.Report(10)->seq();
  ASSERT_GT(told, 8u);
  EndDaemon(SIGKILL);
  ASSERT_EQ(unlink((FolderOf(10) + "/seq").c_str()), 0);
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  EXPECT_LT(coordinator_.registrations().back().tasks(0).seq(), told);
  EXPECT_TRUE(WaitUntil([&] { return coordinator_.Report(10)->seq() > told; }));
}

TEST_F(Daemon, DamagedFolderOfALivingTaskEndsItsProcesses) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 ignore_term child"));
  EndDaemon(SIGKILL);
  std::ofstream(FolderOf(10) + "/spec", std::ios::trunc) << "x";
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(2));
  EXPECT_EQ(coordinator_.registrations().back().tasks_size(), 0);
  EXPECT_TRUE(ProcessesWith(FolderOf(10)).empty()) << "the coordinator takes the task for gone";
}

// The coordinator repeats its order until the task has ended.
TEST_F(Daemon, StoppedShimIsKilledHoweverOftenTheOrderIsRepeated) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000 deaf ignore_term"));
  ASSERT_EQ(kill(ShimPid(10), SIGSTOP), 0);
  v1::CoordMsg message;
  message.mutable_kill_fenced()->set_fence(10);
  message.mutable_kill_fenced()->set_task(0);
  const auto ended = [&] { return coordinator_.Report(10)->state() == v1::TASK_STATE_EXITED; };
  for (int i = 0; i < 10 && !ended(); ++i) {
    ASSERT_TRUE(coordinator_.Send(message));
    coordinator_.WaitFor(ended, milliseconds(2'500));
  }
  EXPECT_TRUE(ended());
  EXPECT_TRUE(RankPids().empty());
}

// Sent again before the first refusal was heard, then heard: the task is over.
TEST_F(Daemon, RefusedAssignmentStaysRefused) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  std::ofstream(FolderOf(10)) << "in the way";
  coordinator_.Assign(Train(10, "steps=100000"));
  ASSERT_TRUE(coordinator_.WaitForState(10, v1::TASK_STATE_EXITED));
  EXPECT_FALSE(coordinator_.Report(10)->acknowledged());
  std::filesystem::remove(FolderOf(10));
  coordinator_.Assign(Train(10, "steps=100000"));
  const auto refusals = [](const v1::WorkerMsg& message) {
    return message.report().state() == v1::TASK_STATE_EXITED;
  };
  EXPECT_TRUE(coordinator_.WaitFor([&] { return CountMessages(refusals) == 2; }));
  EXPECT_TRUE(RankPids().empty());
  RunTask(Train(11, "steps=100000"));
}

TEST_F(Daemon, LowerFenceIsRefused) {
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  RunTask(Train(10, "steps=100000"));
  coordinator_.Assign(Train(9, "steps=100000"));
  ASSERT_TRUE(coordinator_.WaitForState(9, v1::TASK_STATE_EXITED));
  EXPECT_FALSE(coordinator_.Report(9)->acknowledged());
  EXPECT_NE(coordinator_.Report(9)->detail().find("below 10"), std::string::npos);
  EXPECT_NE(access(FolderOf(9).c_str(), F_OK), 0);
  EXPECT_EQ(RankPids().size(), 1u);
}

TEST_F(Daemon, LowerTermIsRefused) {
  coordinator_.term = 5;
  StartDaemon();
  ASSERT_TRUE(coordinator_.WaitForSessions(1));
  coordinator_.Stop();
  coordinator_.term = 4;
  coordinator_.Start();
  const size_t before = coordinator_.registrations().size();
  ASSERT_TRUE(
      coordinator_.WaitFor([&] { return coordinator_.registrations().size() >= before + 2; }));
  const auto words = [](const v1::WorkerMsg& message) { return message.term() < 5; };
  EXPECT_EQ(CountMessages(words), 0u) << "obeyed an old term";
  coordinator_.Stop();
  coordinator_.term = 6;
  coordinator_.Start();
  EXPECT_TRUE(coordinator_.WaitFor([&] {
    return CountMessages([](const v1::WorkerMsg& message) { return message.term() == 6; }) > 0;
  }));
}

}  // namespace
}  // namespace heddle::worker
