// `heddle doctor` over real gRPC: a fake worker's heads become findings, it is asked for stacks,
// and what was found outlives the attempt and the coordinator.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "base/ids/ids.h"
#include "base/net/grpc_channel.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/coordinator/support/fake_worker.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

class Doctor : public ::testing::Test {
 protected:
  Doctor() : worker_(process_.Channel(), {}) {}
  void SetUp() override {
    ASSERT_OK(process_.Start());
    jobs_ = process_.Jobs();
    ASSERT_OK(worker_.Connect());
  }
  v1::DoctorReply Ask(const std::string& id) {
    grpc::ClientContext context;
    v1::JobRef ref;
    ref.set_job(id);
    v1::DoctorReply reply;
    const grpc::Status status = jobs_->Doctor(&context, ref, &reply);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return reply;
  }
  // A job of two ranks that has done a step; its id.
  std::string Running() { return Running(TrainJob("doctor", 2)); }
  std::string Running(const v1::SubmitRequest& request) {
    const StatusOr<std::string> id = Submit(*jobs_, request);
    EXPECT_OK(id);
    const StatusOr<v1::TaskAssignment> task = worker_.RunAssigned();
    EXPECT_OK(task);
    task_ = *task;
    EXPECT_OK(WaitForState(*jobs_, *id, "ACTIVE"));
    for (const uint64_t step : {1, 2}) {
      v1::WorkerMsg points;
      points.mutable_points()->set_job(task_.job());
      points.mutable_points()->set_fence(task_.fence());
      points.mutable_points()->add_points()->set_step(step);
      worker_.Send(std::move(points));
    }
    return *id;
  }
  // Rank 1 hangs for `age_ms` or, with another fingerprint, launched something else.
  void Beat(int64_t age_ms, uint64_t fingerprint = 7) {
    v1::WorkerMsg message;
    message.mutable_heartbeat()->set_n(++beats_);
    v1::Heartbeat::TaskBeat* beat = message.mutable_heartbeat()->add_tasks();
    beat->set_fence(task_.fence());
    beat->set_task(task_.task());
    beat->set_step(2);
    for (uint32_t rank = 0; rank < 2; ++rank) {
      v1::RankHead* head = beat->add_heads();
      head->set_rank(rank);
      head->set_step(2);
      head->set_phase(9);
      head->set_phase_age_ms(age_ms);
      head->set_seq(rank == 1 && fingerprint == 7 ? 30 : 31);
      head->set_op(3);
      head->set_fingerprint(rank == 1 ? fingerprint : 7);
      head->set_waiting(rank == 0);
      head->set_process_state(rank == 1 ? "T" : "S");
    }
    worker_.Send(std::move(message));
  }
  // Beats until the doctor has a finding.
  v1::DoctorReply BeatUntilFound(const std::string& id) {
    v1::DoctorReply reply;
    for (int i = 0; i < 60 && reply.findings().empty(); ++i) {
      Beat(6'000 + i * 200);
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      reply = Ask(id);
    }
    return reply;
  }

  CoordinatorProcess process_;
  FakeWorker worker_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
  v1::TaskAssignment task_;
  uint64_t beats_ = 0;
};

TEST_F(Doctor, SaysPlainlyThatNothingIsWrong) {
  const std::string id = Running();
  Beat(10);
  v1::DoctorReply reply;
  for (int i = 0; i < 200 && reply.ranks_size() < 2; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    reply = Ask(id);
  }
  EXPECT_TRUE(reply.findings().empty());
  EXPECT_EQ(reply.summary().rfind("nothing is wrong: attempt 1 is at step 2 of ", 0), 0u)
      << reply.summary();
  ASSERT_EQ(reply.ranks_size(), 2);
  EXPECT_EQ(reply.ranks(0).phase(), "backward");
  EXPECT_EQ(reply.ranks(0).operation(), "#31 all-gather embedding");
  EXPECT_TRUE(reply.ranks(0).waiting());
  EXPECT_EQ(reply.ranks(1).process_state(), "stopped");
  worker_.Exit(task_, 0);
  ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
  reply = Ask(id);
  EXPECT_EQ(reply.summary(), "nothing is wrong: the job succeeded");
  EXPECT_TRUE(reply.ranks().empty());
}

TEST_F(Doctor, FindsAHangAsksForStacksAndRemembersThem) {
  const std::string id = Running();
  v1::DoctorReply reply = BeatUntilFound(id);
  ASSERT_EQ(reply.findings_size(), 1);
  EXPECT_EQ(reply.findings(0).kind(), "HANG");
  EXPECT_EQ(reply.findings(0).rank(), 1u);
  EXPECT_EQ(reply.findings(0).node(), "worker-1");
  EXPECT_EQ(reply.summary(), reply.findings(0).text());
  EXPECT_NE(reply.summary().find("rank 1 is at #30 all-gather embedding, rank 0 at #31 all-gather "
                                 "embedding; rank 1 is stopped (T) in backward"),
            std::string::npos)
      << reply.summary();
  const StatusOr<v1::CoordMsg> asked =
      worker_.Take([](const v1::CoordMsg& m) { return m.has_collect_stacks(); });
  ASSERT_OK(asked);
  EXPECT_EQ(asked->collect_stacks().fence(), task_.fence());

  v1::WorkerMsg message;
  v1::StackReport* stacks = message.mutable_stacks();
  stacks->set_job(task_.job());
  stacks->set_fence(task_.fence());
  stacks->set_task(task_.task());
  v1::RankStack* stack = stacks->add_stacks();
  stack->set_rank(1);
  stack->set_text("thread 7 heddle-trainer T\n  heddle::comm::Await()+0x1\n");
  worker_.Send(std::move(message));
  const auto evidence = [&] {
    const v1::DoctorReply now = Ask(id);
    std::string text;
    if (now.findings().empty()) return text;
    for (const std::string& line : now.findings(0).evidence()) text += line + "\n";
    return text;
  };
  for (int i = 0; i < 200 && evidence().find("Await") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_NE(evidence().find("stacks of rank 1 on worker-1:"), std::string::npos) << evidence();

  // The rank goes on: the hang is history.
  v1::WorkerMsg points;
  points.mutable_points()->set_job(task_.job());
  points.mutable_points()->set_fence(task_.fence());
  points.mutable_points()->add_points()->set_step(3);
  worker_.Send(std::move(points));
  for (int i = 0; i < 200 && evidence().find("went on later") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_NE(evidence().find("the attempt went on later, to step 3"), std::string::npos);
  EXPECT_EQ(Ask(id).summary().rfind("nothing is wrong: attempt 1 is at step 3 of ", 0), 0u)
      << Ask(id).summary();

  // The attempt ends, the coordinator dies: what was found stays.
  worker_.Exit(task_, 93);
  ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
  process_.End(SIGKILL);
  ASSERT_OK(process_.Start());
  jobs_ = process_.Jobs();
  reply = Ask(id);
  ASSERT_EQ(reply.findings_size(), 2);
  EXPECT_EQ(reply.findings(0).kind(), "HANG") << "the gravest first";
  EXPECT_EQ(reply.findings(1).kind(), "FAILED");
  EXPECT_NE(evidence().find("Await"), std::string::npos);
}

TEST_F(Doctor, TellsOfStepsThatWaitForExpertsAlsoAfterTheEnd) {
  v1::SubmitRequest request = TrainJob("spilled", 1);
  v1::RunConfig& config = *request.mutable_config();
  config.mutable_model()->mutable_moe()->set_n_experts(8);
  config.mutable_memory()->mutable_expert_offloading()->set_enabled(true);
  config.mutable_memory()->mutable_expert_offloading()->set_resident_mb(512);
  config.mutable_memory()->mutable_expert_offloading()->set_spill_dir("/spill");
  const std::string id = Running(request);
  // Slow from step 21 on: what went before would make the median a good one.
  v1::WorkerMsg points;
  points.mutable_points()->set_job(task_.job());
  points.mutable_points()->set_fence(task_.fence());
  for (uint64_t step = 3; step <= 40; ++step) {
    v1::MetricPoint* point = points.mutable_points()->add_points();
    point->set_step(step);
    point->set_step_seconds(10);
    point->mutable_offload()->set_bytes_read(uint64_t{1} << 30);
    point->mutable_offload()->set_read_seconds(9);
    point->mutable_offload()->set_exposed_seconds(step > 20 ? 9 : 0);
  }
  worker_.Send(std::move(points));
  v1::DoctorReply reply = Ask(id);
  for (int i = 0; i < 200 && reply.findings().empty(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    reply = Ask(id);
  }
  ASSERT_EQ(reply.findings_size(), 1);
  const v1::Finding slow = reply.findings(0);
  EXPECT_EQ(slow.kind(), "SLOW_OFFLOAD");
  EXPECT_EQ(slow.node(), "worker-1");
  EXPECT_EQ(slow.attempt(), 1u);
  EXPECT_EQ(slow.step(), 40u);
  EXPECT_NE(slow.text().find("9000 of 10000 ms (90 %), median of the last 20 steps"),
            std::string::npos)
      << slow.text();
  EXPECT_EQ(reply.summary(), slow.text());

  worker_.Exit(task_, 0);
  ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
  reply = Ask(id);
  ASSERT_EQ(reply.findings_size(), 1);
  EXPECT_EQ(reply.findings(0).node(), "worker-1");
  EXPECT_EQ(reply.summary(),
            "the job succeeded; on the way, in attempt 1: " + reply.findings(0).text());
}

TEST_F(Doctor, NamesAMismatchAtOnceAndEndsTheAttempt) {
  const std::string id = Running();
  Beat(10, /*fingerprint=*/8);
  const StatusOr<v1::CoordMsg> stop =
      worker_.Take([](const v1::CoordMsg& m) { return m.has_stop(); });
  ASSERT_OK(stop);
  EXPECT_TRUE(stop->stop().kill_now());
  const v1::DoctorReply reply = Ask(id);
  ASSERT_GE(reply.findings_size(), 1);
  EXPECT_EQ(reply.findings(0).kind(), "MISMATCH");
}

TEST_F(Doctor, TellsWhyAJobWaitsAndRefusesUnknownOnes) {
  const StatusOr<std::string> id = Submit(*jobs_, TrainJob("large", 64));
  ASSERT_OK(id);
  const v1::DoctorReply reply = Ask(*id);
  ASSERT_EQ(reply.findings_size(), 1);
  EXPECT_EQ(reply.findings(0).kind(), "WAITING");
  EXPECT_EQ(reply.summary().rfind("the job waits: ", 0), 0u) << reply.summary();
  grpc::ClientContext context;
  v1::JobRef ref;
  ref.set_job("j-zzzz");
  v1::DoctorReply none;
  EXPECT_EQ(jobs_->Doctor(&context, ref, &none).error_code(), grpc::StatusCode::NOT_FOUND);
}

}  // namespace
}  // namespace heddle::test
