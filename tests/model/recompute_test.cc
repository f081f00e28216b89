// What a backward redoes (training-runtime.md section 9, attention-and-moe.md C10): no bit of a
// step depends on it, for any kind, in both stages of indexers, with experts and their noise; and
// it holds less the more it redoes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <string>
#include <vector>

#include "model/model_plan.h"
#include "tests/model/attention/allocation_meter.h"
#include "tests/model/inference/inference_models.h"
#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using inference_test::NamedConfig;
using model_test::BatchData;
using model_test::Built;

struct Outcome {
  LossSum sum;
  std::vector<float> gradients;
  std::vector<double> statistics;
};

// Two steps of two micro-batches, the second layer-major, as one process would accumulate them.
Outcome TwoSteps(const heddle::v1::ModelConfig& config, Precision precision, Recompute recompute,
                 bool warmup) {
  Built built = model_test::Build(config, precision, {.recompute = recompute});
  const BatchData first = model_test::RandomBatch({23, 0, 9, 31}, config.vocab_size(), 5);
  const BatchData second = model_test::RandomBatch({40}, config.vocab_size(), 6);
  layers::StepInfo step;
  step.loss_scale = step.row_scale = 1.0 / 100;
  step.step = 3;
  step.seed = 11;
  step.indexer_warmup = warmup;
  Outcome outcome;
  built.store->ZeroGradients();
  for (const BatchData* batch : {&first, &second}) {
    const LossSum sum = *built.model->ForwardBackward(batch->view(), step);
    outcome.sum.loss += sum.loss;
    step.first_token += static_cast<int64_t>(batch->ids.size());
  }
  const std::vector<PackedBatch> both = {second.view(), first.view()};
  const LossSum sum = *built.model->ForwardBackward(both, step);
  outcome.sum.loss += sum.loss;
  outcome.sum.layers = sum.layers;
  outcome.sum.counts = sum.counts;
  const auto gradients = built.store->gradients();
  outcome.gradients.assign(gradients.begin(), gradients.end());
  const auto statistics = built.model->statistics();
  outcome.statistics.assign(statistics.begin(), statistics.end());
  return outcome;
}

class RecomputationOf : public testing::TestWithParam<NamedConfig> {};

TEST_P(RecomputationOf, C10ChangesNoBit) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
    for (const bool warmup : {false, true}) {
      const heddle::v1::ModelConfig& config = GetParam().config;
      const Outcome kept = TwoSteps(config, precision, Recompute::kNone, warmup);
      for (const Recompute recompute : {Recompute::kSelective, Recompute::kFull}) {
        SCOPED_TRACE(testing::Message()
                     << "recompute " << static_cast<int>(recompute) << " precision "
                     << static_cast<int>(precision) << " warmup " << warmup);
        const Outcome redone = TwoSteps(config, precision, recompute, warmup);
        EXPECT_EQ(kept.sum.loss, redone.sum.loss);
        EXPECT_EQ(kept.sum.layers.indexer, redone.sum.layers.indexer);
        EXPECT_EQ(kept.sum.layers.balance, redone.sum.layers.balance);
        EXPECT_EQ(kept.sum.layers.router_z, redone.sum.layers.router_z);
        EXPECT_EQ(kept.sum.counts.dropped, redone.sum.counts.dropped);
        EXPECT_EQ(kept.sum.counts.nan_rows, redone.sum.counts.nan_rows);
        EXPECT_EQ(kept.statistics, redone.statistics);
        ASSERT_EQ(kept.gradients, redone.gradients);
      }
    }
  }
}

// Bytes that a step of one document needs beside the model's own, at its peak.
int64_t StepBytes(const heddle::v1::ModelConfig& config, Recompute recompute, int32_t length,
                  size_t micro_batches = 1) {
  Built built = model_test::Build(config, Precision::kFp32, {.recompute = recompute});
  const BatchData batch = model_test::RandomBatch({length}, config.vocab_size(), 3);
  const std::vector<PackedBatch> batches(micro_batches, batch.view());
  const double scale = 1.0 / length;
  const model_test::AllocationMeter meter;
  EXPECT_TRUE(
      built.model->ForwardBackward(batches, {.loss_scale = scale, .row_scale = scale}).ok());
  return meter.peak();
}

int64_t PlannedBytes(const heddle::v1::ModelConfig& config,
                     heddle::v1::TrainingConfig::GradientCheckpointing recompute, int32_t length) {
  heddle::v1::TrainingConfig training;
  training.set_precision(heddle::v1::TrainingConfig::PRECISION_FP32);
  training.set_max_seq_len(length);
  training.set_micro_batch_size(1);
  training.set_gradient_checkpointing(recompute);
  return EstimateMemory(config, training, {}).activations;
}

// The plan's estimate knows what each way keeps: differences between them are measured without
// what they share (logits, scratch).
TEST_P(RecomputationOf, SelectiveKeepsLessThanNoneAndMoreThanFull) {
  using heddle::v1::TrainingConfig;
  constexpr int32_t kLength = 512;
  heddle::v1::ModelConfig config = GetParam().config;
  config.set_n_layers(12);
  config.set_max_position_embeddings(kLength);
  StepBytes(config, Recompute::kNone, kLength);  // what the first use of libraries costs
  const int64_t none = StepBytes(config, Recompute::kNone, kLength);
  const int64_t selective = StepBytes(config, Recompute::kSelective, kLength);
  const int64_t full = StepBytes(config, Recompute::kFull, kLength);
  const int64_t planned_none =
      PlannedBytes(config, TrainingConfig::GRADIENT_CHECKPOINTING_NONE, kLength);
  const int64_t planned_selective =
      PlannedBytes(config, TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE, kLength);
  const int64_t planned_full =
      PlannedBytes(config, TrainingConfig::GRADIENT_CHECKPOINTING_FULL, kLength);
  std::printf("%s: none %lld selective %lld full %lld, planned %lld %lld %lld\n",
              GetParam().name.c_str(), static_cast<long long>(none),
              static_cast<long long>(selective), static_cast<long long>(full),
              static_cast<long long>(planned_none), static_cast<long long>(planned_selective),
              static_cast<long long>(planned_full));
  EXPECT_LT(selective, none);
  EXPECT_GT(selective, full);
  const auto ratio = [](int64_t a, int64_t b) {
    return static_cast<double>(a) / static_cast<double>(b);
  };
  EXPECT_NEAR(ratio(none - selective, planned_none - planned_selective), 1.0, 0.15);
  EXPECT_NEAR(ratio(selective - full, planned_selective - planned_full), 1.0, 0.25);
}

// Layer-major passes keep a block's input and what is not redone for every micro-batch; what one of
// them redoes the next one overwrites. Of one layer, so that it would be the most of all.
TEST_P(RecomputationOf, AllMicroBatchesRedoInOnePlace) {
  constexpr int32_t kLength = 512;
  heddle::v1::ModelConfig config = GetParam().config;
  config.set_n_layers(1);
  config.set_max_position_embeddings(kLength);
  const auto each_other = [&](Recompute recompute) {
    StepBytes(config, recompute, kLength);  // what the first use of libraries costs
    return (StepBytes(config, recompute, kLength, 4) - StepBytes(config, recompute, kLength)) / 3;
  };
  const int64_t none = each_other(Recompute::kNone);
  const int64_t selective = each_other(Recompute::kSelective);
  const int64_t full = each_other(Recompute::kFull);
  std::printf("%s: none %lld selective %lld full %lld\n", GetParam().name.c_str(),
              static_cast<long long>(none), static_cast<long long>(selective),
              static_cast<long long>(full));
  EXPECT_LT(selective, none / 10 * 9);
  EXPECT_LT(full, none / 10 * 6);
}

INSTANTIATE_TEST_SUITE_P(Kinds, RecomputationOf, testing::ValuesIn(inference_test::EveryKind()),
                         inference_test::TestName);

}  // namespace
}  // namespace heddle::model
