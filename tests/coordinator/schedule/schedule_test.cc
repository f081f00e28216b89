#include "coordinator/schedule/schedule.h"

#include <gtest/gtest.h>

#include <memory>

#include "coordinator/schedule/constraint.h"

namespace heddle::schedule {
namespace {

namespace v1 = heddle::v1;

NodeView Node(const std::string& id, double free, double cpus = 8, int gpus = 0) {
  NodeView node;
  node.id = id;
  node.schedulable = true;
  node.cpus = cpus;
  node.cpus_free = free;
  node.memory = node.memory_free = uint64_t{64} << 30;
  for (int i = 0; i < gpus; ++i) {
    node.gpus.push_back(i);
    node.gpus_free.push_back(i);
  }
  node.labels["host"] = id;
  return node;
}

std::shared_ptr<v1::JobRecord> Job(uint64_t id, int ranks, int cpus = 1) {
  auto job = std::make_shared<v1::JobRecord>();
  job->set_id(id);
  job->set_version(1);
  v1::ParallelConfig& parallel = *job->mutable_config()->mutable_parallel();
  parallel.mutable_ranks()->set_min(ranks);
  parallel.mutable_ranks()->set_max(ranks);
  parallel.set_cpus_per_rank(cpus);
  return job;
}

Snapshot Of(std::vector<NodeView> nodes) {
  Snapshot snapshot;
  snapshot.nodes = std::move(nodes);
  return snapshot;
}

std::string Show(const Plan& plan) {
  if (const auto* reason = std::get_if<WaitReason>(&plan)) {
    return reason->code;
  }
  std::string text;
  for (const state::event::PlacedTask& task : std::get<Placement>(plan).tasks) {
    text += Str(text.empty() ? "" : " ", task.worker, ":", task.first_rank, "+", task.ranks);
  }
  return text;
}

TEST(GangPlacer, RefusesPartialGang) {
  const Snapshot snapshot = Of({Node("a", 2), Node("b", 1)});
  EXPECT_EQ(Show(PlanPlacement(snapshot, *Job(1, 4), 0)), "WAIT_RESOURCES");
  EXPECT_EQ(Show(PlanPlacement(snapshot, *Job(1, 3), 0)), "a:0+2 b:2+1");
}

TEST(GangPlacer, TakesTheTightestSingleNode) {
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 8), Node("b", 3), Node("c", 4)}), *Job(1, 3), 0)),
            "b:0+3");
}

TEST(GangPlacer, GivesEachRankItsOwnGpus) {
  auto job = Job(1, 2);
  job->mutable_config()->mutable_parallel()->set_gpus_per_rank(2);
  Snapshot snapshot = Of({Node("a", 8, 8, 4)});
  snapshot.nodes[0].gpus_free = {0, 2, 3};
  EXPECT_EQ(Show(PlanPlacement(snapshot, *job, 0)), "WAIT_RESOURCES");
  snapshot.nodes[0].gpus_free = {0, 1, 2, 3};
  const Plan plan = PlanPlacement(snapshot, *job, 0);
  EXPECT_EQ(std::get<Placement>(plan).tasks[0].gpu_indices, (std::vector<int32_t>{0, 1, 2, 3}));
}

TEST(GangPlacer, SendsJobsOverMpiWhereMpiIs) {
  auto job = Job(1, 2);
  job->mutable_config()->mutable_parallel()->set_backend(v1::ParallelConfig::BACKEND_MPI);
  Snapshot snapshot = Of({Node("a", 8), Node("b", 8)});
  const Plan nowhere = PlanPlacement(snapshot, *job, 0);
  EXPECT_EQ(Show(nowhere), "INFEASIBLE");
  EXPECT_NE(std::get<WaitReason>(nowhere).text.find("OpenMPI"), std::string::npos);
  snapshot.nodes[1].labels["mpi"] = "openmpi";
  EXPECT_EQ(Show(PlanPlacement(snapshot, *job, 0)), "b:0+2");
  job->mutable_config()->set_kind(v1::RunConfig::KIND_COMMAND);
  EXPECT_EQ(Show(PlanPlacement(snapshot, *job, 0)), "a:0+2") << "programs bring their own MPI";
}

TEST(GangPlacer, SendsJobsWithGpusWhereGpusAre) {
  auto job = Job(1, 2);
  job->mutable_config()->mutable_parallel()->set_gpus_per_rank(1);
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 8), Node("b", 8, 8, 2), Node("c", 8)}), *job, 0)),
            "b:0+2");
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 8), Node("b", 8)}), *job, 0)), "INFEASIBLE");
}

TEST(GangPlacer, TellsWhyInCodes) {
  EXPECT_EQ(Show(PlanPlacement(Of({}), *Job(1, 1), 0)), "NO_NODES_MATCH");
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 8)}), *Job(1, 9), 0)), "INFEASIBLE");
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 2), Node("b", 2)}), *Job(1, 1, 3), 0)), "FRAGMENTED");
  Snapshot closed = Of({Node("a", 8)});
  closed.nodes[0].schedulable = false;
  closed.nodes[0].unschedulable = "CORDONED";
  const Plan plan = PlanPlacement(closed, *Job(1, 1), 0);
  EXPECT_EQ(Show(plan), "NO_NODES_MATCH");
  EXPECT_NE(std::get<WaitReason>(plan).text.find("1 CORDONED"), std::string::npos);
}

TEST(GangPlacer, AvoidsTheBlamedNodeWhileOthersDo) {
  auto job = Job(1, 2);
  job->set_avoid_node("a");
  job->set_avoid_until_ms(100);
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 2), Node("b", 8)}), *job, 50)), "b:0+2");
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 2), Node("b", 1)}), *job, 50)), "a:0+2");
  EXPECT_EQ(Show(PlanPlacement(Of({Node("a", 2), Node("b", 8)}), *job, 100)), "a:0+2");
}

TEST(Constraint, ComparesLabels) {
  const std::map<std::string, std::string> labels = {{"zone", "x"}, {"gen", "4"}};
  EXPECT_TRUE(Matches("zone=x", labels));
  EXPECT_FALSE(Matches("zone!=x", labels));
  EXPECT_TRUE(Matches("rack!=1", labels));
  EXPECT_TRUE(Matches("gen>=4", labels));
  EXPECT_FALSE(Matches("gen>=5", labels));
  EXPECT_FALSE(Matches("rack=1", labels));
  EXPECT_FALSE(Matches("nonsense", labels));
}

TEST(Pass, PlacementsSeeEachOther) {
  Snapshot snapshot = Of({Node("a", 3)});
  snapshot.queue = {Job(1, 2), Job(2, 2), Job(3, 1)};
  const PassResult result = RunPass(std::move(snapshot));
  ASSERT_EQ(result.placed.size(), 1u) << "the second keeps the node for itself";
  EXPECT_EQ(result.placed[0].job.value, 1u);
  EXPECT_EQ(result.waiting.at(3).code, "WAIT_RESERVATION");
}

TEST(Pass, LargeGangIsNotStarvedBySmallOnes) {
  Snapshot snapshot = Of({Node("a", 1), Node("b", 4)});
  snapshot.nodes[0].cpus = 4;
  snapshot.nodes[1].cpus = 4;
  snapshot.queue = {Job(1, 8), Job(2, 1), Job(3, 1)};
  const PassResult result = RunPass(std::move(snapshot));
  EXPECT_TRUE(result.placed.empty());
  EXPECT_EQ(result.waiting.at(1).code, "WAIT_RESOURCES");
}

TEST(Pass, WhatCanNeverFitBlocksNobody) {
  Snapshot snapshot = Of({Node("a", 4)});
  snapshot.queue = {Job(1, 100), Job(2, 1)};
  const PassResult result = RunPass(std::move(snapshot));
  ASSERT_EQ(result.placed.size(), 1u);
  EXPECT_EQ(result.placed[0].job.value, 2u);
  ASSERT_EQ(result.infeasible.size(), 1u);
  EXPECT_EQ(result.infeasible[0].job.value, 1u);
}

}  // namespace
}  // namespace heddle::schedule
