// A checkpoint that a run cannot go on from is refused at the submit, before any process starts.
#include "coordinator/rpc/resume_fit.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "base/net/grpc_channel.h"
#include "model/model_plan.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/coordinator/support/fake_worker.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

v1::RunConfig Config() { return TrainJob("resumes", 1).config(); }

// What a trainer of `config` saves.
v1::CheckpointRecord SavedBy(const v1::RunConfig& config) {
  v1::CheckpointRecord record;
  record.set_job(5);
  record.set_step(40);
  const model::ModelPlan plan = *model::PlanModel(config.model());
  const auto add = [&](const model::TensorSpec& spec) {
    v1::TensorInfo& info = *record.add_tensors();
    info.set_name(spec.name);
    for (const int64_t size : spec.shape) info.add_shape(size);
    info.set_moment_type(config.training().moments() == v1::TrainingConfig::MOMENTS_BF16
                             ? v1::ELEMENT_TYPE_BF16
                             : v1::ELEMENT_TYPE_F32);
    return &info;
  };
  for (const model::TensorSpec& spec : plan.tensors) {
    v1::TensorInfo* info = add(spec);
    info->add_classes(v1::TENSOR_CLASS_MASTER);
    info->add_classes(v1::TENSOR_CLASS_MOMENT1);
    if (config.training().optimizer() == v1::TrainingConfig::OPTIMIZER_ADAMW) {
      info->add_classes(v1::TENSOR_CLASS_MOMENT2);
    }
  }
  for (const model::TensorSpec& spec : plan.buffers) {
    add(spec)->add_classes(v1::TENSOR_CLASS_BUFFER);
  }
  return record;
}

TEST(ResumeFit, TheSameRunAndOneWithOtherStepsFit) {
  v1::RunConfig config = Config();
  EXPECT_OK(rpc::CheckFits(SavedBy(config), config));
  config.mutable_training()->set_max_steps(9999);
  config.mutable_parallel()->mutable_ranks()->set_max(4);
  EXPECT_OK(rpc::CheckFits(SavedBy(Config()), config));
  config.mutable_training()->set_optimizer(v1::TrainingConfig::OPTIMIZER_LION);
  EXPECT_OK(rpc::CheckFits(SavedBy(config), config));
  v1::RunConfig moe = Config();  // with buffers
  moe.mutable_model()->mutable_moe()->set_n_experts(4);
  moe.mutable_model()->mutable_moe()->set_top_k(2);
  ASSERT_OK(model::PlanModel(moe.model()).status());
  EXPECT_OK(rpc::CheckFits(SavedBy(moe), moe));
}

TEST(ResumeFit, AnotherWidthNamesTheFirstTensorAndBothShapes) {
  const v1::RunConfig saved = Config();
  v1::RunConfig now = Config();
  now.mutable_model()->set_vocab_size(saved.model().vocab_size() * 2);
  const Status refused = rpc::CheckFits(SavedBy(saved), now);
  const std::string width = Str(", ", saved.model().d_model(), "]");
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument,
                Str("the run needs shape [", now.model().vocab_size(), width,
                    ", the checkpoint has [", saved.model().vocab_size(), width));
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument, "@40 does not fit this run: tensor ");
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument, "give the run the model of");
}

TEST(ResumeFit, LayersThatOneSideLacksAreNamed) {
  const v1::RunConfig saved = Config();
  v1::RunConfig now = Config();
  const int layers = saved.model().n_layers();
  now.mutable_model()->set_n_layers(layers + 1);
  EXPECT_STATUS(rpc::CheckFits(SavedBy(saved), now), StatusCode::kInvalidArgument,
                Str("tensor model.layers.", layers, ".input_layernorm.weight: the run has it"));
  EXPECT_STATUS(rpc::CheckFits(SavedBy(now), saved), StatusCode::kInvalidArgument,
                "the run lacks it");
}

TEST(ResumeFit, AnotherOptimizerIsRefusedBothWays) {
  const v1::RunConfig adamw = Config();
  v1::RunConfig lion = Config();
  lion.mutable_training()->set_optimizer(v1::TrainingConfig::OPTIMIZER_LION);
  EXPECT_STATUS(
      rpc::CheckFits(SavedBy(adamw), lion), StatusCode::kInvalidArgument,
      "training.optimizer needs master, moment1, the checkpoint has master, moment1, moment2");
  EXPECT_STATUS(rpc::CheckFits(SavedBy(lion), adamw), StatusCode::kInvalidArgument,
                "set training.optimizer to that of");
}

TEST(ResumeFit, MomentsAreWidenedButNeverRounded) {
  const v1::RunConfig wide = Config();
  v1::RunConfig narrow = Config();
  narrow.mutable_training()->set_moments(v1::TrainingConfig::MOMENTS_BF16);
  EXPECT_STATUS(rpc::CheckFits(SavedBy(wide), narrow), StatusCode::kInvalidArgument,
                "set training.moments: fp32");
  EXPECT_OK(rpc::CheckFits(SavedBy(narrow), wide));
  EXPECT_OK(rpc::CheckFits(SavedBy(narrow), narrow));
}

// A real coordinator whose one worker runs a job, `id`, of which `task` is the task.
class ResumeFrom : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(process.Start());
    jobs = process.Jobs();
    worker = std::make_unique<FakeWorker>(process.Channel(), FakeWorkerOptions());
    ASSERT_OK(worker->Connect());
    ASSERT_OK_AND_ASSIGN(id, Submit(*jobs, TrainJob("parent", 1)));
    ASSERT_OK_AND_ASSIGN(task, worker->RunAssigned());
  }

  CoordinatorProcess process;
  std::unique_ptr<v1::Jobs::Stub> jobs;
  std::unique_ptr<FakeWorker> worker;
  std::string id;
  v1::TaskAssignment task;
};

TEST_F(ResumeFrom, SubmitDryRunAndPlanRefuseAlikeAndNothingStarts) {
  ASSERT_OK(worker->Save(task, 1).status());  // one small tensor: a model of its own
  worker->Exit(task, 0);
  ASSERT_OK(WaitForState(*jobs, id, "DONE"));

  v1::SubmitRequest request = TrainJob("child", 1);
  request.set_resume_from(id + "@latest");
  const StatusOr<std::string> refused = Submit(*jobs, request);
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument, "checkpoint.resume_from: checkpoint ");
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument, id + "@1 does not fit this run: tensor ");
  grpc::ClientContext context;
  v1::PlanReply plan;
  const Status planned = net::FromGrpc(jobs->Plan(&context, request, &plan));
  EXPECT_EQ(Message(planned), Message(refused.status()));
  request.set_dry_run(true);
  EXPECT_EQ(Message(Submit(*jobs, request).status()), Message(refused.status()));
  request.set_dry_run(false);
  request.clear_resume_from();
  request.mutable_config()->mutable_checkpoint()->set_resume_from(id + "@1");
  EXPECT_EQ(Message(Submit(*jobs, request).status()), Message(refused.status()));

  grpc::ClientContext list_context;
  v1::ListRequest all;
  all.set_all(true);
  v1::ListReply listed;
  ASSERT_OK(net::FromGrpc(jobs->List(&list_context, all, &listed)));
  EXPECT_EQ(listed.jobs_size(), 1);
}

TEST_F(ResumeFrom, DryRunAndPlanRefuseWhatARollbackLeftBehind) {
  ASSERT_OK(worker->Save(task, 5).status());
  v1::TaskReport report;
  report.set_fence(task.fence());
  report.set_task(task.task());
  report.set_seq(1000);
  report.set_state(v1::TASK_STATE_EXITED);
  report.set_acknowledged(true);
  v1::RankOutcome& exit = *report.add_exits();
  exit.set_exit_code(90);
  exit.set_category("ROLLBACK");
  exit.set_rollback_to_step(3);
  exit.mutable_skip()->set_count(4);
  worker->Report(report);
  ASSERT_OK(worker->RunAssigned().status());  // the next attempt: the rollback is known

  v1::SubmitRequest request = TrainJob("child", 1);
  request.set_resume_from(id + "@5");
  grpc::ClientContext context;
  v1::PlanReply plan;
  EXPECT_STATUS(net::FromGrpc(jobs->Plan(&context, request, &plan)),
                StatusCode::kFailedPrecondition, "left behind by a rollback");
  request.set_dry_run(true);
  EXPECT_STATUS(Submit(*jobs, request), StatusCode::kFailedPrecondition,
                "left behind by a rollback");
}

}  // namespace
}  // namespace heddle::test
