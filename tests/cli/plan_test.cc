// plan and submit --dry-run.
#include <gtest/gtest.h>
#include <sys/stat.h>

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

TEST_F(PlanTest, WithoutAClusterAReservationMayStillBeTooSmall) {
  const Outcome outcome =
      fake_.Run({"plan", Config(), "parallel.memory_per_rank=100MiB"}, /*bare=*/true);
  EXPECT_EQ(outcome.status, 1);
  EXPECT_NE(outcome.out.find("it does not fit"), std::string::npos) << outcome.out;
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

// What `heddle bench-host` keeps, for a host of two threads; with another value of one field.
void KeepFigures(const FakeCluster& fake, const std::string& name = "",
                 const nlohmann::json& value = {}) {
  nlohmann::json json = {{"version", 1},
                         {"host", "loom"},
                         {"cpu", "Test CPU"},
                         {"threads", 2},
                         {"measured_at", 1'750'000'000'000},
                         {"bf16_flops", 1e12},
                         {"fp32_flops", 0.2e12},
                         {"dram_bytes", 30e9},
                         {"dram_thread_bytes", 20e9},
                         {"update_bytes", 28e9},
                         {"exchange_bytes", 4e9},
                         {"disk_dir", "/d"},
                         {"disk_read_bytes", 1e9},
                         {"disk_write_bytes", 1e9}};
  if (!name.empty()) json[name] = value;
  std::ofstream(fake.folder() + "/host_bench.json") << json.dump();
}

TEST_F(PlanTest, ReckonsWithTheFiguresOfThisHost) {
  const Outcome before = fake_.Run({"plan", Config()});
  EXPECT_EQ(before.status, 0);
  EXPECT_NE(before.err.find("no figures of this host: run heddle bench-host"), std::string::npos)
      << before.err;
  EXPECT_NE(before.out.find("not known"), std::string::npos);

  KeepFigures(fake_);
  const Outcome outcome = fake_.Run({"plan", Config(), "-o", "json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("are those of loom"), std::string::npos) << outcome.err;
  const nlohmann::json plan = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(plan["host"]["host"], "loom");
  EXPECT_EQ(plan["host"]["threads"], 2);
  const nlohmann::json& throughput = plan["throughput"];
  EXPECT_NEAR(
      throughput["step_seconds"].get<double>(),
      throughput["compute_seconds"].get<double>() + throughput["optimizer_seconds"].get<double>(),
      1e-9);
  EXPECT_GT(throughput["tokens_per_second"], 0);
  EXPECT_EQ(throughput["bound"], "compute");
  EXPECT_EQ(plan["memory"]["tiers"][0]["name"], "compute");
  EXPECT_GE(plan["storage"]["checkpoint_tb_per_day"], 0);
  EXPECT_FALSE(plan["warnings"].dump().find("not known") != std::string::npos);

  const Outcome table = fake_.Run({"plan", Config()});
  for (const char* part : {"computing", "optimizer", "written a day"}) {
    EXPECT_NE(table.out.find(part), std::string::npos) << part << "\n" << table.out;
  }
  const Outcome dry = fake_.Run({"submit", Config(), "--dry-run", "-o", "json"});
  EXPECT_GT(nlohmann::json::parse(dry.out)["throughput"]["tokens_per_second"], 0);
}

TEST_F(PlanTest, RefusesFiguresThatAreNone) {
  const std::vector<std::pair<std::string, nlohmann::json>> bad = {
      {"version", 2},      {"threads", 0}, {"threads", "two"},      {"bf16_flops", -1.0},
      {"dram_bytes", "x"}, {"host", ""},   {"measured_at", nullptr}};
  for (const auto& [name, value] : bad) {
    KeepFigures(fake_, name, value);
    const Outcome outcome = fake_.Run({"plan", Config()});
    EXPECT_EQ(outcome.status, 1) << name;
    EXPECT_NE(outcome.err.find("run heddle bench-host again"), std::string::npos) << outcome.err;
  }
  std::ofstream(fake_.folder() + "/host_bench.json") << "{\"version\": 1, \"thr";
  EXPECT_EQ(fake_.Run({"plan", Config()}).status, 1) << "half a file";
}

TEST_F(PlanTest, FailuresSetTheCheckpointInterval) {
  KeepFigures(fake_);
  const std::string config = Config("data: {path: /d}\ncheckpoint: {save_interval: auto}\n");
  const auto seconds = [&](const std::string& mttf) {
    const Outcome outcome = fake_.Run({"plan", config, "--mttf", mttf, "-o", "json"});
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out)["storage"]["save_interval_seconds"].get<double>();
  };
  EXPECT_NEAR(seconds("16h") / seconds("4h"), 2, 1e-6);
  for (const char* bad : {"often", "0", "3"}) {
    EXPECT_EQ(fake_.Run({"plan", config, "--mttf", bad}).status, 2) << bad;
  }
}

TEST_F(PlanTest, BenchHostRunsHeddleModelWithTheFolderAndTheFile) {
  const std::string program = fake_.folder() + "/heddle-model";
  std::ofstream(program) << "#!/bin/sh\necho \"$@\" > " << fake_.folder() << "/words\nexit 3\n";
  ASSERT_EQ(chmod(program.c_str(), 0755), 0);
  const auto words = [&] {
    std::ifstream file(fake_.folder() + "/words");
    std::string line;
    std::getline(file, line);
    return line;
  };
  const std::string out = " --out " + fake_.folder() + "/host_bench.json";
  EXPECT_EQ(fake_.Run({"bench-host", "--dir", "/disk", "-o", "json"}, true).status, 3);
  EXPECT_EQ(words(), "bench-host --dir /disk" + out + " -o json");
  EXPECT_EQ(fake_.Run({"bench-host"}, true).status, 3);
  EXPECT_EQ(words(), "bench-host --dir " + fake_.folder() + out);
}

}  // namespace
}  // namespace heddle::cli
