// plan and submit --dry-run.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "cli/commands/verb.h"
#include "tests/cli/fake_cluster.h"

namespace heddle::cli {
namespace {

class PlanTest : public ::testing::Test {
 protected:
  PlanTest() {
    v1::PlanReply::Memory* memory = fake_.plan.mutable_memory();
    memory->add_categories()->set_name("masters");
    memory->mutable_categories(0)->set_planned(300 << 20);
    memory->set_bytes_per_rank(300 << 20);
    memory->set_reserved_per_rank(512 << 20);
    memory->set_fits(true);
    fake_.plan.mutable_placement()->set_starts_now(true);
    fake_.plan.mutable_placement()->set_text("starts at once; ranks: 1 on one");
    fake_.plan.mutable_throughput()->set_accumulation("sync_last");
    fake_.plan.set_parameters(12345);
  }
  std::string Config(const std::string& text = "data: {path: /d}\n") const {
    const std::string path = fake_.folder() + "/run.yaml";
    std::ofstream(path) << text;
    return path;
  }
  FakeCluster fake_;
};

TEST_F(PlanTest, ShowsMemoryThroughputStorageAndPlacement) {
  const Outcome outcome = fake_.Run({"plan", Config(), "training.max_steps=7"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  for (const char* part : {"run: 12345 parameters, 1 ranks", "masters", "300MiB", "512MiB",
                           "not known", "sync_last", "starts at once; ranks: 1 on one"}) {
    EXPECT_NE(outcome.out.find(part), std::string::npos) << part << "\n" << outcome.out;
  }
  ASSERT_EQ(fake_.plans.size(), 1u);
  EXPECT_EQ(fake_.plans[0].config().training().max_steps(), 7);
  EXPECT_TRUE(fake_.submits.empty());
}

TEST_F(PlanTest, PrintsTheJsonOfTheContract) {
  const Outcome outcome = fake_.Run({"plan", Config(), "-o", "json"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  const nlohmann::json plan = nlohmann::json::parse(outcome.out);
  for (const char* key : {"memory", "throughput", "placement", "config"}) {
    EXPECT_TRUE(plan.contains(key)) << key;
  }
  EXPECT_EQ(plan["memory"]["bytes_per_rank"], 300 << 20);
  EXPECT_FALSE(plan["throughput"].contains("tokens_per_second")) << "nobody knows it";
}

TEST_F(PlanTest, ComputesTheThroughputFromFiguresOfTheUser) {
  const Outcome outcome = fake_.Run({"plan", Config(), "--matmul-tflops", "1", "-o", "json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const nlohmann::json throughput = nlohmann::json::parse(outcome.out)["throughput"];
  EXPECT_EQ(throughput["bound"], "compute");
  EXPECT_NEAR(throughput["tokens_per_second"].get<double>() *
                  throughput["flops_per_token"].get<double>() / 1e12,
              1, 1e-6);
  EXPECT_EQ(fake_.Run({"plan", Config(), "--matmul-tflops", "-1"}).status, 2);
}

TEST_F(PlanTest, WhatDoesNotFitEndsWithOneAndTheChanges) {
  fake_.plan.mutable_memory()->set_fits(false);
  fake_.plan.mutable_memory()->add_changes("parallel.shard=full: 100MiB (gathers)");
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"plan", Config()},
        std::vector<std::string>{"submit", Config(), "--dry-run"}}) {
    const Outcome outcome = fake_.Run(words);
    EXPECT_EQ(outcome.status, 1);
    EXPECT_NE(outcome.out.find("fits with parallel.shard=full: 100MiB (gathers)"),
              std::string::npos)
        << outcome.out;
  }
  EXPECT_TRUE(fake_.submits.empty());
}

TEST_F(PlanTest, DryRunPlansWithTheJobsItWaitsFor) {
  const Outcome outcome = fake_.Run(
      {"submit", Config(), "--dry-run", "--after", "j-1", "--resume-from", "j-2@5", "-o", "json"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_TRUE(nlohmann::json::parse(outcome.out).contains("memory"));
  ASSERT_EQ(fake_.plans.size(), 1u);
  EXPECT_EQ(fake_.plans[0].after_size(), 1);
  EXPECT_EQ(fake_.plans[0].resume_from(), "j-2@5");
  EXPECT_TRUE(fake_.submits.empty());
}

TEST_F(PlanTest, AnErrorOfTheConfigurationIsTheSameAsOfSubmit) {
  const Outcome plan = fake_.Run({"plan", Config("data: {path: /d}\nmodel: {d_modl: 3}\n")});
  EXPECT_EQ(plan.status, 2);
  EXPECT_NE(plan.err.find("model.d_modl: unknown key (nearest name: model.d_model)"),
            std::string::npos)
      << plan.err;
  EXPECT_EQ(fake_.Run({"plan", fake_.folder() + "/none.yaml"}).status, 3);
}

TEST_F(PlanTest, WithoutAClusterAllButThePlacementIsKnown) {
  const Outcome outcome = fake_.Run({"plan", Config(), "-o", "json"}, /*bare=*/true);
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const nlohmann::json plan = nlohmann::json::parse(outcome.out);
  EXPECT_GT(plan["memory"]["bytes_per_rank"], 0);
  EXPECT_GT(plan["storage"]["checkpoint_bytes"], 0);
  EXPECT_FALSE(plan.contains("placement"));
  EXPECT_NE(plan["warnings"].dump().find("without a coordinator"), std::string::npos);
  EXPECT_EQ(fake_
                .Run({"plan", Config(), "--coordinator", "unix:/none", "--timeout", "1s"},
                     /*bare=*/true)
                .status,
            4)
      << "who named one hears that it is away";
}

}  // namespace
}  // namespace heddle::cli
