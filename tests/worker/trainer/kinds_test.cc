// Sparse kinds and experts in a whole run: their indexers, buffers and losses survive a kill, do
// not depend on how a step is divided, and a frozen model stands still (attention-and-moe.md 6.3,
// D5, E6, E10).
#include <gtest/gtest.h>
#include <signal.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "checkpoint/tensor_io/load.h"
#include "model/hf/model_dir.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/trainer/job.h"

namespace heddle::trainer {
namespace {

using heddle::v1::RunConfig;

constexpr int64_t kWarmup = 6;

RunConfig GsaConfig(int ranks, int64_t steps) {
  RunConfig config = SmallConfig(ranks, steps);
  config.mutable_model()->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_GSA);
  config.mutable_model()->mutable_attention()->clear_pattern();
  heddle::v1::GsaConfig* gsa = config.mutable_model()->mutable_attention()->mutable_gsa();
  gsa->set_n_indexer_heads(2);
  gsa->set_d_indexer(8);
  gsa->set_k_min(4);
  gsa->set_k_base(8);
  gsa->set_k_max(12);
  gsa->set_warmup_steps(kWarmup);
  return config;
}

RunConfig DsaConfig(int ranks, int64_t steps) {
  RunConfig config = SmallConfig(ranks, steps);
  config.mutable_model()->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  config.mutable_model()->mutable_attention()->clear_pattern();
  heddle::v1::DsaConfig* dsa = config.mutable_model()->mutable_attention()->mutable_dsa();
  dsa->set_n_indexer_heads(2);
  dsa->set_d_indexer(8);
  dsa->set_topk(8);
  dsa->set_warmup_steps(kWarmup);
  return config;
}

RunConfig NsaConfig(int ranks, int64_t steps) {
  RunConfig config = SmallConfig(ranks, steps);
  config.mutable_model()->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_NSA);
  config.mutable_model()->mutable_attention()->clear_pattern();
  heddle::v1::NsaConfig* nsa = config.mutable_model()->mutable_attention()->mutable_nsa();
  nsa->set_kernel_size(4);
  nsa->set_kernel_stride(2);
  nsa->set_block_size(8);
  nsa->set_topk(3);
  nsa->set_window_size(8);
  return config;
}

RunConfig MoeConfig(int ranks, int64_t steps) {
  RunConfig config = SmallConfig(ranks, steps);
  heddle::v1::MoeConfig* moe = config.mutable_model()->mutable_moe();
  moe->set_n_experts(4);
  moe->set_top_k(2);
  moe->set_n_shared(1);
  moe->set_d_expert(16);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_bias_update_rate(0.01);
  moe->set_noise_std(0.1);
  return config;
}

// A kill in either stage: the series goes on bit for bit, the last checkpoints hold the same bits.
void KillInBothStages(const RunConfig& config, int ranks) {
  Job calm(config, ranks);
  RunToEnd(&calm);
  Job killed(config, ranks);
  for (const uint64_t step : {kWarmup + 0, kWarmup + 6}) {
    KillAt(&killed, step, 0);
  }
  RunToEnd(&killed);
  ExpectSameBits(calm.series(), killed.series());
  EXPECT_EQ(NewestWeights(&calm), NewestWeights(&killed));
}

TEST(Kinds, GsaWithItsReferenceVarianceGoesOnBitForBit) {
  const RunConfig config = GsaConfig(2, 18);
  KillInBothStages(config, 2);
}
TEST(Kinds, DsaGoesOnBitForBitFromBothStages) { KillInBothStages(DsaConfig(1, 18), 1); }
TEST(Kinds, NsaGoesOnBitForBit) { KillInBothStages(NsaConfig(1, 18), 1); }
TEST(Kinds, ExpertsWithNoiseAndBalancingBiasGoOnBitForBit) {
  KillInBothStages(MoeConfig(2, 18), 2);
}

// Buffers, their statistics and frozen stages do not depend on what a rank keeps.
void SameBitsWhenSharded(RunConfig config) {
  Job whole(config, 2);
  RunToEnd(&whole);
  for (const auto mode :
       {heddle::v1::ParallelConfig::SHARD_OPTIMIZER, heddle::v1::ParallelConfig::SHARD_FULL}) {
    config.mutable_parallel()->set_shard(mode);
    Job sharded(config, 2);
    RunToEnd(&sharded);
    ExpectSameBits(whole.series(), sharded.series());
    EXPECT_EQ(NewestWeights(&whole), NewestWeights(&sharded)) << "shard " << mode;
  }
}
TEST(Kinds, GsaIsTheSameSharded) {
  RunConfig config = GsaConfig(2, 12);
  config.mutable_model()->mutable_attention()->mutable_gsa()->set_freeze(heddle::v1::FREEZE_TRUE);
  SameBitsWhenSharded(config);
}
TEST(Kinds, ExpertsAreTheSameSharded) { SameBitsWhenSharded(MoeConfig(2, 10)); }

// D4 in a whole run: while indexers learn and attention is dense, the model's own weights are those
// of the dense model up to rounding, whatever the indexer's loss and the norm of its gradient are.
TEST(Kinds, D4TheDenseStageTrainsTheModelLikeADenseOne) {
  for (const double clip : {0.0, 0.05}) {
    RunConfig config = DsaConfig(1, kWarmup);
    config.mutable_training()->set_grad_clip(clip);
    Job sparse(config, 1);
    RunToEnd(&sparse);
    config.mutable_model()->mutable_attention()->clear_dsa();
    config.mutable_model()->mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DENSE);
    Job dense(config, 1);
    RunToEnd(&dense);
    ASSERT_GT(sparse.series().at(kWarmup).grad_norm(), 0.05) << "the clip would do nothing";
    const auto found = NewestWeights(&sparse);
    for (const auto& [name, values] : NewestWeights(&dense)) {
      const std::vector<float>& other = found.at(name);
      double largest = 0;
      for (size_t k = 0; k < values.size(); ++k) {
        largest = std::max(largest, std::abs(double{values[k]} - double{other[k]}));
      }
      EXPECT_LE(largest, 1e-6) << name << " clip " << clip;
    }
  }
}

TEST(Kinds, BuffersMoveAndAreSaved) {
  Job gsa(GsaConfig(1, 10), 1);
  RunToEnd(&gsa);
  int variances = 0;
  for (const auto& [name, values] : NewestWeights(&gsa)) {
    if (name.find("indexer.vref") == std::string::npos) continue;
    ++variances;
    EXPECT_GT(values[0], 0.0f) << name;
  }
  EXPECT_EQ(variances, 2);
  Job moe(MoeConfig(1, 10), 1);
  RunToEnd(&moe);
  int biases = 0;
  for (const auto& [name, values] : NewestWeights(&moe)) {
    if (name.find("e_score_correction_bias") == std::string::npos) continue;
    ++biases;
    float largest = 0;
    for (const float bias : values) largest = std::max(largest, std::abs(bias));
    EXPECT_GT(largest, 0.005f) << name;
    EXPECT_LE(largest, 0.1001f) << name << ": ten steps of 0.01";
  }
  EXPECT_EQ(biases, 2);
}

// E10: loads are counted over all ranks before the bias moves; noise is keyed by the global token.
TEST(Kinds, AnyNumberOfRanksUpdatesTheBiasAlike) {
  Job one(MoeConfig(1, 8), 1);
  RunToEnd(&one);
  Job three(MoeConfig(3, 8), 3);
  RunToEnd(&three);
  const auto a = NewestWeights(&one);
  const auto b = NewestWeights(&three);
  int biases = 0;
  for (const auto& [name, values] : a) {
    if (name.find("e_score_correction_bias") == std::string::npos) continue;
    ++biases;
    EXPECT_EQ(values, b.at(name)) << name;
  }
  EXPECT_EQ(biases, 2);
  for (const auto& [step, point] : one.series()) {
    EXPECT_NEAR(three.series().at(step).loss() / point.loss(), 1.0, 1e-3) << "step " << step;
    EXPECT_NEAR(three.series().at(step).balance_loss(), point.balance_loss(), 1e-4);
    EXPECT_GT(point.balance_loss(), 0.0);
  }
}

TEST(Kinds, TheIndexersLossIsReportedInBothStagesAndFalls) {
  Job job(DsaConfig(2, 30), 2);
  job.config().mutable_model()->mutable_attention()->mutable_dsa()->set_warmup_steps(20);
  RunToEnd(&job);
  ASSERT_EQ(job.series().size(), 30u);
  for (const auto& [step, point] : job.series()) EXPECT_GT(point.indexer_loss(), 0.0) << step;
  // Stage 1 learns towards the dense attention of the same model.
  EXPECT_LT(job.series().at(20).indexer_loss(), job.series().at(1).indexer_loss());
}

// E9 in a run: what the capacity drops is counted over all ranks, and shown only where it can be.
TEST(Kinds, DroppedAssignmentsAreReportedWhereThereIsACapacity) {
  const auto run = [](double capacity_factor, int ranks) {
    RunConfig config = MoeConfig(ranks, 3);
    config.mutable_model()->mutable_moe()->set_capacity_factor(capacity_factor);
    Job job(config, ranks);
    RunToEnd(&job);
    return job.series();
  };
  const auto bounded = run(0.5, 1);
  ASSERT_EQ(bounded.size(), 3u);
  for (const auto& [step, point] : bounded) {
    EXPECT_GT(point.dropped_assignments(), 0u) << step;
    EXPECT_FALSE(point.has_nan_rows());
  }
  EXPECT_EQ(run(0.5, 3).at(1).dropped_assignments(), bounded.at(1).dropped_assignments());
  for (const auto& [step, point] : run(0, 1)) EXPECT_FALSE(point.has_dropped_assignments()) << step;
}

TEST(Kinds, RowsOfASelectionThatMetANanAreReported) {
  for (const RunConfig& config : {DsaConfig(1, 2), GsaConfig(1, 2), NsaConfig(1, 2)}) {
    Job job(config, 1);
    RunToEnd(&job);
    for (const auto& [step, point] : job.series()) {
      EXPECT_TRUE(point.has_nan_rows());
      EXPECT_EQ(point.nan_rows(), 0u) << step;
      EXPECT_FALSE(point.has_dropped_assignments());
    }
  }
}

// D5 in a run: with a frozen model stage 1 changes indexers and nothing else, not by one bit.
TEST(Kinds, D5FrozenWarmupTrainsIndexersAlone) {
  for (const bool dsa : {true, false}) {
    RunConfig config = dsa ? DsaConfig(1, 5) : GsaConfig(1, 5);
    *config.mutable_model()->mutable_moe() = MoeConfig(1, 5).model().moe();
    heddle::v1::AttentionConfig* attention = config.mutable_model()->mutable_attention();
    if (dsa) {
      attention->mutable_dsa()->set_freeze(heddle::v1::FREEZE_TRUE);
    } else {
      attention->mutable_gsa()->set_freeze(heddle::v1::FREEZE_TRUE);
    }
    config.mutable_checkpoint()->set_save_interval(1);
    Job job(config, 1);
    RunToEnd(&job);
    const std::vector<heddle::v1::CheckpointRecord>& records = job.records();
    ASSERT_GE(records.size(), 2u);
    const auto first = *checkpoint::ReadModelWeights(records.front(), job.root());
    const auto last = NewestWeights(&job);
    int moved = 0;
    for (const checkpoint::Weight& weight : first) {
      const bool indexer = weight.name.find("indexer") != std::string::npos;
      if (!indexer) {
        EXPECT_EQ(weight.values, last.at(weight.name)) << weight.name;
      } else {
        moved += weight.values != last.at(weight.name) ? 1 : 0;
      }
    }
    EXPECT_GT(moved, 4);
    // The loss of the language model is still shown, though nothing learns from it.
    EXPECT_GT(job.series().at(1).loss(), 1.0);
  }
}

// The first update moves every weight of an indexer by its rate times the same amount, and nothing
// else feels the rate.
TEST(Kinds, GsaIndexersLearnAtTheirOwnRate) {
  std::map<double, std::map<std::string, std::vector<float>>> by_rate;
  for (const double rate : {0.0, 1.0, 8.0}) {
    RunConfig config = GsaConfig(1, 1);
    config.mutable_model()->mutable_attention()->mutable_gsa()->set_indexer_lr_multiplier(rate);
    config.mutable_training()->set_warmup_steps(0);
    Job job(config, 1);
    RunToEnd(&job);
    by_rate[rate] = NewestWeights(&job);
  }
  int moved = 0;
  for (const auto& [name, start] : by_rate.at(0)) {
    const std::vector<float>& once = by_rate.at(1).at(name);
    const std::vector<float>& often = by_rate.at(8).at(name);
    // vref, a buffer, follows the scores and has no rate.
    if (name.find("indexer") == std::string::npos || name.find("vref") != std::string::npos) {
      EXPECT_EQ(start, once) << name;
      EXPECT_EQ(start, often) << name;
      continue;
    }
    for (size_t i = 0; i < start.size(); ++i) {
      EXPECT_NEAR(often[i] - start[i], 8 * (once[i] - start[i]), 1e-5) << name;
      moved += once[i] != start[i] ? 1 : 0;
    }
  }
  EXPECT_GT(moved, 100);
}

// A model folder of other weights than the run's seed would give.
std::map<std::string, std::vector<float>> WriteFolder(const heddle::v1::ModelConfig& model,
                                                      const std::string& dir) {
  std::map<std::string, std::vector<float>> weights;
  auto store = *model::ParameterStore::Create(*model::PlanModel(model), model::Precision::kFp32);
  model::InitParameters(99, store.get());
  std::vector<hf::NamedWeight> named;
  for (const model::TensorSpec& spec : store->plan().tensors) {
    const std::span<const float> values = store->master(spec);
    weights[spec.name].assign(values.begin(), values.end());
    named.push_back({spec.name, spec.shape, values});
  }
  EXPECT_OK(hf::WriteModelDir(dir, model, named, {}));
  return weights;
}

// freeze: auto keeps a model that was trained elsewhere as it is while its new indexers learn.
TEST(Kinds, StartsFromAModelFolderAndKeepsItDuringTheWarmup) {
  const checkpoint::TempDir folder;
  RunConfig config = GsaConfig(1, kWarmup);
  const auto given = WriteFolder(config.model(), folder.path() + "/model");
  config.mutable_checkpoint()->set_init_from(folder.path() + "/model");
  // How the run trains is its own business.
  config.mutable_model()->mutable_attention()->mutable_gsa()->set_kl_weight(0.5);
  Job job(config, 1);
  RunToEnd(&job);
  ASSERT_FALSE(job.records().empty());
  int kept = 0;
  for (const auto& [name, values] : NewestWeights(&job)) {
    if (name.find("indexer") != std::string::npos) continue;
    EXPECT_EQ(values, given.at(name)) << name;
    ++kept;
  }
  EXPECT_GT(kept, 10);
}

TEST(Kinds, RefusesDataOfAnotherTokenizerThanTheModels) {
  const checkpoint::TempDir folder;
  RunConfig config = GsaConfig(1, 4);
  const std::string model = folder.path() + "/model";
  WriteFolder(config.model(), model);
  config.mutable_checkpoint()->set_init_from(model);
  std::ofstream(model + "/tokenizer.json") << "{}";
  Job job(config, 1);
  FakeAttempt refused(job.Next());
  const std::vector<FakeRankEnd> ends = refused.Wait(30);
  EXPECT_EQ(ends.at(0).code, static_cast<int>(ExitCode::kDoNotRetry));
  ASSERT_TRUE(ends.at(0).words.has_value());
  EXPECT_NE(ends.at(0).words->detail().find("another tokenizer"), std::string::npos)
      << ends.at(0).words->detail();
  std::filesystem::copy_file(DataFolder() + "/tokenizer.json", model + "/tokenizer.json",
                             std::filesystem::copy_options::overwrite_existing);
  RunToEnd(&job);
}

TEST(Kinds, RefusesAFolderOfAnotherModel) {
  const checkpoint::TempDir folder;
  RunConfig config = GsaConfig(1, 4);
  heddle::v1::ModelConfig other = config.model();
  other.mutable_attention()->mutable_gsa()->set_k_base(9);  // same tensors, another model
  WriteFolder(other, folder.path() + "/model");
  config.mutable_checkpoint()->set_init_from(folder.path() + "/model");
  Job job(config, 1);
  FakeAttempt attempt(job.Next());
  const std::vector<FakeRankEnd> ends = attempt.Wait(30);
  EXPECT_EQ(ends.at(0).code, static_cast<int>(ExitCode::kDoNotRetry));
  ASSERT_TRUE(ends.at(0).words.has_value());
  EXPECT_NE(ends.at(0).words->detail().find("k_base"), std::string::npos)
      << ends.at(0).words->detail();
}

}  // namespace
}  // namespace heddle::trainer
