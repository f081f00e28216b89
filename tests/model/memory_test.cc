// K5 (attention-and-moe.md section 16): a training step of a model of any kind holds memory that is
// linear in the length of its one document, and never an L x L buffer.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <string>

#include "tests/model/attention/allocation_meter.h"
#include "tests/model/inference/inference_models.h"
#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using model_test::BatchData;
using model_test::Built;

// Highest bytes that a step of a document of `length` holds beyond the model's own.
int64_t StepBytes(Built* built, int64_t vocabulary, int32_t length) {
  const BatchData batch = model_test::RandomBatch({length}, vocabulary, 3);
  const double scale = 1.0 / length;
  const model_test::AllocationMeter meter;
  const StatusOr<LossSum> loss =
      built->model->ForwardBackward(batch.view(), {.loss_scale = scale, .row_scale = scale});
  EXPECT_TRUE(loss.ok()) << loss.status();
  return meter.peak();
}

class MemoryOf : public testing::TestWithParam<inference_test::NamedConfig> {};

TEST_P(MemoryOf, K5AStepGrowsLinearlyWithTheLength) {
  heddle::v1::ModelConfig config = GetParam().config;
  config.set_n_layers(static_cast<int32_t>(std::max(1, config.attention().pattern_size())));
  // A fresh model per length: its pools keep what the longest step took.
  const auto measure = [&](int32_t length) {
    Built built = model_test::Build(config, Precision::kFp32);
    return StepBytes(&built, config.vocab_size(), length);
  };
  measure(2048);  // what the first use of libraries costs
  const int64_t quarter = measure(512);
  const int64_t half = measure(1024);
  const int64_t whole = measure(2048);
  std::printf("%s: bytes at L 512, 1024, 2048: %lld %lld %lld\n", GetParam().name.c_str(),
              static_cast<long long>(quarter), static_cast<long long>(half),
              static_cast<long long>(whole));
  const double early = static_cast<double>(half - quarter) / 512;
  const double late = static_cast<double>(whole - half) / 1024;
  EXPECT_GT(early, 0);
  // Bytes per further row stay the same; an L x L buffer of floats would double them.
  EXPECT_LT(late, 1.15 * early);
  // L x L floats of one head would be 16 MiB.
  EXPECT_LT(whole, int64_t{16} << 20);
}

INSTANTIATE_TEST_SUITE_P(Kinds, MemoryOf, testing::ValuesIn(inference_test::EveryKind()),
                         inference_test::TestName);

}  // namespace
}  // namespace heddle::model
