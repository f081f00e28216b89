// When steps wait too long for offloaded experts, and what then is said to help.
#include "coordinator/rpc/slow_offload.h"

#include <gtest/gtest.h>

#include "base/settings/settings.h"
#include "base/status/status.h"
#include "base/units/units.h"
#include "model/training_plan.h"

namespace heddle::rpc {
namespace {

// 8 experts of 3 x 256 x 512 in each of 4 layers, 15 MiB of them in memory; 16 micro-batches.
v1::RunConfig Spilled() {
  v1::RunConfig config;
  v1::ModelConfig& model = *config.mutable_model();
  model.set_vocab_size(8192);
  model.set_d_model(256);
  model.set_n_layers(4);
  model.set_n_heads(4);
  model.set_n_kv_heads(2);
  model.set_head_dim(64);
  model.set_d_ffn(688);
  model.mutable_moe()->set_n_experts(8);
  model.mutable_moe()->set_top_k(2);
  model.mutable_moe()->set_d_expert(512);
  config.mutable_training()->set_gradient_accumulation_steps(16);
  v1::ExpertOffloadingConfig& offload = *config.mutable_memory()->mutable_expert_offloading();
  offload.set_enabled(true);
  offload.set_resident_mb(15);
  offload.set_spill_dir("/spill");
  settings::FillDefaults(&config);
  return config;
}

// Each step takes a second, reads 200 MiB in 0.1 s, writes 100 MiB in 0.2 s.
std::vector<v1::MetricPoint> Steps(size_t count, double waited) {
  std::vector<v1::MetricPoint> points;
  for (size_t i = 0; i < count; ++i) {
    v1::MetricPoint point;
    point.set_step(101 + i);
    point.set_step_seconds(1);
    v1::OffloadUse& use = *point.mutable_offload();
    use.set_hits(90);
    use.set_misses(30);
    use.set_bytes_read(200 * kMiB);
    use.set_bytes_written(100 * kMiB);
    use.set_read_seconds(0.1);
    use.set_write_seconds(0.2);
    use.set_exposed_seconds(waited);
    points.push_back(std::move(point));
  }
  return points;
}

TEST(SlowOffload, SaysWhatWasMovedHowFastAndWhatMovesLess) {
  const v1::RunConfig config = Spilled();
  const std::optional<v1::Finding> slow = SlowOffload(config, Steps(20, 0.4));
  ASSERT_TRUE(slow.has_value());
  EXPECT_EQ(slow->kind(), "SLOW_OFFLOAD");
  EXPECT_EQ(slow->step(), 120u);
  EXPECT_EQ(slow->text(),
            "steps wait for offloaded experts: 400 of 1000 ms (40 %), median of the last 20 steps");
  ASSERT_EQ(slow->evidence_size(), 3);
  EXPECT_EQ(slow->evidence(0), "read 200MiB a step at 2.10 GB/s, wrote 100MiB a step at 0.52 GB/s");
  EXPECT_EQ(slow->evidence(1),
            "90 of 120 uses of experts a step found them in memory, the others waited");
  // 12.6M parameters with bf16 weights: 18 bytes each.
  EXPECT_EQ(slow->evidence(2), "in memory at most 15MiB of 216MiB of experts");
  const std::string& advice = slow->advice();
  EXPECT_NE(advice.find("raise memory.expert_offloading.resident_mb from 15 towards 216, which "
                        "holds all experts of a rank"),
            std::string::npos)
      << advice;
  EXPECT_NE(advice.find("training.accumulation=layer_major"), std::string::npos) << advice;
  EXPECT_NE(
      advice.find("training.moments=bf16: 14 bytes of a parameter of an expert instead of 18"),
      std::string::npos)
      << advice;
  EXPECT_NE(advice.find("heddle bench-host --dir /spill"), std::string::npos) << advice;
}

TEST(SlowOffload, AdvisesNothingThatIsSetAlready) {
  v1::RunConfig config = Spilled();
  config.mutable_training()->set_accumulation(v1::TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  config.mutable_training()->set_moments(v1::TrainingConfig::MOMENTS_BF16);
  std::optional<v1::Finding> slow = SlowOffload(config, Steps(20, 0.4));
  ASSERT_TRUE(slow.has_value());
  EXPECT_EQ(slow->advice().find("layer_major"), std::string::npos) << slow->advice();
  EXPECT_EQ(slow->advice().find("moments"), std::string::npos) << slow->advice();
  // One micro-batch is read once in any order.
  config = Spilled();
  config.mutable_training()->set_gradient_accumulation_steps(1);
  slow = SlowOffload(config, Steps(20, 0.4));
  ASSERT_TRUE(slow.has_value());
  EXPECT_EQ(slow->advice().find("layer_major"), std::string::npos) << slow->advice();
  // All are in memory: the bound is no cause.
  config = Spilled();
  config.mutable_memory()->mutable_expert_offloading()->set_resident_mb(0);
  slow = SlowOffload(config, Steps(20, 0.4));
  ASSERT_TRUE(slow.has_value());
  EXPECT_EQ(slow->advice().find("resident_mb"), std::string::npos) << slow->advice();
}

TEST(SlowOffload, ABoundWithoutAFolderIsTheCauseItself) {
  v1::RunConfig config = Spilled();
  config.mutable_memory()->mutable_expert_offloading()->clear_spill_dir();
  const std::optional<v1::Finding> slow = SlowOffload(config, Steps(20, 0.4));
  ASSERT_TRUE(slow.has_value());
  EXPECT_EQ(slow->advice(), model::ArenaWarning(config));
  EXPECT_FALSE(slow->advice().empty());
}

TEST(SlowOffload, JudgesByTheMedianOfStepsEnough) {
  const v1::RunConfig config = Spilled();
  EXPECT_FALSE(SlowOffload(config, Steps(20, 0.25)).has_value()) << "a quarter is borne";
  EXPECT_TRUE(SlowOffload(config, Steps(20, 0.26)).has_value());
  EXPECT_FALSE(SlowOffload(config, Steps(4, 0.9)).has_value()) << "the first steps fill the set";
  EXPECT_TRUE(SlowOffload(config, Steps(5, 0.9)).has_value());
  EXPECT_FALSE(SlowOffload(config, {}).has_value());
  // A save makes some steps slow, which are no rule.
  std::vector<v1::MetricPoint> points = Steps(20, 0.1);
  for (size_t i = 0; i < 9; ++i) points[i].mutable_offload()->set_exposed_seconds(0.9);
  EXPECT_FALSE(SlowOffload(config, points).has_value());
  for (v1::MetricPoint& point : points) point.clear_offload();
  EXPECT_FALSE(SlowOffload(config, points).has_value()) << "nothing is offloaded";
}

}  // namespace
}  // namespace heddle::rpc
