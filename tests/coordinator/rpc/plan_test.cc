// Jobs.Plan: what a run needs and where it would run, without a trace of the question.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "base/net/grpc_channel.h"
#include "model/training_plan.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/coordinator/support/fake_worker.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

class Plan : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(process_.Start());
    jobs_ = process_.Jobs();
  }
  StatusOr<v1::PlanReply> Ask(const v1::SubmitRequest& request) {
    grpc::ClientContext context;
    v1::PlanReply reply;
    RETURN_IF_ERROR(net::FromGrpc(jobs_->Plan(&context, request, &reply)));
    return reply;
  }
  size_t JobCount() {
    grpc::ClientContext context;
    v1::ListRequest all;
    all.set_all(true);
    v1::ListReply reply;
    EXPECT_OK(net::FromGrpc(jobs_->List(&context, all, &reply)));
    return static_cast<size_t>(reply.jobs_size());
  }

  CoordinatorProcess process_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
};

TEST_F(Plan, SaysWhatARunTakesAndThatItStartsNow) {
  FakeWorker worker(process_.Channel(), {.id = "one", .cpus = 4});
  ASSERT_OK(worker.Connect());
  const v1::SubmitRequest request = TrainJob("asked", 2);
  const StatusOr<v1::PlanReply> plan = Ask(request);
  ASSERT_OK(plan.status());
  EXPECT_EQ(static_cast<int64_t>(plan->memory().bytes_per_rank()),
            model::BytesPerRank(request.config()));
  EXPECT_GE(plan->memory().reserved_per_rank(), plan->memory().bytes_per_rank());
  EXPECT_TRUE(plan->memory().fits());
  EXPECT_TRUE(plan->placement().starts_now()) << plan->placement().text();
  ASSERT_EQ(plan->placement().nodes_size(), 1);
  EXPECT_EQ(plan->placement().nodes(0), "one");
  EXPECT_EQ(static_cast<uint64_t>(plan->config().parallel().memory_per_rank()),
            plan->memory().reserved_per_rank());
  EXPECT_GT(plan->storage().checkpoint_bytes(), 0u);
  EXPECT_EQ(JobCount(), 0u) << "nothing was submitted";
}

TEST_F(Plan, ExplainsWhyItWouldWait) {
  const StatusOr<v1::PlanReply> alone = Ask(TrainJob("alone", 1));
  ASSERT_OK(alone.status());
  EXPECT_FALSE(alone->placement().starts_now());
  ASSERT_GE(alone->warnings_size(), 1);

  FakeWorker worker(process_.Channel(), {.id = "one", .cpus = 2});
  ASSERT_OK(worker.Connect());
  const StatusOr<v1::PlanReply> wide = Ask(TrainJob("wide", 400));
  ASSERT_OK(wide.status());
  EXPECT_FALSE(wide->placement().starts_now());
  EXPECT_NE(wide->placement().text().find("INFEASIBLE"), std::string::npos)
      << wide->placement().text();
  EXPECT_GT(wide->placement().funnel_size(), 0);
}

TEST_F(Plan, WhatNoNodeCanHoldDoesNotFit) {
  FakeWorker worker(process_.Channel(), {.id = "one", .cpus = 2});
  ASSERT_OK(worker.Connect());
  v1::SubmitRequest request = TrainJob("large", 1);
  request.mutable_config()->mutable_training()->set_micro_batch_size(4096);
  const StatusOr<v1::PlanReply> plan = Ask(request);
  ASSERT_OK(plan.status());
  EXPECT_FALSE(plan->memory().fits());
  EXPECT_GT(plan->memory().changes_size(), 0) << plan->ShortDebugString();
}

TEST_F(Plan, RefusesWhatSubmitRefuses) {
  v1::SubmitRequest request = TrainJob("bad", 1);
  request.mutable_config()->mutable_training()->set_max_steps(0);
  EXPECT_STATUS(Ask(request), StatusCode::kInvalidArgument, "training.max_steps");
  request = TrainJob("after", 1);
  request.add_after("j-nothing");
  EXPECT_STATUS(Ask(request), StatusCode::kNotFound, "");
}

TEST_F(Plan, SubmitRefusesAReservationThatIsTooSmall) {
  v1::SubmitRequest request = TrainJob("tight", 1);
  request.mutable_config()->mutable_parallel()->set_memory_per_rank(20 << 20);
  EXPECT_STATUS(Submit(*jobs_, request), StatusCode::kInvalidArgument,
                "parallel.memory_per_rank: 20MiB");
  const StatusOr<v1::PlanReply> plan = Ask(request);
  ASSERT_OK(plan.status());
  EXPECT_FALSE(plan->memory().fits()) << "plan shows what submit refuses";
}

}  // namespace
}  // namespace heddle::test
