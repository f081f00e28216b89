// What a client may ask and how it is told no.
#include <google/protobuf/descriptor.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <set>

#include "base/net/grpc_channel.h"
#include "heddle/v1/options.pb.h"
#include "heddle/v1/worker_link.pb.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/coordinator/support/fake_worker.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

class Requests : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    process_ = new CoordinatorProcess;
    ASSERT_OK(process_->Start());
  }
  static void TearDownTestSuite() {
    delete process_;
    process_ = nullptr;
  }
  void SetUp() override { jobs_ = process_->Jobs(); }

  static CoordinatorProcess* process_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
};
CoordinatorProcess* Requests::process_ = nullptr;

TEST_F(Requests, ARepeatedSubmitGivesTheSameJobAndAnotherBodyAConflict) {
  v1::SubmitRequest request = CommandJob("once");
  request.set_request_id("the-same");
  const StatusOr<std::string> first = Submit(*jobs_, request);
  ASSERT_OK(first);
  EXPECT_EQ(*Submit(*jobs_, request), *first);
  request.mutable_config()->set_name("other");
  EXPECT_STATUS(Submit(*jobs_, request), StatusCode::kAlreadyExists, "");
}

TEST_F(Requests, EveryProblemOfAConfigIsNamedAtOnce) {
  v1::SubmitRequest request = TrainJob("bad", 1);
  request.mutable_config()->mutable_training()->set_max_steps(0);
  request.mutable_config()->mutable_model()->set_d_model(-4);
  const StatusOr<std::string> refused = Submit(*jobs_, request);
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument, "training.max_steps");
  EXPECT_STATUS(refused, StatusCode::kInvalidArgument, "model.d_model");
}

TEST_F(Requests, OversizedSpecsAndBodiesAreRefused) {
  v1::SubmitRequest request = CommandJob("big");
  request.mutable_config()->mutable_command()->add_argv(std::string(300 << 10, 'x'));
  EXPECT_STATUS(Submit(*jobs_, request), StatusCode::kInvalidArgument, "at most 262144");
  request.mutable_config()->mutable_command()->add_argv(std::string(5 << 20, 'x'));
  EXPECT_STATUS(Submit(*jobs_, request), StatusCode::kResourceExhausted, "");
  EXPECT_OK(Submit(*jobs_, CommandJob("after")));
}

TEST_F(Requests, AJobThatCanNeverFitIsTakenAndToldWhy) {
  FakeWorker worker(process_->Channel(), {.id = "small", .cpus = 2});
  ASSERT_OK(worker.Connect());
  const StatusOr<std::string> id = Submit(*jobs_, CommandJob("huge", 4000));
  ASSERT_OK(id);
  grpc::ClientContext context;
  v1::JobRef ref;
  ref.set_job(*id);
  v1::WhyReply why;
  ASSERT_OK(net::FromGrpc(jobs_->Why(&context, ref, &why)));
  EXPECT_EQ(why.reason(), "INFEASIBLE") << why.ShortDebugString();
  EXPECT_EQ(why.state(), "QUEUED");
  EXPECT_FALSE(why.text().empty());
}

TEST_F(Requests, ListsInPagesWithoutGapOrRepeat) {
  std::set<std::string> submitted;
  for (int i = 0; i < 25; ++i) {
    v1::SubmitRequest request = CommandJob("page");
    request.set_hold(true);
    submitted.insert(*Submit(*jobs_, request));
  }
  std::set<std::string> listed;
  v1::ListRequest request;
  request.set_limit(7);
  do {
    grpc::ClientContext context;
    v1::ListReply reply;
    ASSERT_OK(net::FromGrpc(jobs_->List(&context, request, &reply)));
    EXPECT_LE(reply.jobs_size(), 7);
    for (const v1::Job& job : reply.jobs()) {
      EXPECT_TRUE(listed.insert(job.id()).second) << job.id() << " is on two pages";
    }
    request.set_page_token(reply.next_page_token());
  } while (!request.page_token().empty());
  for (const std::string& id : submitted) {
    EXPECT_TRUE(listed.contains(id)) << id;
  }
}

TEST_F(Requests, HoldReleaseAndCancelGoThroughTheirStates) {
  const StatusOr<std::string> id = Submit(*jobs_, CommandJob("states", 3000));
  ASSERT_OK(id);
  v1::Job reply;
  {
    grpc::ClientContext context;
    v1::HoldRequest request;
    request.set_job(*id);
    ASSERT_OK(net::FromGrpc(jobs_->Hold(&context, request, &reply)));
    EXPECT_EQ(reply.state(), "HELD");
  }
  {
    grpc::ClientContext context;
    v1::ReleaseRequest request;
    request.set_job(*id);
    ASSERT_OK(net::FromGrpc(jobs_->Release(&context, request, &reply)));
    EXPECT_EQ(reply.state(), "QUEUED");
  }
  {
    grpc::ClientContext context;
    v1::StopRequest request;
    request.set_job(*id);
    ASSERT_OK(net::FromGrpc(jobs_->Stop(&context, request, &reply)));
    EXPECT_EQ(reply.state(), "DONE");
    EXPECT_EQ(reply.result(), "CANCELLED");
  }
  {
    grpc::ClientContext context;
    v1::ReleaseRequest request;
    request.set_job(*id);
    EXPECT_STATUS(net::FromGrpc(jobs_->Release(&context, request, &reply)),
                  StatusCode::kFailedPrecondition, "");
  }
}

TEST_F(Requests, UnknownThingsAreNotFound) {
  EXPECT_STATUS(GetJob(*jobs_, "j-0000000000001"), StatusCode::kNotFound, "");
  EXPECT_FALSE(GetJob(*jobs_, "").ok());
  EXPECT_FALSE(GetJob(*jobs_, "../../etc/passwd").ok());
  grpc::ClientContext context;
  v1::CheckpointRef ref;
  ref.set_checkpoint("j-0000000000001@latest");
  v1::CheckpointDetail detail;
  EXPECT_STATUS(net::FromGrpc(process_->Checkpoints()->Get(&context, ref, &detail)),
                StatusCode::kNotFound, "");
}

TEST(ReadOnly, NearlyFullDisksTakeNoSubmitsButReadsAndCancelsGoOn) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  const StatusOr<std::string> id = Submit(*process.Jobs(), CommandJob("before"));
  ASSERT_OK(id);
  ASSERT_EQ(process.End(SIGTERM), 0);
  ASSERT_OK(process.Start({"--read-only-below", "1024TiB"}));
  const std::unique_ptr<v1::Jobs::Stub> jobs = process.Jobs();
  EXPECT_STATUS(Submit(*jobs, CommandJob("refused")), StatusCode::kResourceExhausted, "READ_ONLY");
  EXPECT_OK(GetJob(*jobs, *id));
  grpc::ClientContext status_context;
  v1::StatusReply status;
  ASSERT_OK(net::FromGrpc(process.Cluster()->Status(&status_context, {}, &status)));
  EXPECT_TRUE(status.store().read_only());
  grpc::ClientContext context;
  v1::StopRequest request;
  request.set_job(*id);
  v1::Job reply;
  ASSERT_OK(net::FromGrpc(jobs->Stop(&context, request, &reply)));
  EXPECT_EQ(reply.state(), "DONE");
}

TEST(Services, EveryMethodNamesItsRole) {
  int methods = 0;
  for (const google::protobuf::FileDescriptor* file :
       {v1::SubmitRequest::descriptor()->file(), v1::RegisterRequest::descriptor()->file()}) {
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) {
        const google::protobuf::MethodDescriptor* method = file->service(s)->method(m);
        EXPECT_NE(method->options().GetExtension(v1::role), v1::ROLE_UNSPECIFIED)
            << method->full_name() << " has no (heddle.v1.role)";
        ++methods;
      }
    }
  }
  EXPECT_GE(methods, 20);
}

}  // namespace
}  // namespace heddle::test
