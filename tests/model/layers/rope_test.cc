#include "model/layers/rope.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "model/layers/layers.h"

namespace heddle::layers {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::RopeConfig;
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
TEST(Rope, R5Llama3HasThePublishedFrequencies) {
  const RopeFrequencies plain = RopeFrequenciesOf(Llama3(1), 128);
  ExpectAnchors(plain, {{0, 1.0},
                        {1, 8.146172339e-01},
                        {16, 3.760603093e-02},
                        {29, 2.616099253e-03},
                        {30, 2.131119537e-03},
                        {32, 1.414213562e-03},
                        {34, 9.384738704e-04},
                        {35, 7.644969883e-04},
                        {63, 2.455140791e-06}});
  const RopeFrequencies scaled = RopeFrequenciesOf(Llama3(8), 128);
  EXPECT_EQ(scaled.softmax_scale_factor, 1.0);
  ExpectAnchors(scaled, {{0, 1.0},
                         {1, 8.146172339e-01},
                         {16, 3.760603093e-02},
                         {28, 3.211445995e-03},
                         {29, 2.166570764e-03},
                         {30, 1.371893568e-03},
                         {32, 5.248461610e-04},
                         {34, 1.785078128e-04},
                         {35, 9.556212354e-05},
                         {63, 3.068925989e-07}});
}

TEST(Rope, R5YarnHasThePublishedFrequenciesOnlyBeyondTheOriginalLength) {
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

// The precision of far positions: an fp32 angle at 131071 is off by 4e-3 rad.
TEST(Rope, R6TablesAreExactFarOutAndBelongToOneConfig) {
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

// ---- Rotations ----------------------------------------------------------------------------------

// Every scaling in both layouts, for 4096 positions of which 1024 are the original ones.
std::vector<ModelConfig> Configs() {
  std::vector<ModelConfig> configs;
  for (const auto type :
       {RopeScalingConfig::TYPE_NONE, RopeScalingConfig::TYPE_LINEAR, RopeScalingConfig::TYPE_NTK,
        RopeScalingConfig::TYPE_LLAMA3, RopeScalingConfig::TYPE_YARN}) {
    for (const auto layout : {RopeConfig::LAYOUT_HALF, RopeConfig::LAYOUT_INTERLEAVED}) {
      ModelConfig config;
      config.set_max_position_embeddings(4096);
      config.mutable_rope()->set_layout(layout);
      RopeScalingConfig* scaling = config.mutable_rope()->mutable_scaling();
      scaling->set_type(type);
      scaling->set_factor(4);
      scaling->set_original_max_position_embeddings(1024);
      configs.push_back(config);
    }
  }
  return configs;
}

std::vector<double> RandomHeads(int64_t count, uint64_t seed) {
  const Rng rng(seed, "test.rope");
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(rng.NormalAt(static_cast<uint64_t>(i)));
  return values;
}

// x [heads, width] of one token, rotated at a position.
std::vector<double> Rotated(const ModelConfig& config, const std::vector<double>& x, int64_t width,
                            int32_t position) {
  RopeTables tables(RopeFrequenciesOf(config, width), /*fp64=*/true);
  tables.Ensure(position + 1);
  const int64_t columns = static_cast<int64_t>(x.size());
  const at::Tensor row = at::empty({1, columns}, at::kDouble);
  std::copy(x.begin(), x.end(), row.data_ptr<double>());
  const std::vector<int32_t> positions = {position};
  ApplyRope(tables, {columns / width, width, /*inverse=*/false, positions}, row);
  const double* data = row.const_data_ptr<double>();
  return {data, data + columns};
}

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

constexpr int64_t kWidths[] = {2, 6, 32, 64};

TEST(Rope, R1KeepsTheNormOfEveryHead) {
  for (const ModelConfig& config : Configs()) {
    for (const int64_t width : kWidths) {
      const std::vector<double> x = RandomHeads(3 * width, 5);
      for (const int32_t position : {0, 1, 77, 4095}) {
        const std::vector<double> y = Rotated(config, x, width, position);
        for (int64_t head = 0; head < 3; ++head) {
          double before = 0, after = 0;
          for (int64_t i = head * width; i < (head + 1) * width; ++i) {
            before += x[static_cast<size_t>(i)] * x[static_cast<size_t>(i)];
            after += y[static_cast<size_t>(i)] * y[static_cast<size_t>(i)];
          }
          EXPECT_NEAR(after, before, 1e-10);
        }
        EXPECT_EQ(position == 0, x == y);
      }
    }
  }
}

// q.k depends on the distance only; and every head of a token turns by the same angle, its
// position, not by the head's index.
TEST(Rope, R2LogitsDependOnTheDistanceOnly) {
  for (const ModelConfig& config : Configs()) {
    for (const int64_t width : kWidths) {
      const std::vector<double> q = RandomHeads(width, 5), k = RandomHeads(width, 6);
      const auto logit = [&](int32_t t, int32_t s) {
        return Dot(Rotated(config, q, width, t), Rotated(config, k, width, s));
      };
      for (const int32_t distance : {0, 1, 13, 200}) {
        const double expected = logit(distance, 0);
        for (const int32_t shift : {1, 50, 3000}) {
          EXPECT_NEAR(logit(shift + distance, shift), expected, 1e-9) << width << ' ' << distance;
        }
      }
      EXPECT_GT(std::abs(logit(13, 0) - logit(12, 0)), 1e-6);
      std::vector<double> twice = q;
      twice.insert(twice.end(), q.begin(), q.end());
      const std::vector<double> heads = Rotated(config, twice, width, 9);
      EXPECT_TRUE(std::equal(heads.begin(), heads.begin() + width, heads.begin() + width));
    }
  }
}

TEST(Rope, R3HalfOfThePermutedIsThePermutedInterleaved) {
  for (ModelConfig config : Configs()) {
    for (const int64_t width : kWidths) {
      // Pair (2i, 2i+1) goes to (i, i + width/2).
      const auto permuted = [&](const std::vector<double>& x) {
        std::vector<double> y(x.size());
        for (int64_t i = 0; i < width / 2; ++i) {
          y[static_cast<size_t>(i)] = x[static_cast<size_t>(2 * i)];
          y[static_cast<size_t>(i + width / 2)] = x[static_cast<size_t>(2 * i + 1)];
        }
        return y;
      };
      const std::vector<double> x = RandomHeads(width, 7);
      config.mutable_rope()->set_layout(RopeConfig::LAYOUT_INTERLEAVED);
      const std::vector<double> interleaved = Rotated(config, x, width, 33);
      config.mutable_rope()->set_layout(RopeConfig::LAYOUT_HALF);
      const std::vector<double> half = Rotated(config, permuted(x), width, 33);
      const std::vector<double> expected = permuted(interleaved);
      for (size_t i = 0; i < half.size(); ++i) EXPECT_NEAR(half[i], expected[i], 1e-14);
      // They are not interchangeable.
      if (width > 2) {
        EXPECT_GT(std::abs(Rotated(config, x, width, 33)[1] - interleaved[1]), 1e-6);
      }
    }
  }
}

TEST(Rope, R4AFactorOfOneIsNoScaling) {
  for (const auto type : {RopeScalingConfig::TYPE_LINEAR, RopeScalingConfig::TYPE_NTK,
                          RopeScalingConfig::TYPE_LLAMA3, RopeScalingConfig::TYPE_YARN}) {
    ModelConfig config = Llama3(1);
    const RopeFrequencies plain = [&] {
      ModelConfig none = config;
      none.mutable_rope()->mutable_scaling()->set_type(RopeScalingConfig::TYPE_NONE);
      return RopeFrequenciesOf(none, 128);
    }();
    config.set_max_position_embeddings(131072);
    config.mutable_rope()->mutable_scaling()->set_type(type);
    const RopeFrequencies got = RopeFrequenciesOf(config, 128);
    EXPECT_EQ(got.softmax_scale_factor, 1.0);
    for (size_t i = 0; i < got.inverse.size(); ++i) {
      EXPECT_NEAR(got.inverse[i] / plain.inverse[i], 1.0, 1e-14) << i;
    }
  }
}

// Two models in one process that differ in everything rotary keep their tables apart, and the
// tables of one model apart by width and layout, also while they grow.
TEST(Rope, R6TwoModelsWithDifferentRopeInOneProcess) {
  ModelConfig first;
  ModelConfig second = Llama3(8);
  second.mutable_rope()->set_layout(RopeConfig::LAYOUT_INTERLEAVED);
  RopeSet a(first, /*fp64=*/true);
  RopeSet b(second, /*fp64=*/false);
  const RopeTables& wide = a.Tables(64);
  const RopeTables& other = b.Tables(64);
  const RopeTables& indexer = b.HalfLayout(64);
  a.Ensure(10);
  b.Ensure(300);
  a.Ensure(200);
  const RopeTables& narrow = a.Tables(32);  // made after the growth
  EXPECT_EQ(&wide, &a.Tables(64));
  EXPECT_EQ(&wide, &a.HalfLayout(64));
  EXPECT_NE(&other, &indexer);
  EXPECT_FALSE(wide.frequencies().interleaved);
  EXPECT_TRUE(other.frequencies().interleaved);
  EXPECT_FALSE(indexer.frequencies().interleaved);
  EXPECT_EQ(wide.sine().scalar_type(), at::kDouble);
  EXPECT_EQ(other.sine().scalar_type(), at::kFloat);
  for (const int64_t position : {3, 150}) {
    const double p = static_cast<double>(position);
    EXPECT_NEAR(wide.sine()[position][5].item<double>(), std::sin(p * std::pow(1e4, -10.0 / 64)),
                1e-12);
    EXPECT_NEAR(narrow.sine()[position][5].item<double>(), std::sin(p * std::pow(1e4, -10.0 / 32)),
                1e-12);
    for (const RopeTables* tables : {&other, &indexer}) {
      EXPECT_NEAR(tables->sine()[position][5].item<float>(),
                  std::sin(p * std::pow(5e5, -10.0 / 64)), 1e-6);
    }
  }
}

}  // namespace
}  // namespace heddle::layers
