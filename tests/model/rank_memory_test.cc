// Experts divided over ranks, offloaded and spilled: what a rank keeps where.
#include "model/rank_memory.h"

#include <gtest/gtest.h>

#include <sstream>

#include "base/units/units.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/jobs.pb.h"
#include "model/training_plan.h"
#include "tests/model/plan_configs.h"

namespace heddle::model {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

constexpr int64_t kExperts = 8;
// 4 layers of 8 experts of three matrices 256 x 512.
constexpr int64_t kExpertParameters = 4 * kExperts * 3 * 256 * 512;

RunConfig Moe(int ranks = 1) {
  RunConfig config;
  *config.mutable_model() = plan_test::TinyDense();
  config.mutable_model()->mutable_moe()->set_n_experts(kExperts);
  config.mutable_model()->mutable_moe()->set_top_k(2);
  config.mutable_model()->mutable_moe()->set_d_expert(512);
  config.mutable_training()->set_max_seq_len(512);
  config.mutable_training()->set_micro_batch_size(1);
  config.mutable_training()->set_max_steps(100);
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  return config;
}

RunConfig Offloaded(int64_t resident_mb, const std::string& spill, int ranks = 1) {
  RunConfig config = Moe(ranks);
  auto* offload = config.mutable_memory()->mutable_expert_offloading();
  offload->set_enabled(true);
  offload->set_resident_mb(resident_mb);
  if (!spill.empty()) offload->set_spill_dir(spill);
  return config;
}

TEST(RankMemory, IsThePlanOfBeforeWithoutExpertsElsewhere) {
  for (const int ranks : {1, 2, 4}) {
    for (const auto shard : {ParallelConfig::SHARD_NONE, ParallelConfig::SHARD_OPTIMIZER,
                             ParallelConfig::SHARD_FULL}) {
      RunConfig config = Moe(ranks);
      config.mutable_parallel()->set_shard(shard);
      const RankMemory rank = EstimateRank(config);
      EXPECT_EQ(rank.Total(),
                EstimateMemory(config.model(), config.training(), config.parallel()).Total());
      EXPECT_EQ(rank.experts_resident + rank.experts_host + rank.experts_disk, 0);
      EXPECT_EQ(TiersOf(config).size(), 1u);
    }
  }
}

TEST(RankMemory, ExpertsAreDividedOverTheirRanks) {
  RunConfig config = Moe(4);
  const MemoryEstimate whole = EstimateRank(config).compute;
  config.mutable_parallel()->set_expert(4);
  const MemoryEstimate quarter = EstimateRank(config).compute;
  // Not sharded: everything but three quarters of the experts is on every rank.
  EXPECT_EQ(whole.master - quarter.master, 4 * kExpertParameters * 3 / 4);
  EXPECT_EQ(whole.compute_weights - quarter.compute_weights, 2 * kExpertParameters * 3 / 4);
  EXPECT_EQ(whole.moments - quarter.moments, 8 * kExpertParameters * 3 / 4);
  EXPECT_EQ(whole.gradients - quarter.gradients, 4 * kExpertParameters * 3 / 4);
  // A rank saves what nobody else has: the same bytes as before, a quarter of everything.
  EXPECT_EQ(whole.checkpoint, quarter.checkpoint);

  // Sharded: each keeps a quarter of the experts either way, but gathers fewer of them at a time.
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  const MemoryEstimate divided = EstimateRank(config).compute;
  config.mutable_parallel()->set_expert(1);
  const MemoryEstimate gathered = EstimateRank(config).compute;
  EXPECT_NEAR(static_cast<double>(divided.master) / static_cast<double>(gathered.master), 1, 0.001);
  EXPECT_LT(divided.gathered, gathered.gathered / 2);
}

TEST(RankMemory, ABoundKeepsExpertsInMemoryAndTheRestOnDisk) {
  const RankMemory plain = EstimateRank(Moe());
  const RankMemory spilled = EstimateRank(Offloaded(64, "/spill"));
  EXPECT_EQ(spilled.expert_parameters, kExpertParameters);
  EXPECT_EQ(spilled.bytes_per_expert_parameter, 18);
  EXPECT_EQ(spilled.ExpertBytes(), 18 * kExpertParameters);
  EXPECT_EQ(spilled.experts_resident, 64 * kMiB);
  EXPECT_EQ(spilled.experts_host, 0);
  EXPECT_EQ(spilled.experts_disk, (18 + 12) * kExpertParameters)
      << "files are allocated for all blocks, and a save copies masters and moments beside them";
  // Weights, gradients, masters, moments and their copy in a save: none of it in the rest.
  EXPECT_NEAR(static_cast<double>(plain.compute.Total() - spilled.compute.Total()),
              (18.0 + 12.0) * kExpertParameters, 64.0 * 1024);

  const RankMemory host = EstimateRank(Offloaded(64, ""));
  EXPECT_EQ(host.experts_disk, 0);
  EXPECT_EQ(host.experts_resident, 64 * kMiB);
  EXPECT_EQ(host.experts_host, 18 * kExpertParameters) << "a copy of what ever left the set";
  EXPECT_NEAR(static_cast<double>(host.Total()), static_cast<double>(plain.Total() + 64 * kMiB),
              64.0 * 1024)
      << "without a disk and a device a bound costs what it allows";
  EXPECT_NE(ArenaWarning(Offloaded(64, "")).find("spill_dir"), std::string::npos);
  EXPECT_EQ(ArenaWarning(Offloaded(64, "/spill")), "");
  EXPECT_EQ(ArenaWarning(Offloaded(0, "")), "");
  EXPECT_EQ(EstimateRank(Offloaded(0, "")).experts_host, 0) << "nothing ever leaves";
  heddle::v1::PlanReply plan;
  FillPlan(Offloaded(64, ""), {}, &plan);
  EXPECT_NE(plan.DebugString().find("saves none"), std::string::npos);
}

TEST(RankMemory, StateOfAnExpertFollowsItsTypes) {
  const auto bytes = [](auto change) {
    RunConfig config = Offloaded(64, "/spill");
    change(config.mutable_training());
    return EstimateRank(config).bytes_per_expert_parameter;
  };
  EXPECT_EQ(bytes([](TrainingConfig* t) { t->set_moments(TrainingConfig::MOMENTS_BF16); }), 14);
  EXPECT_EQ(bytes([](TrainingConfig* t) { t->set_precision(TrainingConfig::PRECISION_FP32); }), 16);
  EXPECT_EQ(bytes([](TrainingConfig* t) { t->set_optimizer(TrainingConfig::OPTIMIZER_LION); }), 14);
}

TEST(RankMemory, DividedAndSpilledTogether) {
  RunConfig config = Offloaded(16, "/spill", 4);
  config.mutable_parallel()->set_expert(2);
  EXPECT_EQ(EstimateRank(config).expert_parameters, kExpertParameters / 2);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  EXPECT_EQ(EstimateRank(config).expert_parameters, kExpertParameters / 4)
      << "two ranks share what two hold";
}

TEST(RankMemory, TiersAddUpToTheRankAndItsFiles) {
  const RunConfig config = Offloaded(64, "/spill");
  const std::vector<Tier> tiers = TiersOf(config);
  ASSERT_EQ(tiers.size(), 3u);
  EXPECT_EQ(tiers[0].name, "compute");
  EXPECT_EQ(tiers[1].name, "resident set");
  EXPECT_EQ(tiers[2].name, "disk spill");
  EXPECT_EQ(tiers[0].bytes + tiers[1].bytes, BytesPerRank(config));
  EXPECT_EQ(tiers[2].bytes, EstimateRank(config).experts_disk);
  const std::vector<Tier> arena = TiersOf(Offloaded(64, ""));
  ASSERT_EQ(arena.size(), 3u);
  EXPECT_EQ(arena[1].name, "resident set");
  EXPECT_EQ(arena[2].name, "host arena");
  EXPECT_EQ(arena[2].bytes, 18 * kExpertParameters);
}

TEST(RankMemory, ABoundBelowTwoExpertsIsRefusedWithTheLeast) {
  // Two experts of 393,216 parameters, 18 bytes each: 13.5 MiB.
  EXPECT_EQ(LeastResidentBytes(Offloaded(1, "/spill")), 2 * 3 * 256 * 512 * 18);
  EXPECT_TRUE(CheckResidentBound(Offloaded(14, "/spill")).ok());
  EXPECT_TRUE(CheckResidentBound(Offloaded(0, "/spill")).ok());
  const RunConfig small = Offloaded(13, "/spill");
  const Status refused = CheckResidentBound(small);
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(Message(refused).find("at least 14"), std::string::npos) << refused;
  EXPECT_EQ(CheckReservation(small).code(), StatusCode::kInvalidArgument) << "at submit";
  heddle::v1::PlanReply plan;
  FillPlan(small, {}, &plan);
  EXPECT_FALSE(plan.memory().fits());
}

// Collectives of two of four ranks receive into buffers of their own over any back end.
TEST(RankMemory, CollectivesOfSomeRanksTakeBuffers) {
  RunConfig config = Moe(4);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  const auto gathered = [&config](int degree) {
    config.mutable_parallel()->set_expert(degree);
    return static_cast<double>(EstimateRank(config).compute.gathered);
  };
  // Of a unit, the experts of a rank in a layer: bf16 weights of it and the next, fp32 gradients of
  // it and of two on their way; and the buffers: what comes of two reductions, two gathers for two
  // members.
  constexpr double kUnit = 4 * 3 * 256 * 512;
  EXPECT_NEAR(gathered(2) - gathered(4), (2 * 2 + 3 * 4 + 2 * (4 + 2)) * kUnit, 64 * 1024);
  // Without sharding one all-reduce: two buckets and the own half of one.
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_NONE);
  EXPECT_EQ(gathered(2), 2.5 * (16 << 20));
}

// Micro-batches that visit an expert together need their rows of it at the same time; with experts
// that are always there they take turns.
TEST(RankMemory, VisitsTogetherTakeScratchForAllMicroBatches) {
  RunConfig config = Moe(1);
  config.mutable_training()->set_gradient_accumulation_steps(4);
  config.mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  const auto workspace = [](const RunConfig& run) { return EstimateRank(run).compute.workspace; };
  RunConfig spilled = config;
  spilled.mutable_memory()->mutable_expert_offloading()->set_enabled(true);
  const heddle::v1::ModelConfig& model = config.model();
  const int64_t rows =
      int64_t{config.training().micro_batch_size()} * config.training().max_seq_len();
  const int64_t row = 2 * int64_t{model.d_model()};
  const int64_t hidden =
      2 * int64_t{model.moe().top_k() + model.moe().n_shared()} * model.moe().d_expert();
  const int64_t scores = 4 * int64_t{model.moe().n_experts()};
  EXPECT_EQ(4 * (workspace(spilled) - workspace(config)),
            5 * 3 * rows * (row + hidden + 2 * model.moe().top_k() * row + scores));
  spilled.mutable_training()->set_gradient_checkpointing(
      heddle::v1::TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  config.mutable_training()->set_gradient_checkpointing(
      heddle::v1::TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  EXPECT_GT(EstimateRank(spilled).compute.activations, EstimateRank(config).compute.activations)
      << "what is computed again is there for all";
}

TEST(RankMemory, UnevenRoutingIsBoundedOrTold) {
  RunConfig config = Moe(4);
  EXPECT_EQ(SkewWarning(config), "");
  config.mutable_parallel()->set_expert(4);
  const int64_t usual = BytesPerRank(config);
  EXPECT_NE(SkewWarning(config).find("capacity_factor"), std::string::npos);
  heddle::v1::PlanReply plan;
  FillPlan(config, {}, &plan);
  EXPECT_NE(plan.DebugString().find("get all tokens"), std::string::npos);
  config.mutable_model()->mutable_moe()->set_capacity_factor(1);
  EXPECT_EQ(SkewWarning(config), "");
  EXPECT_LT(BytesPerRank(config), usual);
  config.mutable_model()->mutable_moe()->set_capacity_factor(100);  // never more than all
  const int64_t all = BytesPerRank(config);
  config.mutable_model()->mutable_moe()->set_capacity_factor(4);
  EXPECT_EQ(BytesPerRank(config), all);
}

// What is refused for memory is told that experts may be divided or spilled, with the bytes of it.
TEST(RankMemory, ChangesDivideAndSpillExperts) {
  const RunConfig config = Moe(2);
  const int64_t limit = BytesPerRank(config) - 50 * kMiB;
  bool divided = false;
  bool spilled = false;
  for (const Change& change : ChangesThatFit(config, limit)) {
    EXPECT_LE(change.bytes, limit);
    RunConfig changed = config;
    if (change.settings[0] == "parallel.expert=2") {
      divided = true;
      changed.mutable_parallel()->set_expert(2);
      EXPECT_EQ(change.bytes, BytesPerRank(changed));
    }
    if (change.settings[0].rfind("memory.expert_offloading.enabled=true", 0) == 0) {
      spilled = true;
      EXPECT_NE(change.settings[0].find("spill_dir=DIR"), std::string::npos);
      EXPECT_FALSE(change.price.empty());
    }
  }
  EXPECT_TRUE(divided);
  EXPECT_TRUE(spilled);
  // A dense model has none to divide.
  RunConfig dense = config;
  dense.mutable_model()->clear_moe();
  for (const Change& change : ChangesThatFit(dense, BytesPerRank(dense) - kMiB)) {
    EXPECT_EQ(SettingsText(change).find("expert"), std::string::npos) << SettingsText(change);
  }
}

// What the plan advises is accepted by the rules of settings, whatever the ranks.
TEST(RankMemory, AdviceIsAccepted) {
  settings::LoadOptions options;
  options.search_path = plan_test::PresetPath();
  options.require_implemented = false;
  const std::vector<std::vector<std::string>> runs = {
      {"parallel.ranks=1"},
      {"parallel.ranks=2", "parallel.expert=1"},
      {"parallel.ranks=3"},  // does not divide 16 experts
      {"parallel.ranks=4", "parallel.expert=2", "parallel.shard=full"},
      {"parallel.ranks=2", "training.global_batch_size=32",
       "training.gradient_accumulation_steps=2"},
      {"parallel.ranks=4", "parallel.expert=4", "memory.expert_offloading.enabled=true"},
      {"parallel.ranks=1", "memory.expert_offloading.enabled=true",
       "memory.expert_offloading.resident_mb=100"}};
  int tried = 0;
  bool spilled_over_ranks = false;
  for (std::vector<std::string> run : runs) {
    run.insert(run.begin(), {"data.path=/d", "model=small-moe", "model.moe.n_experts=16"});
    const StatusOr<settings::ResolvedConfig> before = settings::Load("tiny", run, options);
    ASSERT_TRUE(before.ok()) << run.back() << " " << before.status();
    const int64_t now = BytesPerRank(before->config);
    for (const double part : {0.98, 0.85, 0.7, 0.55, 0.4, 0.25}) {
      const auto limit = static_cast<int64_t>(static_cast<double>(now) * part);
      for (const Change& change : ChangesThatFit(before->config, limit)) {
        std::vector<std::string> advised = run;
        std::string text = SettingsText(change);
        if (const size_t at = text.find("=DIR"); at != std::string::npos) {
          text.replace(at, 4, "=/spill");
        }
        std::istringstream words(text);
        for (std::string word; words >> word;) advised.push_back(word);
        const StatusOr<settings::ResolvedConfig> after = settings::Load("tiny", advised, options);
        EXPECT_TRUE(after.ok()) << run[3] << ": " << text << ": " << after.status();
        if (after.ok()) {
          EXPECT_LE(BytesPerRank(after->config), limit) << text;
        }
        ++tried;
        spilled_over_ranks |= text.find("resident_mb") != std::string::npos &&
                              text.find("parallel.expert=2") != std::string::npos;
      }
    }
  }
  EXPECT_GT(tried, 30);
  EXPECT_TRUE(spilled_over_ranks);
}

// Halved again where one half is not enough.
TEST(RankMemory, SpillsAsMuchAsItTakes) {
  RunConfig config = Moe();
  config.mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  RunConfig least = config;
  auto* offload = least.mutable_memory()->mutable_expert_offloading();
  offload->set_enabled(true);
  offload->set_spill_dir("/spill");
  offload->set_resident_mb(24);
  const int64_t limit = BytesPerRank(least);
  const std::vector<Change> row = ChangesThatFit(config, limit);
  ASSERT_EQ(row.size(), 1u);
  EXPECT_LE(row[0].bytes, limit);
  EXPECT_NE(SettingsText(row[0]).find("memory.expert_offloading.resident_mb="), std::string::npos);
}

// Presets of whole runs and of models, mechanisms of later versions included.
TEST(Presets, AllPlan) {
  settings::LoadOptions options;
  options.search_path = plan_test::PresetPath();
  options.require_implemented = false;
  std::vector<std::pair<std::string, std::string>> runs = {{"tiny", ""}, {"spill-moe", ""}};
  for (const std::string& model : settings::ListPresets("model", options.search_path)) {
    runs.emplace_back("tiny", "model=" + model);
  }
  EXPECT_GE(runs.size(), 34u);
  for (const auto& [run, model] : runs) {
    std::vector<std::string> overrides = {"data.path=/d"};
    if (!model.empty()) overrides.push_back(model);
    const StatusOr<settings::ResolvedConfig> resolved = settings::Load(run, overrides, options);
    ASSERT_TRUE(resolved.ok()) << run << " " << model << " " << resolved.status();
    heddle::v1::PlanReply plan;
    FillPlan(resolved->config, {}, &plan);
    EXPECT_GT(plan.parameters(), 0u) << model;
    EXPECT_TRUE(plan.memory().fits()) << model;
    EXPECT_GT(plan.throughput().flops_per_token(), 0) << model;
  }
}

TEST(Presets, SpillMoeHasThreeTimesTheExpertsThatFit) {
  settings::LoadOptions options;
  options.search_path = plan_test::PresetPath();
  options.require_implemented = false;
  const StatusOr<settings::ResolvedConfig> run =
      settings::Load("spill-moe", {"data.path=/d"}, options);
  ASSERT_TRUE(run.ok()) << run.status();
  const RankMemory memory = EstimateRank(run->config);
  EXPECT_EQ(memory.bytes_per_expert_parameter, 18);
  EXPECT_EQ(memory.ExpertBytes(), 3 * memory.experts_resident);
  EXPECT_EQ(memory.experts_disk, 5 * memory.experts_resident) << "216 MiB, and 144 of a save";
  EXPECT_TRUE(CheckResidentBound(run->config).ok());
}

}  // namespace
}  // namespace heddle::model
