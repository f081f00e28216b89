#include "coordinator/schedule/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "base/rng/rng.h"
#include "coordinator/schedule/constraint.h"
#include "coordinator/schedule/free_room.h"
#include "coordinator/state/apply.h"

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

// The rule of placement, said in the plainest way: by slots and place, from the roomiest on.
std::vector<std::pair<uint32_t, uint32_t>> ChoosePlainly(const std::vector<uint32_t>& slots,
                                                         uint32_t ranks) {
  std::vector<uint32_t> order(slots.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return slots[a] > slots[b]; });
  std::vector<std::pair<uint32_t, uint32_t>> chosen;
  for (size_t next = 0; next < order.size() && slots[order[next]] > 0; ++next) {
    if (slots[order[next]] < ranks) {
      ranks -= slots[order[next]];
      chosen.emplace_back(order[next], slots[order[next]]);
      if (ranks == 0) return chosen;
      continue;
    }
    size_t tightest = next;
    for (size_t i = next; i < order.size() && slots[order[i]] >= ranks; ++i) {
      if (slots[order[i]] < slots[order[tightest]]) tightest = i;
    }
    chosen.emplace_back(order[tightest], ranks);
    return chosen;
  }
  return {};
}

TEST(FreeRoom, ChoosesAsTheRuleSays) {
  RngCursor random(Rng(1, "test.choose"));
  for (int round = 0; round < 3000; ++round) {
    std::vector<uint32_t> slots(random.Below(12));
    for (uint32_t& one : slots) one = static_cast<uint32_t>(random.Below(6));
    const auto ranks = static_cast<uint32_t>(1 + random.Below(20));
    std::vector<std::pair<uint32_t, uint32_t>> chosen;
    for (const ChosenNode& one : Choose(slots, ranks)) chosen.emplace_back(one.node, one.ranks);
    ASSERT_EQ(chosen, ChoosePlainly(slots, ranks)) << "round " << round;
  }
}

TEST(FreeRoom, WhatAShapeFindsStaysTrueWhileOthersTakeAndReserve) {
  RngCursor random(Rng(2, "test.room"));
  std::vector<NodeView> nodes;
  for (int i = 0; i < 30; ++i) {
    const double cpus = static_cast<double>(4 + 4 * random.Below(4));
    nodes.push_back(Node(Str("n", 10 + i), cpus, cpus, static_cast<int>(random.Below(3))));
    nodes.back().labels["zone"] = Str(random.Below(2));
    nodes.back().schedulable = random.Below(8) > 0;
  }
  FreeRoom free(&nodes);
  const std::vector<Shape> shapes = {{.ranks = 2, .cpus = 3},
                                     {.ranks = 1, .cpus = 1, .gpus = 1},
                                     {.ranks = 6, .cpus = 2, .constraints = {"zone=1"}}};
  std::vector<ShapeRoom> rooms;
  for (const Shape& shape : shapes) rooms.push_back(free.Look(shape));
  for (int round = 0; round < 60; ++round) {
    const size_t which = random.Below(shapes.size());
    free.Refresh(shapes[which], &rooms[which]);
    ASSERT_EQ(rooms[which].slots, free.Look(shapes[which]).slots) << "round " << round;
    if (round % 10 == 9) free.Reserve(static_cast<uint32_t>(random.Below(nodes.size())));
    free.Take(shapes[which], Choose(rooms[which].slots, shapes[which].ranks));
  }
  for (const NodeView& node : nodes) EXPECT_GE(node.cpus_free, 0);
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

// A state with room for everything that is queued.
struct Roomy {
  Roomy() {
    Do(state::event::CoordinatorStarted{Term{1}, "c", std::string(16, 'k')});
    for (int i = 0; i < 40; ++i) {
      v1::RegisterRequest node;
      node.set_worker_id(Str("n", 10 + i));
      node.set_session(1);
      node.set_instance("boot");
      node.mutable_capacity()->set_cpus(64);
      Do(state::event::WorkerRegistered{node});
    }
    RngCursor random(Rng(3, "test.queue"));
    for (uint64_t i = 1; i <= 200; ++i) {
      state::event::JobSubmitted submit;
      submit.request.identity = "me";
      submit.id = JobId{i};
      // Most are of one shape.
      const int ranks = random.Below(4) > 0 ? 1 : static_cast<int>(2 + random.Below(5));
      submit.config = Job(i, ranks)->config();
      submit.config.mutable_schedule()->set_priority(static_cast<int32_t>(random.Below(90)));
      Do(submit);
    }
  }
  void Do(const state::Event& event) {
    const state::Outcome outcome = state::Apply(state, event, {1000, 1000});
    ASSERT_TRUE(outcome.status.ok()) << outcome.status;
    for (const v1::EventRecord& record : outcome.events) state.Commit(record);
  }
  state::State state;
};

TEST(Pass, PartsOfItPlaceTheSameInTheSameOrder) {
  Roomy roomy;
  ASSERT_EQ(roomy.state.queue().size(), 200u);
  std::vector<uint64_t> whole;
  for (const auto& one : RunPass(MakeSnapshot(roomy.state, {1000, 1000})).placed) {
    whole.push_back(one.job.value);
  }
  ASSERT_EQ(whole.size(), 200u);
  const PassLimits limits = {.jobs_max = 60, .placed_max = 25, .explain = false};
  std::vector<uint64_t> parts;
  for (bool more = true; more;) {
    Snapshot snapshot = MakeSnapshot(roomy.state, {1000, 1000}, limits);
    const PassResult result = RunPass(std::move(snapshot), limits);
    for (const state::event::AttemptPlaced& one : result.placed) {
      parts.push_back(one.job.value);
      roomy.Do(one);
    }
    EXPECT_LE(result.placed.size(), 25u);
    more = result.cut;
  }
  EXPECT_EQ(parts, whole);
  EXPECT_TRUE(roomy.state.queue().empty());
  EXPECT_TRUE(roomy.state.queue_by_shape().empty());
}

TEST(Pass, LimitsHideNoShapeBehindOneThatDoesNotFit) {
  Roomy roomy;
  // In front of all: many of a shape that has to wait, as another holds its only node.
  v1::RegisterRequest node;
  node.set_worker_id("special");
  node.set_session(1);
  node.set_instance("boot");
  node.mutable_capacity()->set_cpus(2);
  node.mutable_capacity()->add_labels("special=1");
  roomy.Do(state::event::WorkerRegistered{node});
  for (uint64_t i = 1001; i <= 1100; ++i) {
    state::event::JobSubmitted submit;
    submit.request.identity = "me";
    submit.id = JobId{i};
    submit.config = Job(i, 1, 2)->config();
    submit.config.mutable_schedule()->set_priority(99);
    submit.config.mutable_schedule()->add_constraints("special=1");
    roomy.Do(submit);
  }
  const PassLimits limits = {.jobs_max = 60, .placed_max = 1000, .explain = false};
  size_t placed = 0;
  for (bool more = true; more;) {
    const PassResult result = RunPass(MakeSnapshot(roomy.state, {1000, 1000}, limits), limits);
    for (const state::event::AttemptPlaced& one : result.placed) roomy.Do(one);
    placed += result.placed.size();
    more = result.cut;
  }
  EXPECT_EQ(placed, 201u) << "one of the special ones and all others";
}

}  // namespace
}  // namespace heddle::schedule
