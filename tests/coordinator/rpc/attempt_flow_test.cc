// A job's whole life over real gRPC with fake workers: placement, rendezvous, points, checkpoints,
// ends; then restarts of the coordinator, stale sessions and stale fences in the middle of it.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <thread>

#include "base/ids/ids.h"
#include "base/net/grpc_channel.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/coordinator/support/fake_worker.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

// Beats until it goes, as a daemon does.
class Beating {
 public:
  explicit Beating(FakeWorker* worker)
      : thread_([this, worker] {
          while (!stop_) {
            worker->Beat();
            std::this_thread::sleep_for(std::chrono::milliseconds(500));
          }
        }) {}
  ~Beating() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

class AttemptFlow : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(process_.Start());
    jobs_ = process_.Jobs();
  }
  std::string SubmitTrain(int ranks) {
    const StatusOr<std::string> id = Submit(*jobs_, TrainJob("flow", ranks));
    EXPECT_OK(id);
    return id.ok() ? *id : "";
  }
  bool HasEvent(const std::string& id, const std::string& code) {
    const StatusOr<v1::Job> job = GetJob(*jobs_, id);
    EXPECT_OK(job);
    for (const v1::Event& event : job->events()) {
      if (event.code() == code) {
        return true;
      }
    }
    return false;
  }
  std::string Events(const std::string& id) {
    std::string text;
    const StatusOr<v1::Job> job = GetJob(*jobs_, id);
    EXPECT_OK(job);
    for (const v1::Event& event : job->events()) {
      text += event.code() + ": " + event.text() + "\n";
    }
    return text;
  }

  CoordinatorProcess process_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
};

v1::RendezvousRequest Ask(uint64_t n, v1::RendezvousVerb verb, const std::string& key) {
  v1::RendezvousRequest request;
  request.set_n(n);
  request.set_verb(verb);
  request.add_keys(key);
  request.set_timeout_ms(10'000);
  return request;
}

void SendRendezvous(FakeWorker& worker, const v1::TaskAssignment& task, uint32_t rank,
                    const v1::RendezvousRequest& request) {
  v1::WorkerMsg message;
  v1::RankRendezvous* body = message.mutable_rendezvous();
  body->set_job(task.job());
  body->set_fence(task.fence());
  body->set_rank(rank);
  *body->mutable_request() = request;
  worker.Send(std::move(message));
}

StatusOr<v1::RendezvousReply> TakeRendezvous(FakeWorker& worker, uint32_t rank, uint64_t n) {
  ASSIGN_OR_RETURN(const v1::CoordMsg message, worker.Take([&](const v1::CoordMsg& m) {
    return m.has_rendezvous() && m.rendezvous().rank() == rank && m.rendezvous().reply().n() == n;
  }));
  return message.rendezvous().reply();
}

TEST_F(AttemptFlow, FromSubmitOverACheckpointToDone) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = SubmitTrain(2);
  const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
  ASSERT_OK(task);
  EXPECT_EQ(task->ranks_size(), 2);
  EXPECT_EQ(task->world_size(), 2u);
  EXPECT_EQ(task->restore_size(), 0);
  ASSERT_OK(WaitForState(*jobs_, id, "ACTIVE"));

  v1::WorkerMsg points;
  points.mutable_points()->set_job(task->job());
  points.mutable_points()->set_fence(task->fence());
  v1::MetricPoint* point = points.mutable_points()->add_points();
  point->set_step(1);
  point->set_loss(9.5);
  worker.Send(std::move(points));

  const StatusOr<v1::CheckpointReply> saved = worker.Save(*task, 1);
  ASSERT_OK(saved);
  EXPECT_EQ(saved->verdict(), v1::CHECKPOINT_VERDICT_COMMITTED) << saved->detail() << Events(id);
  EXPECT_TRUE(HasEvent(id, "CHECKPOINT_COMMITTED")) << Events(id);
  const StatusOr<v1::Job> running = GetJob(*jobs_, id);
  ASSERT_OK(running);
  EXPECT_EQ(running->step(), 1u);
  EXPECT_DOUBLE_EQ(running->loss(), 9.5);

  worker.Exit(*task, 0);
  ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
  const StatusOr<v1::Job> done = GetJob(*jobs_, id);
  ASSERT_OK(done);
  EXPECT_EQ(done->result(), "SUCCEEDED");
  ASSERT_EQ(done->attempts_size(), 1);
  EXPECT_EQ(done->attempts(0).fence(), task->fence());
  ASSERT_EQ(done->checkpoints_size(), 1);
  EXPECT_EQ(done->checkpoints(0).step(), 1u);
  EXPECT_EQ(done->restarts(), 0u);
}

class Faults : public AttemptFlow {
 protected:
  // As many jobs as would quarantine a node, each of which fails so on it; the node afterwards.
  v1::Node NodeAfterFailures(int code, const std::string& category) {
    FakeWorker worker(process_.Channel(), {});
    EXPECT_OK(worker.Connect());
    for (int i = 0; i < 3; ++i) {
      const std::string id = SubmitTrain(1);
      const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
      EXPECT_OK(task) << i;
      if (!task.ok()) break;
      worker.Exit(*task, code, category);
      for (int wait = 0; wait < 1000 && !HasEvent(id, "ATTEMPT_ENDED"); ++wait) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      last_ = id;
    }
    grpc::ClientContext context;
    v1::NodeRef ref;
    ref.set_node("worker-1");
    v1::Node node;
    EXPECT_TRUE(process_.Nodes()->Get(&context, ref, &node).ok());
    return node;
  }
  std::string last_;
};

TEST_F(Faults, OfADataSetFailTheJobAndLeaveTheNodeAlone) {
  const v1::Node node = NodeAfterFailures(93, "USER_DATA");
  EXPECT_EQ(node.health(), "OK");
  EXPECT_FALSE(node.has_health_reason());
  ASSERT_OK(WaitForState(*jobs_, last_, "DONE"));
  const StatusOr<v1::Job> job = GetJob(*jobs_, last_);
  ASSERT_OK(job);
  EXPECT_EQ(job->attempts_size(), 1);
  EXPECT_EQ(job->attempts(0).cause().code(), "BAD_DATA");
}

TEST_F(Faults, OfAStorageQuarantineTheNodeWhichTellsWhyAndUntilWhen) {
  const v1::Node node = NodeAfterFailures(87, "STORAGE");
  EXPECT_EQ(node.health(), "QUARANTINED");
  EXPECT_NE(node.health_reason().find("last STORAGE_ERROR"), std::string::npos);
  EXPECT_GT(node.quarantined_until_ms(), 1'600'000'000'000);
}

TEST_F(AttemptFlow, AFailedRankRestartsFromTheNewestCheckpoint) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = SubmitTrain(1);
  const StatusOr<v1::TaskAssignment> first = worker.RunAssigned();
  ASSERT_OK(first);
  ASSERT_OK(worker.Save(*first, 5));
  worker.Exit(*first, 86, "NETWORK");
  const StatusOr<v1::TaskAssignment> second = worker.RunAssigned(5);
  ASSERT_OK(second) << Events(id);
  EXPECT_GT(second->fence(), first->fence());
  EXPECT_EQ(second->attempt(), 2u);
  ASSERT_GE(second->restore_size(), 1);
  EXPECT_EQ(second->restore(0).step(), 5u);

  // The dead attempt's rank still tries to save: its fence is behind.
  const StatusOr<v1::CheckpointReply> stale = worker.Save(*first, 6);
  ASSERT_OK(stale);
  EXPECT_EQ(stale->verdict(), v1::CHECKPOINT_VERDICT_FENCED);
  EXPECT_EQ(stale->current_fence(), second->fence());
  worker.Exit(*second, 0);
  ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
  EXPECT_EQ(GetJob(*jobs_, id)->checkpoints_size(), 1);
}

TEST_F(AttemptFlow, KillNineOfTheCoordinatorStopsNoAttempt) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = SubmitTrain(1);
  const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
  ASSERT_OK(task);
  ASSERT_OK(worker.Save(*task, 3));
  process_.End(SIGKILL);
  ASSERT_OK(process_.Start());

  v1::TaskReport held;
  held.set_job(task->job());
  held.set_fence(task->fence());
  held.set_task(task->task());
  held.set_seq(100);
  held.set_state(v1::TASK_STATE_RUNNING);
  held.set_acknowledged(true);
  held.add_joined_ranks(0);
  const StatusOr<v1::RegisterReply> back = worker.Connect({held});
  ASSERT_OK(back);
  EXPECT_EQ(back->term(), 2u);
  ASSERT_EQ(back->tasks_size(), 1);
  EXPECT_EQ(back->tasks(0).verdict(), v1::TASK_VERDICT_ADOPT);
  const StatusOr<v1::CheckpointReply> saved = worker.Save(*task, 4);
  ASSERT_OK(saved);
  EXPECT_EQ(saved->verdict(), v1::CHECKPOINT_VERDICT_COMMITTED) << saved->detail();
  const StatusOr<v1::Job> job = GetJob(*jobs_, id);
  ASSERT_OK(job);
  EXPECT_EQ(job->attempts_size(), 1);
  EXPECT_EQ(job->state(), "ACTIVE");
}

TEST_F(AttemptFlow, RendezvousAnswersSurviveARestartAndCountOnce) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  SubmitTrain(2);
  const StatusOr<v1::CoordMsg> assigned =
      worker.Take([](const v1::CoordMsg& m) { return m.has_assign(); });
  ASSERT_OK(assigned);
  const v1::TaskAssignment task = assigned->assign();
  v1::TaskReport ready;
  ready.set_job(task.job());
  ready.set_fence(task.fence());
  ready.set_seq(1);
  ready.set_state(v1::TASK_STATE_READY);
  ready.set_acknowledged(true);
  ready.set_data_address("127.0.0.1");
  worker.Report(ready);
  ASSERT_OK(worker.Take([](const v1::CoordMsg& m) { return m.has_start(); }));

  v1::RendezvousRequest add = Ask(1, v1::RENDEZVOUS_VERB_ADD, "count");
  add.set_amount(1);
  SendRendezvous(worker, task, 0, add);
  StatusOr<v1::RendezvousReply> sum = TakeRendezvous(worker, 0, 1);
  ASSERT_OK(sum);
  EXPECT_EQ(sum->number(), 1);
  SendRendezvous(worker, task, 1, Ask(1, v1::RENDEZVOUS_VERB_GET, "address"));  // waits

  process_.End(SIGKILL);
  ASSERT_OK(process_.Start());
  ready.set_seq(2);
  ASSERT_OK(worker.Connect({ready}));
  SendRendezvous(worker, task, 0, add);  // nobody told rank 0 whether it arrived
  sum = TakeRendezvous(worker, 0, 1);
  ASSERT_OK(sum);
  EXPECT_EQ(sum->number(), 1) << "a repeated ADD counted twice";
  add.set_n(2);
  SendRendezvous(worker, task, 0, add);
  EXPECT_EQ(TakeRendezvous(worker, 0, 2)->number(), 2);

  SendRendezvous(worker, task, 1, Ask(1, v1::RENDEZVOUS_VERB_GET, "address"));
  v1::RendezvousRequest set = Ask(3, v1::RENDEZVOUS_VERB_SET, "address");
  set.add_values("10.0.0.1");
  SendRendezvous(worker, task, 0, set);
  const StatusOr<v1::RendezvousReply> value = TakeRendezvous(worker, 1, 1);
  ASSERT_OK(value);
  ASSERT_EQ(value->values_size(), 1);
  EXPECT_EQ(value->values(0), "10.0.0.1");

  v1::RendezvousRequest late = Ask(4, v1::RENDEZVOUS_VERB_WAIT, "never");
  late.set_timeout_ms(50);
  SendRendezvous(worker, task, 0, late);
  const StatusOr<v1::RendezvousReply> timed_out = TakeRendezvous(worker, 0, 4);
  ASSERT_OK(timed_out);
  EXPECT_EQ(timed_out->code(), static_cast<int>(StatusCode::kDeadlineExceeded));
}

TEST_F(AttemptFlow, AnOldSessionIsSentAwayAndDisturbsNobody) {
  FakeWorker old_one(process_.Channel(), {});
  ASSERT_OK(old_one.Connect());
  FakeWorker new_one(process_.Channel(), {});  // the same worker id, a later session
  ASSERT_OK(new_one.Connect());
  old_one.Beat();
  EXPECT_OK(old_one.Take([](const v1::CoordMsg& m) { return m.has_stale(); }));
  const std::string id = SubmitTrain(1);
  const StatusOr<v1::TaskAssignment> task = new_one.RunAssigned();
  ASSERT_OK(task);
  new_one.Exit(*task, 0);
  EXPECT_OK(WaitForState(*jobs_, id, "DONE"));
}

TEST_F(AttemptFlow, ALostWorkersJobGoesOnElsewhereUnderANewFence) {
  FakeWorker first(process_.Channel(), {.id = "worker-1"});
  ASSERT_OK(first.Connect());
  const std::string id = SubmitTrain(1);
  const StatusOr<v1::TaskAssignment> task = first.RunAssigned();
  ASSERT_OK(task);
  FakeWorker second(process_.Channel(), {.id = "worker-2"});
  ASSERT_OK(second.Connect());
  const Beating beating(&second);
  first.Disconnect();
  // SUSPECT 2 s after the stream closed, LOST when its last permit is surely over (25 s).
  const StatusOr<v1::CoordMsg> moved = second.Take(
      [&](const v1::CoordMsg& m) { return m.has_assign() && m.assign().fence() > task->fence(); },
      90'000);
  ASSERT_OK(moved) << Events(id);
  // The worker comes back with the task alive: there is no way back (A15).
  v1::TaskReport alive;
  alive.set_job(task->job());
  alive.set_fence(task->fence());
  alive.set_seq(100);
  alive.set_state(v1::TASK_STATE_RUNNING);
  alive.set_acknowledged(true);
  const StatusOr<v1::RegisterReply> back = first.Connect({alive});
  ASSERT_OK(back);
  ASSERT_EQ(back->tasks_size(), 1);
  EXPECT_EQ(back->tasks(0).verdict(), v1::TASK_VERDICT_KILL_FENCED);
  v1::WorkerMsg zombie;
  zombie.mutable_points()->set_job(task->job());
  zombie.mutable_points()->set_fence(task->fence());
  zombie.mutable_points()->add_points()->set_step(77);
  first.Send(std::move(zombie));
  const StatusOr<v1::CheckpointReply> stale = first.Save(*task, 77);
  ASSERT_OK(stale);
  EXPECT_EQ(stale->verdict(), v1::CHECKPOINT_VERDICT_FENCED);
  const StatusOr<v1::Job> job = GetJob(*jobs_, id);
  ASSERT_OK(job);
  EXPECT_EQ(job->checkpoints_size(), 0);
  EXPECT_EQ(job->step(), 0u) << "a fenced attempt's steps are not the job's";
}

TEST_F(AttemptFlow, AnotherProtocolVersionIsRefusedNamingBoth) {
  FakeWorker worker(process_.Channel(), {.protocol = 7});
  const StatusOr<v1::RegisterReply> refused = worker.Connect();
  EXPECT_STATUS(refused, StatusCode::kFailedPrecondition, "speaks protocol 7");
  EXPECT_STATUS(refused, StatusCode::kFailedPrecondition, "this coordinator speaks 1");
}

}  // namespace
}  // namespace heddle::test
