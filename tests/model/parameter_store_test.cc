#include "model/parameter_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using model_test::Kind;
using model_test::TinyConfig;

std::unique_ptr<ParameterStore> Filled(const ModelConfig& config, uint64_t seed,
                                       Precision precision = Precision::kFp32) {
  std::unique_ptr<ParameterStore> store = *ParameterStore::Create(*PlanModel(config), precision);
  InitParameters(seed, store.get());
  return store;
}

ModelConfig Nsa(heddle::v1::NsaConfig::CompressType type) {
  ModelConfig config = TinyConfig(Kind::kDense, true);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_NSA);
  config.mutable_attention()->mutable_nsa()->set_kernel_size(4);
  config.mutable_attention()->mutable_nsa()->set_kernel_stride(2);
  config.mutable_attention()->mutable_nsa()->set_block_size(8);
  config.mutable_attention()->mutable_nsa()->set_compress_type(type);
  return config;
}

ModelConfig GsaWithExperts() {
  ModelConfig config = TinyConfig(Kind::kDense, true);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_GSA);
  config.mutable_moe()->set_n_experts(3);
  return config;
}

// Compression starts as the mean of its window (attention-and-moe.md 5.2).
TEST(InitParameters, StartsLinearCompressionAsTheMean) {
  const auto store = Filled(Nsa(heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR), 3);
  const TensorSpec& weight = *store->plan().Find("model.layers.2.self_attn.compress.v_weight");
  ASSERT_EQ(weight.shape, (std::vector<int64_t>{2, 24, 6}));
  const std::span<float> values = store->master(weight);
  for (int64_t row = 0; row < 48; ++row) {
    for (int64_t column = 0; column < 6; ++column) {
      const float expected = row % 6 == column ? 0.25f : 0.0f;
      EXPECT_EQ(values[static_cast<size_t>(row * 6 + column)], expected) << row << " " << column;
    }
  }
}

TEST(InitParameters, FillsConstantsGainsAndUniformBounds) {
  const auto store = Filled(GsaWithExperts(), 3);
  const ModelPlan& plan = store->plan();
  const auto values = [&](const std::string& name) {
    return store->master(*plan.Find("model.layers.1." + name));
  };
  for (const float bias : values("self_attn.value_gate.bias")) EXPECT_EQ(bias, 0.5f);
  for (const float bias : values("self_attn.indexer.bias")) EXPECT_EQ(bias, 0.0f);
  for (const float gain : values("input_layernorm.weight")) EXPECT_EQ(gain, 1.0f);
  const std::span<float> q = values("self_attn.q_proj.weight");
  const double bound = std::sqrt(0.5) * std::sqrt(6.0 / (24 + 20));
  double square = 0;
  for (const float value : q) {
    EXPECT_LE(std::abs(value), bound);
    square += double{value} * value;
  }
  // Of a uniform distribution: bound^2 / 3, within five standard errors of 480 draws.
  EXPECT_NEAR(square / static_cast<double>(q.size()), bound * bound / 3, bound * bound * 0.07);
  EXPECT_LT(*std::min_element(q.begin(), q.end()), -0.9 * bound);
}

// A value depends on seed, name and index: a model with other tensors around it, or another
// precision, draws the same.
TEST(InitParameters, DependsOnSeedNameAndIndexAlone) {
  const auto one = Filled(Nsa(heddle::v1::NsaConfig::COMPRESS_TYPE_AVGPOOL), 3);
  const auto two = Filled(Nsa(heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR), 3);
  const auto other = Filled(Nsa(heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR), 4);
  const auto wide = Filled(Nsa(heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR), 3, Precision::kFp64);
  const std::string name = "model.layers.2.self_attn.gate_proj.weight";
  const auto values = [&](const std::unique_ptr<ParameterStore>& store) {
    return store->master(*store->plan().Find(name));
  };
  ASSERT_NE(one->plan().Find(name)->offset, two->plan().Find(name)->offset);
  EXPECT_TRUE(std::equal(values(one).begin(), values(one).end(), values(two).begin()));
  EXPECT_FALSE(std::equal(values(two).begin(), values(two).end(), values(other).begin()));
  const TensorSpec& spec = *wide->plan().Find(name);
  const double* doubles = static_cast<const double*>(wide->master_data()) + spec.offset;
  const Rng rng = Rng(3, "model.init").Child(name);
  for (int64_t i = 0; i < spec.elements; ++i) {
    ASSERT_EQ(doubles[i], 0.02 * rng.NormalAt(static_cast<uint64_t>(i)));
    ASSERT_EQ(static_cast<float>(doubles[i]), values(two)[static_cast<size_t>(i)]);
  }
  InitTensor(4, *two->plan().Find(name), two.get());
  EXPECT_TRUE(std::equal(values(two).begin(), values(two).end(), values(other).begin()));
}

TEST(ParameterStore, HoldsBuffersInFp32AndZeroesThem) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16, Precision::kFp64}) {
    const auto store = Filled(GsaWithExperts(), 3, precision);
    const ModelPlan& plan = store->plan();
    ASSERT_EQ(store->buffers().size(), static_cast<size_t>(plan.buffer_elements));
    for (const float value : store->buffers()) EXPECT_EQ(value, 0.0f);
    const TensorSpec* bias = plan.FindBuffer("model.layers.1.mlp.gate.e_score_correction_bias");
    ASSERT_NE(bias, nullptr);
    store->buffer(*bias)[2] = 0.25f;
    EXPECT_EQ(store->buffers()[static_cast<size_t>(bias->offset) + 2], 0.25f);
    InitParameters(3, store.get());
    EXPECT_EQ(store->buffer(*bias)[2], 0.0f);
  }
}

}  // namespace
}  // namespace heddle::model
