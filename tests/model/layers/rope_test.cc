#include "model/layers/rope.h"

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "heddle/v1/config.pb.h"

namespace heddle::layers {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::RopeScalingConfig;

void ExpectAnchors(const RopeFrequencies& got, const std::map<int, double>& anchors) {
  for (const auto& [i, value] : anchors) {
    EXPECT_NEAR(got.inverse[static_cast<size_t>(i)] / value, 1.0, 1e-9) << "pair " << i;
  }
}

ModelConfig Llama3(double factor) {
  ModelConfig config;
  config.mutable_rope()->set_theta(5e5);
  RopeScalingConfig* scaling = config.mutable_rope()->mutable_scaling();
  scaling->set_type(RopeScalingConfig::TYPE_LLAMA3);
  scaling->set_factor(factor);
  scaling->set_low_freq_factor(1);
  scaling->set_high_freq_factor(4);
  scaling->set_original_max_position_embeddings(8192);
  return config;
}

// Anchors of attention-and-moe.md section 3.
TEST(Rope, Llama3HasThePublishedFrequencies) {
  const RopeFrequencies plain = RopeFrequenciesOf(Llama3(1), 128);
  ExpectAnchors(plain, {{0, 1.0},
                        {1, 8.146172339e-01},
                        {16, 3.760603093e-02},
                        {29, 2.616099253e-03},
                        {63, 2.455140791e-06}});
  const RopeFrequencies scaled = RopeFrequenciesOf(Llama3(8), 128);
  EXPECT_EQ(scaled.softmax_scale_factor, 1.0);
  ExpectAnchors(scaled, {{16, 3.760603093e-02},
                         {28, 3.211445995e-03},
                         {29, 2.166570764e-03},
                         {30, 1.371893568e-03},
                         {32, 5.248461610e-04},
                         {34, 1.785078128e-04},
                         {35, 9.556212354e-05},
                         {63, 3.068925989e-07}});
}

TEST(Rope, YarnHasThePublishedFrequenciesOnlyBeyondTheOriginalLength) {
  ModelConfig config;
  RopeScalingConfig* scaling = config.mutable_rope()->mutable_scaling();
  scaling->set_type(RopeScalingConfig::TYPE_YARN);
  scaling->set_factor(40);
  scaling->set_original_max_position_embeddings(4096);
  config.set_max_position_embeddings(163840);
  const RopeFrequencies yarn = RopeFrequenciesOf(config, 64);
  ExpectAnchors(
      yarn, {{10, 5.623413252e-02}, {16, 5.5e-03}, {20, 7.905694150e-04}, {31, 3.333803580e-06}});
  EXPECT_NEAR(std::sqrt(yarn.softmax_scale_factor), 1.3688879454113936, 1e-15);
  config.set_max_position_embeddings(4096);
  const RopeFrequencies off = RopeFrequenciesOf(config, 64);
  EXPECT_EQ(off.softmax_scale_factor, 1.0);
  ExpectAnchors(off, {{16, 1e-2}});
}

TEST(Rope, LinearAndNtkScaleTheFrequencies) {
  ModelConfig config;
  config.mutable_rope()->mutable_scaling()->set_factor(4);
  config.mutable_rope()->mutable_scaling()->set_type(RopeScalingConfig::TYPE_LINEAR);
  EXPECT_DOUBLE_EQ(RopeFrequenciesOf(config, 8).inverse[0], 0.25);
  config.mutable_rope()->mutable_scaling()->set_type(RopeScalingConfig::TYPE_NTK);
  const RopeFrequencies ntk = RopeFrequenciesOf(config, 8);
  EXPECT_DOUBLE_EQ(ntk.inverse[0], 1.0);
  // theta' = theta factor^(D/(D-2)), so the slowest pair is slowed exactly by the factor.
  EXPECT_NEAR(ntk.inverse[3], std::pow(1e4, -0.75) / 4.0, 1e-15);
}

// R6, and the precision of far positions: an fp32 angle at 131071 is off by 4e-3 rad.
TEST(Rope, TablesAreExactFarOutAndBelongToOneConfig) {
  ModelConfig near;
  ModelConfig far;
  far.mutable_rope()->set_theta(5e5);
  RopeTables first(RopeFrequenciesOf(near, 64), /*fp64=*/false);
  RopeTables second(RopeFrequenciesOf(far, 64), /*fp64=*/false);
  first.Ensure(10);
  first.Ensure(131072);
  second.Ensure(131072);
  for (const int64_t position : {9, 4096, 131071}) {
    for (const int64_t pair : {0, 1, 31}) {
      const double angle = static_cast<double>(position) * std::pow(1e4, -2.0 * pair / 64.0);
      EXPECT_NEAR(first.cosine()[position][pair].item<float>(), std::cos(angle), 1e-7);
      EXPECT_NEAR(first.sine()[position][pair].item<float>(), std::sin(angle), 1e-7);
    }
  }
  EXPECT_NE(first.sine()[100][7].item<float>(), second.sine()[100][7].item<float>());
}

}  // namespace
}  // namespace heddle::layers
