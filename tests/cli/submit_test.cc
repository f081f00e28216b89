#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "cli/commands/context.h"
#include "cli/commands/follow.h"
#include "cli/commands/print.h"
#include "cli/commands/verb.h"
#include "tests/cli/fake_cluster.h"

namespace heddle::cli {
namespace {

class SubmitTest : public ::testing::Test {
 protected:
  std::string Config(const std::string& text) const {
    const std::string path = fake_.folder() + "/my run.yaml";
    std::ofstream(path) << text;
    return path;
  }
  FakeCluster fake_;
};

TEST_F(SubmitTest, SendsTheResolvedConfigOnceAndPrintsTheId) {
  const Outcome outcome =
      fake_.Run({"submit", Config("data: {path: /d}\n"), "training.max_steps=5", "--hold",
                 "--after", "j-1", "--after", "any:j-2", "--request-id", "r1", "-o", "json"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "{\"id\":\"j-7k2\"}\n");
  ASSERT_EQ(fake_.submits.size(), 1u);
  const v1::SubmitRequest& request = fake_.submits[0];
  EXPECT_EQ(request.request_id(), "r1");
  EXPECT_TRUE(request.hold());
  EXPECT_EQ(request.after_size(), 2);
  EXPECT_EQ(request.config().name(), "my-run");
  EXPECT_EQ(request.config().training().max_steps(), 5);
  EXPECT_TRUE(request.config().training().has_seed()) << "defaults are part of what is sent";
}

TEST_F(SubmitTest, MakesPathsAbsolute) {
  ASSERT_EQ(fake_
                .Run({"submit", Config("data: {path: d/../e, eval_path: f}\ntraining: "
                                       "{eval_interval: 5}\n")})
                .status,
            0);
  const std::string here = std::filesystem::current_path().string();
  EXPECT_EQ(fake_.submits[0].config().data().path(), here + "/e");
  EXPECT_EQ(fake_.submits[0].config().data().eval_path(), here + "/f");
}

TEST_F(SubmitTest, ListsAllProblemsAndSendsNothing) {
  const std::string path = Config("data: {path: /d}\nmodel: {d_modl: 3}\n");
  const Outcome outcome = fake_.Run({"submit", path, "training.max_steps=0"});
  EXPECT_EQ(outcome.status, 2);
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(outcome.err, "heddle: submit: " + path +
                             ":2:9: model.d_modl: unknown key (nearest name: model.d_model)\n"
                             "heddle: submit: override 'training.max_steps=0': "
                             "training.max_steps: must be between 1 and 1000000000000 (is 0)\n");
  EXPECT_TRUE(fake_.submits.empty());
  EXPECT_EQ(fake_.Run({"submit", fake_.folder() + "/none.yaml"}).status, 3);
}

TEST_F(SubmitTest, ASweepIsAJobEach) {
  const Outcome outcome =
      fake_.Run({"submit", Config("data: {path: /d}\n"), "training.seed=1,2", "--request-id", "r"});
  EXPECT_EQ(outcome.out, "j-7k2\nj-7k2\n");
  ASSERT_EQ(fake_.submits.size(), 2u);
  EXPECT_EQ(fake_.submits[1].config().training().seed(), 2);
  EXPECT_EQ(fake_.submits[1].config().name(), "my-run-1");
  EXPECT_NE(fake_.submits[0].request_id(), fake_.submits[1].request_id());
}

TEST_F(SubmitTest, WarnsOfOptionsWithoutEffect) {
  const Outcome outcome =
      fake_.Run({"submit", Config("data: {path: /d}\nmodel: {attention: {swa: {window: 8}}}\n")});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err,
            "heddle: warning: model.attention.swa has no effect: no layer is of kind swa\n");
}

TEST_F(SubmitTest, RepeatsThroughARestartWithTheSameRequestId) {
  fake_.failure = Unavailable("restarting");
  fake_.failures = 3;
  const Outcome outcome = fake_.Run({"submit", Config("data: {path: /d}\n")});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  ASSERT_EQ(fake_.submits.size(), 4u);
  EXPECT_EQ(fake_.submits[0].request_id(), fake_.submits[3].request_id());
  EXPECT_EQ(fake_.submits[0].request_id().size(), 32u);
}

// Where experts are offloaded the step says what that cost.
TEST_F(SubmitTest, AStepSaysWhatItsSpilledExpertsCost) {
  v1::MetricPoint point;
  point.set_step(3);
  point.set_loss(2);
  point.set_learning_rate(0.001);
  point.set_tokens_per_second(10);
  v1::OffloadUse* use = point.mutable_offload();
  use->set_bytes_read(250'000'000);
  use->set_read_seconds(0.125);
  use->set_bytes_written(3'000'000);
  use->set_exposed_seconds(0.0234);
  use->set_hits(30);
  use->set_misses(2);
  EXPECT_EQ(StepLine(point),
            "Step 3 | Loss: 2.0000 | LR: 1.00e-03 | Tokens/sec: 10 | Experts: read 250.0 MB (2.00 "
            "GB/s), wrote 3.0 MB (0.00 GB/s), waited 23 ms, 2 of 32 uses\n");
}

TEST_F(SubmitTest, FollowShowsStepsAndEndsLikeTheJob) {
  v1::MetricPoint point;
  for (int step = 1; step <= 2; ++step) {
    point.set_step(static_cast<uint64_t>(step));
    point.set_loss(5.25 - step);
    point.set_learning_rate(0.001);
    point.set_tokens_per_second(1234.4);
    fake_.points.push_back(point);
  }
  v1::Job running = fake_.job;
  fake_.history = {running, running};
  fake_.job.set_state("DONE");
  fake_.job.clear_phase();
  fake_.job.set_result("FAILED");
  fake_.job.set_reason("NUMERIC");
  const Outcome outcome = fake_.Run({"submit", Config("data: {path: /d}\n"), "--follow"});
  EXPECT_EQ(outcome.status, 1);
  // States come by a stream of their own, so one may stand between two steps.
  const size_t first =
      outcome.out.find("Step 1 | Loss: 4.2500 | LR: 1.00e-03 | Tokens/sec: 1234\n");
  const size_t second =
      outcome.out.find("Step 2 | Loss: 3.2500 | LR: 1.00e-03 | Tokens/sec: 1234\n");
  EXPECT_NE(second, std::string::npos) << outcome.out;
  EXPECT_LT(first, second) << outcome.out;
  EXPECT_NE(outcome.out.find("j-7k2 ACTIVE RUNNING\n"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("j-7k2 DONE FAILED: NUMERIC\n"), std::string::npos) << outcome.out;
}

TEST_F(SubmitTest, FollowShowsWhatACommandPrints) {
  v1::LogLine line;
  line.set_attempt(1);
  line.set_data("hello\n");
  fake_.lines = {line};
  fake_.job.set_kind("command");
  fake_.history = {fake_.job, fake_.job, fake_.job};
  fake_.job.set_state("DONE");
  fake_.job.set_result("SUCCEEDED");
  const Outcome outcome =
      fake_.Run({"submit", Config("kind: command\ncommand: {argv: [x]}\n"), "--follow"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("[1.0] hello\n"), std::string::npos) << outcome.out;
}

TEST_F(SubmitTest, FollowTellsOnceWhyAJobWaits) {
  fake_.why.set_id("j-7k2");
  fake_.why.set_state("QUEUED");
  fake_.why.set_reason("INFEASIBLE");
  fake_.why.set_text("needs 1 rank of 999 cpus");
  fake_.why.set_advice("ask for less");
  v1::Job queued = fake_.job;
  queued.set_state("QUEUED");
  queued.clear_phase();
  fake_.history.assign(50, queued);  // five seconds
  fake_.job.set_state("DONE");
  fake_.job.set_result("CANCELLED");
  const Outcome outcome = fake_.Run({"submit", Config("data: {path: /d}\n"), "--follow"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.err,
            "heddle: j-7k2 waits: INFEASIBLE: needs 1 rank of 999 cpus (ask for less); "
            "`heddle cancel j-7k2` ends it\n");
}

// No machine can join the temporary cluster of `run`.
TEST_F(SubmitTest, AJobThatCanNeverFitEndsARunOnItsOwnCluster) {
  fake_.why.set_id("j-7k2");
  fake_.why.set_state("QUEUED");
  fake_.why.set_reason("INFEASIBLE");
  fake_.why.set_text("needs 1 rank of 999 cpus");
  fake_.job.set_state("QUEUED");
  fake_.job.clear_phase();
  CommandContext context;
  context.coordinator = fake_.address();
  ::testing::internal::CaptureStdout();
  const StatusOr<v1::Job> job = FollowJob(context, "j-7k2", /*alone=*/true);
  ::testing::internal::GetCapturedStdout();
  EXPECT_EQ(job.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(Message(job.status()),
            "job j-7k2 can never start here: INFEASIBLE: needs 1 rank of 999 cpus");
}

// A run elsewhere would look like the wanted one.
TEST_F(SubmitTest, RunStartsNoClusterInsteadOfOneThatWasNamed) {
  const std::string path = Config("data: {path: /d}\n");
  fake_.failure = Unavailable("away");
  const Outcome named = fake_.Run({"run", path});  // HEDDLE_COORDINATOR
  EXPECT_EQ(named.status, 4);
  EXPECT_NE(named.err.find("does not answer"), std::string::npos) << named.err;
  EXPECT_EQ(named.err.find("/tmp/heddle-run-"), std::string::npos) << named.err;
  ASSERT_TRUE(WriteContext(fake_.folder(), {.coordinator = "unix:/none.sock", .state = "/s"}).ok());
  const Outcome context = fake_.Run({"run", path}, /*bare=*/true);  // no daemons to start here
  EXPECT_NE(context.err.find("the cluster of `heddle up` cannot be used (coordinator "
                             "unix:/none.sock does not answer"),
            std::string::npos)
      << context.err;
  EXPECT_NE(context.err.find("starting a temporary one"), std::string::npos) << context.err;
  const size_t kept = context.err.find("/tmp/heddle-run-");
  ASSERT_NE(kept, std::string::npos) << context.err;
  const std::string folder = context.err.substr(kept, sizeof("/tmp/heddle-run-XXXXXX") - 1);
  EXPECT_NE(context.err.find("are kept in " + folder + "; to use them: heddle up --state " +
                             folder + "\n"),
            std::string::npos)
      << context.err;
  std::filesystem::remove_all(folder);
}

TEST_F(SubmitTest, ConfigShowReadsTheEnvironmentAndWarns) {
  setenv("HOME", "/h", 1);
  const std::string path =
      Config("data: {path: \"${oc.env:HOME}\"}\nmodel: {attention: {swa: {window: 8}}}\n");
  const Outcome outcome = fake_.Run({"config", "show", path, "-o", "json"}, true);
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json.at("data").at("path"), "/h");
  EXPECT_EQ(json.at("warnings").at(0),
            "model.attention.swa has no effect: no layer is of kind swa");
}

TEST_F(SubmitTest, ResumeSendsOverrides) {
  const Outcome outcome = fake_.Run({"resume", "j-7k2", "training.max_steps=9"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  ASSERT_EQ(fake_.resumes.size(), 1u);
  EXPECT_EQ(fake_.resumes[0].overrides(0), "training.max_steps=9");
}

TEST_F(SubmitTest, ConfigShowPrintsOrigins) {
  const std::string path = Config("data: {path: /d}\n");
  const Outcome text = fake_.Run({"config", "show", path, "training.seed=4"}, true);
  EXPECT_EQ(text.status, 0);
  EXPECT_NE(text.out.find("  seed: 4                                   # override "
                          "'training.seed=4'\n"),
            std::string::npos)
      << text.out;
  EXPECT_NE(text.out.find("# " + path + ":1:8\n"), std::string::npos);
  const Outcome json = fake_.Run({"config", "show", path, "-o", "json"}, true);
  EXPECT_EQ(nlohmann::json::parse(json.out).at("training").at("precision"), "bf16");
  EXPECT_EQ(fake_.Run({"config", "explain", "training.lr_x"}, true).status, 3);
}

}  // namespace
}  // namespace heddle::cli
