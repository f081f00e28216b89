// Small models of every kind that decodes, and what the tests of decoding ask of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <string>
#include <vector>

#include "model/inference/decoder.h"
#include "tests/model/tiny_model.h"

namespace heddle::inference_test {

struct NamedConfig {
  std::string name;
  heddle::v1::ModelConfig config;
};

// Odd sizes, windows, blocks and key counts far smaller than the sequences of the tests.
std::vector<NamedConfig> EveryKind();
// Its name as part of a test's name, for INSTANTIATE_TEST_SUITE_P.
inline std::string TestName(const testing::TestParamInfo<NamedConfig>& info) {
  std::string name = info.param.name;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  return name;
}
// The one of that name.
heddle::v1::ModelConfig ConfigOf(const std::string& name);

// A model whose weights are large enough for attention to be far from uniform, and whose buffers
// (GSA's vref) have seen a step.
model_test::Built BuildStrong(const heddle::v1::ModelConfig& config, model::Precision precision);

// Largest difference of two tensors of one shape.
inline double Worst(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  const at::Tensor x = a.to(at::kDouble).contiguous();
  const at::Tensor y = b.to(at::kDouble).contiguous();
  double worst = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const double difference = std::abs(x.data_ptr<double>()[i] - y.data_ptr<double>()[i]);
    // A NaN on either side is the worst of all.
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
  }
  return worst;
}

// Feeds one sequence; returns its logits [V].
inline at::Tensor FeedOne(inference::Decoder* decoder, inference::SequenceId sequence,
                          std::span<const int64_t> ids) {
  const std::vector<inference::Turn> turns = {{sequence, ids}};
  return (*decoder->Feed(turns))[0];
}

inline std::unique_ptr<inference::Decoder> MakeDecoder(const heddle::v1::ModelConfig& config,
                                                       const model_test::Built& built,
                                                       inference::CacheQuantization cache = {}) {
  return *inference::Decoder::Create(config, built.store.get(), {cache});
}

}  // namespace heddle::inference_test
