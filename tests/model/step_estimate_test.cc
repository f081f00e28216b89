// The time of a step from figures of a host, and what is said without them.
#include "model/step_estimate.h"

#include <gtest/gtest.h>

#include "base/units/units.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/jobs.pb.h"
#include "model/cost_formulas.h"
#include "model/training_plan.h"
#include "tests/model/plan_configs.h"

namespace heddle::model {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

// A round host of two threads.
HostFigures Host() {
  return {.threads = 2,
          .bf16_flops = 1e12,
          .fp32_flops = 0.25e12,
          .dram_bytes = 30e9,
          .dram_thread_bytes = 20e9,
          .update_bytes = 28e9,
          .exchange_bytes = 4e9,
          .disk_read_bytes = 1.2e9,
          .disk_write_bytes = 0.18e9};
}

RunConfig Tiny(int ranks = 1) {
  RunConfig config;
  *config.mutable_model() = plan_test::TinyDense();
  config.mutable_training()->set_max_seq_len(512);
  config.mutable_training()->set_micro_batch_size(1);
  config.mutable_training()->set_max_steps(100);
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  config.mutable_parallel()->set_cpus_per_rank(2 / ranks);
  return config;
}

constexpr int64_t kExpertParameters = 4 * 8 * 3 * 256 * 512;
RunConfig Moe(int64_t resident_mb = 0) {
  RunConfig config = Tiny();
  config.mutable_model()->mutable_moe()->set_n_experts(8);
  config.mutable_model()->mutable_moe()->set_top_k(2);
  config.mutable_model()->mutable_moe()->set_d_expert(512);
  if (resident_mb == 0) return config;
  auto* offload = config.mutable_memory()->mutable_expert_offloading();
  offload->set_enabled(true);
  offload->set_resident_mb(resident_mb);
  offload->set_spill_dir("/spill");
  return config;
}

double Elements(const RunConfig& config) {
  return static_cast<double>(PlanModel(config.model())->flat_elements);
}

TEST(StepEstimate, SaysWhatIsMissingAndInventsNothing) {
  const StepEstimate none = EstimateStep(Tiny(), {});
  EXPECT_EQ(none.step_seconds, 0);
  EXPECT_EQ(none.compute_seconds, 0);
  EXPECT_EQ(none.bound, "");
  EXPECT_GT(none.flops_per_token, 0);
  EXPECT_NE(none.missing.find("no figures of this host: run heddle bench-host"), std::string::npos);
  // Four ranks of one thread are on two hosts of two.
  RunConfig spread = Tiny(2);
  spread.mutable_parallel()->mutable_ranks()->set_max(4);
  EXPECT_NE(EstimateStep(spread, Host()).missing.find("--link-gbs"), std::string::npos);
  HostFigures linked = Host();
  linked.link_bytes = 1e9;
  EXPECT_EQ(EstimateStep(spread, linked).missing, "");
  EXPECT_EQ(EstimateStep(Tiny(2), Host()).missing, "") << "shared memory was measured";
  HostFigures no_disk = Host();
  no_disk.disk_write_bytes = 0;
  EXPECT_EQ(EstimateStep(Moe(), no_disk).missing, "");
  EXPECT_NE(EstimateStep(Moe(64), no_disk).missing.find("bench-host --dir"), std::string::npos);
}

TEST(StepEstimate, FollowsTheRatesOfTheHost) {
  const StepEstimate step = EstimateStep(Tiny(), Host());
  HostFigures twice = Host();
  twice.bf16_flops *= 2;
  twice.dram_bytes *= 2;
  twice.dram_thread_bytes *= 2;
  EXPECT_DOUBLE_EQ(EstimateStep(Tiny(), twice).compute_seconds, step.compute_seconds / 2);
  EXPECT_DOUBLE_EQ(EstimateStep(Tiny(), twice).optimizer_seconds, step.optimizer_seconds);
  // More than the products alone, less than thrice: the presets' shares of the peak (product.md
  // section 6) lie between.
  const double products = 512 * step.flops_per_token / 1e12;
  EXPECT_GT(step.compute_seconds, 1.2 * products);
  EXPECT_LT(step.compute_seconds, 3 * products);
  // fp32 has its own rate.
  RunConfig fp32 = Tiny();
  fp32.mutable_training()->set_precision(TrainingConfig::PRECISION_FP32);
  EXPECT_GT(EstimateStep(fp32, Host()).compute_seconds, 2 * step.compute_seconds);
  // Half of the threads, half of the products.
  RunConfig half = Tiny();
  half.mutable_parallel()->set_cpus_per_rank(1);
  EXPECT_GT(EstimateStep(half, Host()).compute_seconds, 1.4 * step.compute_seconds);
}

TEST(StepEstimate, RecomputationAndAccumulationTakeTheirTime) {
  RunConfig config = Tiny();
  const StepEstimate once = EstimateStep(config, Host());
  config.mutable_training()->set_gradient_accumulation_steps(3);
  const StepEstimate thrice = EstimateStep(config, Host());
  EXPECT_DOUBLE_EQ(thrice.compute_seconds, 3 * once.compute_seconds);
  EXPECT_DOUBLE_EQ(thrice.optimizer_seconds, once.optimizer_seconds) << "once a step";
  config = Tiny();
  config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  EXPECT_NEAR(EstimateStep(config, Host()).compute_seconds / once.compute_seconds, 4.0 / 3, 0.1);
}

// As many FLOPs as in one layer of two experts' width, in narrower products.
TEST(StepEstimate, ExpertsTakeLongerThanALayerOfTheSameWork) {
  RunConfig wide = Tiny();
  wide.mutable_model()->set_d_ffn(2 * 512);
  const StepEstimate dense = EstimateStep(wide, Host());
  const StepEstimate mixture = EstimateStep(Moe(), Host());
  EXPECT_NEAR(mixture.flops_per_token / dense.flops_per_token, 1, 0.01);
  EXPECT_GT(mixture.compute_seconds, 1.2 * dense.compute_seconds);
}

TEST(StepEstimate, TheUsersFigureStandsForAllOfTheComputation) {
  HostFigures host = Host();
  host.matmul_flops = 0.5e12;
  const StepEstimate step = EstimateStep(Tiny(), host);
  EXPECT_DOUBLE_EQ(step.compute_seconds, 512 * step.flops_per_token / 0.5e12);
  EXPECT_GT(step.optimizer_seconds, 0) << "measured";
}

// Formula (4): 30 bytes with fp32 gradients and bf16 weights, 8 for the norm and the clearing.
TEST(StepEstimate, TheOptimizerMovesItsBytes) {
  EXPECT_DOUBLE_EQ(EstimateStep(Tiny(), Host()).optimizer_seconds, Elements(Tiny()) * 38 / 28e9);
  RunConfig narrow = Tiny();
  narrow.mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  EXPECT_DOUBLE_EQ(EstimateStep(narrow, Host()).optimizer_seconds, Elements(narrow) * 30 / 28e9);
  // Sharded, a rank updates its half with its half of the memory's bandwidth.
  RunConfig sharded = Tiny(2);
  sharded.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  EXPECT_NEAR(EstimateStep(sharded, Host()).optimizer_seconds, Elements(sharded) * 38 / 28e9, 1e-6);
}

// With the numbers done by hand. Of P parameters: weights 2, gradients 4, states 12 bytes each.
TEST(StepEstimate, WhatDoesNotFitIsReadAndWritten) {
  constexpr double kP = kExpertParameters;
  // 150 MiB: what is beyond them leaves as states.
  const StepEstimate states = EstimateStep(Moe(150), Host());
  const double out = 18 * kP - 150.0 * kMiB;
  ASSERT_LT(out, 12 * kP);
  EXPECT_DOUBLE_EQ(states.disk_read_bytes, out);
  EXPECT_DOUBLE_EQ(states.disk_written_bytes, out);
  EXPECT_DOUBLE_EQ(states.disk_seconds, out * (1 / 0.18e9 + 1 / 1.2e9))
      << "one disk reads and writes";
  // 64 MiB: beside the weights the gradients do not fit either. They are read for the update.
  const StepEstimate gradients = EstimateStep(Moe(64), Host());
  const double over = 6 * kP - 64.0 * kMiB;
  ASSERT_GT(over, 0);
  EXPECT_DOUBLE_EQ(gradients.disk_read_bytes, 12 * kP + over);
  EXPECT_DOUBLE_EQ(gradients.disk_written_bytes, 12 * kP + over);
  // 4 MiB hold a sixth of the weights: the others are read in every pass, and the gradients that
  // three micro-batches add to leave twice more.
  RunConfig small = Moe(4);
  small.mutable_training()->set_gradient_accumulation_steps(3);
  const double weights = 2 * kP - 4.0 * kMiB;
  const StepEstimate both = EstimateStep(small, Host());
  EXPECT_DOUBLE_EQ(both.disk_read_bytes, (12 + 4 + 2 * 4) * kP + 6 * weights);
  EXPECT_DOUBLE_EQ(both.disk_written_bytes, (12 + 4 + 2 * 4) * kP + weights);
  // Layers first: one visit for all micro-batches.
  small.mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  const StepEstimate merged = EstimateStep(small, Host());
  EXPECT_DOUBLE_EQ(merged.disk_read_bytes, (12 + 4) * kP + 2 * weights);
  EXPECT_DOUBLE_EQ(merged.disk_written_bytes, (12 + 4) * kP + weights);
  EXPECT_DOUBLE_EQ(merged.tokens_per_expert, 3 * 512 * 2 / 8);
  EXPECT_DOUBLE_EQ(both.tokens_per_expert, 512 * 2 / 8);
  EXPECT_EQ(EstimateStep(Moe(), Host()).disk_seconds, 0);
  EXPECT_EQ(EstimateStep(Moe(1 << 20), Host()).disk_seconds, 0) << "all fit";
}

TEST(StepEstimate, LeavingExpertsOutOfTheUpdateIsToldToBeAnotherOptimizer) {
  RunConfig config = Moe(4);
  EXPECT_EQ(UntouchedWarning(config), "");
  config.mutable_memory()->mutable_expert_offloading()->set_untouched(
      heddle::v1::ExpertOffloadingConfig::UNTOUCHED_SKIP);
  heddle::v1::PlanReply plan;
  FillPlan(config, {}, &plan);
  EXPECT_NE(plan.DebugString().find("untouched=skip is another optimizer"), std::string::npos);
}

TEST(StepEstimate, VisitsForEachMicroBatchAreToldWhereTheyCost) {
  RunConfig config = Moe(4);
  EXPECT_EQ(VisitsWarning(config), "") << "one micro-batch";
  config.mutable_training()->set_gradient_accumulation_steps(3);
  const std::string warning = VisitsWarning(config);
  EXPECT_NE(warning.find("training.accumulation=layer_major"), std::string::npos) << warning;
  heddle::v1::PlanReply plan;
  FillPlan(config, {}, &plan);
  EXPECT_NE(plan.DebugString().find("layer_major"), std::string::npos);
  RunConfig resident = config;
  resident.mutable_memory()->mutable_expert_offloading()->set_resident_mb(1 << 20);
  EXPECT_EQ(VisitsWarning(resident), "") << "all fit";
  config.mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  EXPECT_EQ(VisitsWarning(config), "") << "done already";
}

// Megabytes that runs of the preset spill-moe read and wrote in a step; with four micro-batches for
// one, apart and layer by layer.
TEST(StepEstimate, DiskTrafficIsWhatWasMeasured) {
  settings::LoadOptions options;
  options.search_path = plan_test::PresetPath();
  options.require_implemented = false;
  const struct {
    int bound;
    int batches;
    const char* accumulation;
    double read;
    double written;
  } kMeasured[] = {{8, 1, "auto", 248, 226},        {16, 1, "auto", 228, 220},
                   {37, 1, "auto", 181, 197},       {72, 1, "auto", 141, 152},
                   {144, 1, "auto", 68, 76},        {190, 1, "auto", 24.4, 27.5},
                   {16, 4, "auto", 455, 359},       {16, 4, "layer_major", 228, 220},
                   {72, 4, "layer_major", 141, 152}};
  for (const auto& one : kMeasured) {
    const StatusOr<settings::ResolvedConfig> run =
        settings::Load("spill-moe",
                       {"data.path=/d", Str("memory.expert_offloading.resident_mb=", one.bound),
                        Str("training.micro_batch_size=", 8 / one.batches),
                        Str("training.gradient_accumulation_steps=", one.batches),
                        Str("training.accumulation=", one.accumulation)},
                       options);
    ASSERT_TRUE(run.ok()) << run.status();
    const StepEstimate step = EstimateStep(run->config, {});
    const std::string what = Str(one.bound, " MiB, ", one.batches, " ", one.accumulation);
    EXPECT_NEAR(step.disk_read_bytes / 1e6, one.read, 0.12 * one.read) << what;
    EXPECT_NEAR(step.disk_written_bytes / 1e6, one.written, 0.12 * one.written) << what;
  }
}

TEST(StepEstimate, NamesWhatBinds) {
  EXPECT_EQ(EstimateStep(Tiny(), Host()).bound, "compute");
  EXPECT_EQ(EstimateStep(Moe(64), Host()).bound, "disk");
  HostFigures slow_link = Host();
  slow_link.link_bytes = 1e6;
  EXPECT_EQ(EstimateStep(Tiny(2), slow_link).bound, "communication");
  HostFigures slow_memory = Host();
  slow_memory.update_bytes = 1e6;
  EXPECT_EQ(EstimateStep(Tiny(), slow_memory).bound, "host memory");
}

TEST(StepEstimate, HidesCollectivesOnlyUnderSharding) {
  RunConfig config = Tiny(2);
  config.mutable_training()->set_micro_batch_size(64);
  const StepEstimate whole = EstimateStep(config, Host());
  EXPECT_NEAR(whole.step_seconds,
              whole.compute_seconds + whole.communication_seconds + whole.optimizer_seconds, 1e-9);
  EXPECT_NEAR(whole.exposed_seconds, whole.communication_seconds, 1e-9);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  const StepEstimate sharded = EstimateStep(config, Host());
  EXPECT_LT(sharded.communication_seconds, sharded.compute_seconds);
  EXPECT_NEAR(sharded.exposed_seconds, 0, 1e-9);
  EXPECT_GT(sharded.tokens_that_hide_collectives, 0);
  EXPECT_GT(sharded.micro_batch_tokens, sharded.tokens_that_hide_collectives)
      << "and so says formula (1)";
}

TEST(StepEstimate, DividedExpertsSendRowsInsteadOfGradients) {
  RunConfig config = Moe();
  config.mutable_parallel()->mutable_ranks()->set_max(2);
  const double before = EstimateStep(config, {}).communication_bytes;
  config.mutable_parallel()->set_expert(2);
  const double after = EstimateStep(config, {}).communication_bytes;
  // There and back, forward and backward, in 4 layers, half of the rows of 256 bf16 for two
  // experts a token; no rank has the experts of the other.
  // The weight of a row and its gradient go besides, fp32.
  const double row = 256 * 2;
  const double rows = 4.0 * 512 * 2 / 2 * (4 * row + 2 * 4);
  EXPECT_NEAR(before - after, 2 * 4 * kExpertParameters / 2.0 - rows, 1024);
  // A layer waits for its rows: nothing hides them, sharded or not.
  config.mutable_parallel()->set_cpus_per_rank(1);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  config.mutable_training()->set_micro_batch_size(64);
  const StepEstimate step = EstimateStep(config, Host());
  EXPECT_NEAR(step.exposed_seconds, 64 * rows / 4e9, 1e-9);
  // What is computed again is sent again.
  config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE);
  EXPECT_NEAR(EstimateStep(config, Host()).exposed_seconds - step.exposed_seconds,
              64 * 4.0 * 512 * 2 / 2 * row / 4e9, 1e-9);
}

TEST(StepEstimate, DisksWearOutWithAWarning) {
  const RunConfig config = Moe(64);
  const StepEstimate step = EstimateStep(config, Host());
  const StorageEstimate storage = EstimateStorage(config, step);
  ASSERT_GT(storage.save_steps, 0);
  EXPECT_EQ(step.snapshot_bytes, 12.0 * kExpertParameters);
  const double written =
      step.disk_written_bytes + step.snapshot_bytes / static_cast<double>(storage.save_steps);
  EXPECT_NEAR(storage.spill_tb_per_day, written / 1e12 * 86'400 / step.step_seconds, 1e-9);
  EXPECT_EQ(storage.spill_bytes, (18 + 12) * kExpertParameters);
  // Training waits while the states go through the disk, not at the memory's speed.
  EXPECT_DOUBLE_EQ(step.snapshot_seconds, 12.0 * kExpertParameters * (1 / 0.18e9 + 1 / 1.2e9));
  const double dense = static_cast<double>(storage.checkpoint_bytes) - step.snapshot_bytes;
  EXPECT_NEAR(storage.save_seconds,
              SaveIntervalSeconds(dense / 5e9 + step.snapshot_seconds, kMeanTimeToFailureSeconds),
              1e-6);
  EXPECT_NEAR(EstimateStorage(config, EstimateStep(config, {})).save_seconds,
              SaveIntervalSeconds(static_cast<double>(storage.checkpoint_bytes) / 5e9,
                                  kMeanTimeToFailureSeconds),
              1e-6)
      << "without figures of the disk";
  EXPECT_NE(EnduranceWarning(storage).find("TB a day"), std::string::npos);
  EXPECT_EQ(EnduranceWarning(EstimateStorage(Tiny(), EstimateStep(Tiny(), {}))), "");
  heddle::v1::PlanReply plan;
  FillPlan(config, Host(), &plan);
  ASSERT_EQ(plan.warnings_size(), 1);
  EXPECT_NE(plan.warnings(0).find("spilled experts write"), std::string::npos);
  EXPECT_EQ(plan.throughput().bound(), "disk");
}

TEST(StepEstimate, SaysThatSelectingLayersAreSlower) {
  RunConfig config = Tiny();
  const auto warnings = [&](const HostFigures& host) {
    heddle::v1::PlanReply plan;
    FillPlan(config, host, &plan);
    return plan.warnings_size();
  };
  EXPECT_EQ(warnings(Host()), 0);
  *config.mutable_model() = plan_test::OfKind(heddle::v1::ATTENTION_KIND_NSA);
  EXPECT_EQ(warnings(Host()), 1);
  HostFigures said = Host();
  said.matmul_flops = 1e12;
  EXPECT_EQ(warnings(said), 0) << "the user knows better";
}

TEST(StepEstimate, FailuresSetTheCheckpointInterval) {
  const StepEstimate step = EstimateStep(Tiny(), Host());
  const double usual = EstimateStorage(Tiny(), step).save_seconds;
  EXPECT_NEAR(EstimateStorage(Tiny(), step, 4 * kMeanTimeToFailureSeconds).save_seconds, 2 * usual,
              1e-9);
}

}  // namespace
}  // namespace heddle::model
