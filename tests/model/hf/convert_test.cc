// A model under another attention kind: what is added, and that it gives the original's logits.
#include "model/hf/convert.h"

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "heddle/v1/config.pb.h"
#include "tests/model/tiny_model.h"

namespace heddle::hf {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::ModelConfig;
using heddle::v1::NsaConfig;
using model_test::BatchData;
using model_test::Build;
using model_test::Built;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

constexpr int kLength = 24;

// The kind with settings under which nothing is left out of kLength tokens.
ModelConfig DenseLimit(const ModelConfig& from, AttentionKind kind) {
  ModelConfig config = from;
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->set_kind(kind);
  attention->mutable_swa()->set_window(kLength);
  NsaConfig* nsa = attention->mutable_nsa();
  nsa->set_kernel_size(4);
  nsa->set_kernel_stride(2);
  nsa->set_block_size(8);
  nsa->set_topk(3);
  nsa->set_window_size(kLength);
  attention->mutable_dsa()->set_topk(kLength);
  attention->mutable_dsa()->set_d_indexer(8);
  heddle::v1::GsaConfig* gsa = attention->mutable_gsa();
  gsa->set_d_indexer(8);
  gsa->set_k_min(kLength);
  gsa->set_k_base(kLength);
  gsa->set_k_max(kLength);
  return config;
}

std::span<float> Values(model::ParameterStore* store, const std::string& name) {
  const model::TensorSpec* spec = store->plan().Find("model.layers.1.self_attn." + name);
  EXPECT_NE(spec, nullptr) << name;
  return store->master(*spec);
}

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.numel(), b.numel());
  double largest = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    largest = std::max(largest, std::abs(double{a.data_ptr<float>()[i]} - b.data_ptr<float>()[i]));
  }
  return largest;
}

Converted Convert(const ModelConfig& from, Built* built, const ModelConfig& to) {
  StatusOr<Converted> converted = ConvertModel(from, built->store.get(), to, {});
  EXPECT_TRUE(converted.ok()) << converted.status();
  return *std::move(converted);
}

TEST(ConvertModel, OpensTheGatesOfGsaAndMakesUpForThem) {
  const ModelConfig from = TinyConfig(Kind::kDense, true);
  Built built = Build(from, model::Precision::kFp32);
  const ModelConfig to = DenseLimit(from, heddle::v1::ATTENTION_KIND_GSA);
  Converted converted = Convert(from, &built, to);
  for (const float value : Values(converted.store.get(), "value_gate.weight")) EXPECT_EQ(value, 0);
  for (const float value : Values(converted.store.get(), "output_gate.weight")) EXPECT_EQ(value, 0);
  for (const float value : Values(converted.store.get(), "value_gate.bias")) EXPECT_EQ(value, 0.5f);
  const std::span<float> before = Values(built.store.get(), "o_proj.weight");
  const std::span<float> after = Values(converted.store.get(), "o_proj.weight");
  for (size_t i = 0; i < before.size(); ++i) {
    // G1: both gates at c let c^2 through.
    EXPECT_NEAR(after[i] * 0.3874556190002601, before[i], 1e-8);
  }
  EXPECT_EQ(converted.rescaled.size(), 3u);
  EXPECT_EQ(converted.dropped.size(), 0u);
  // Per layer: indexer 5, gates 4, and the buffer vref.
  EXPECT_EQ(converted.added.size(), 3u * 10u);
  ModelConfig shut = to;
  shut.mutable_attention()->mutable_gsa()->set_gate_activation(
      heddle::v1::GsaConfig::GATE_ACTIVATION_SILU);
  shut.mutable_attention()->mutable_gsa()->set_gate_bias_init(0);
  EXPECT_NE(
      Message(ConvertModel(from, built.store.get(), shut, {}).status()).find("gate_bias_init"),
      std::string::npos);
}

TEST(ConvertModel, StartsNsaWithEqualBranchesAndNoCompressedValues) {
  const ModelConfig from = TinyConfig(Kind::kDense, true);
  Built built = Build(from, model::Precision::kFp32);
  ModelConfig to = DenseLimit(from, heddle::v1::ATTENTION_KIND_NSA);
  NsaConfig* nsa = to.mutable_attention()->mutable_nsa();
  nsa->set_kv(NsaConfig::KV_SEPARATE);
  for (const auto type : {NsaConfig::COMPRESS_TYPE_WEIGHTEDPOOL, NsaConfig::COMPRESS_TYPE_LINEAR}) {
    for (const auto init : {NsaConfig::COMPRESS_INIT_MEAN, NsaConfig::COMPRESS_INIT_XAVIER}) {
      nsa->set_compress_type(type);
      nsa->set_compress_init(init);
      Converted converted = Convert(from, &built, to);
      model::ParameterStore* store = converted.store.get();
      for (const float value : Values(store, "gate_proj.weight")) EXPECT_EQ(value, 0);
      for (const float value : Values(store, "compress.v_weight")) EXPECT_EQ(value, 0);
      for (const float value : Values(store, "compress.k_pe")) EXPECT_EQ(value, 0);
      const std::span<float> k = Values(store, "compress.k_weight");
      const float sum = std::accumulate(k.begin(), k.end(), 0.0f);
      // Hk means of weights that sum to 1 (linear: a diagonal of D of them).
      EXPECT_NEAR(sum, type == NsaConfig::COMPRESS_TYPE_LINEAR ? 2 * 6 : 2, 1e-5);
      EXPECT_EQ(*std::max_element(k.begin(), k.end()), 0.25f);
      const std::span<float> keys = Values(store, "k_proj.weight");
      EXPECT_TRUE(std::equal(keys.begin(), keys.end(), Values(store, "k_proj_win.weight").begin()));
      EXPECT_TRUE(converted.rescaled.empty());
    }
  }
  nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_AVGPOOL);
  Converted averaged = Convert(from, &built, to);
  EXPECT_NEAR(Values(averaged.store.get(), "o_proj.weight")[7],
              Values(built.store.get(), "o_proj.weight")[7] * 2 / 3, 1e-8);
}

// F16, I4: the other layout with permuted rows gives the same logits.
TEST(ConvertModel, PermutesRowsForTheOtherRotaryLayout) {
  const ModelConfig half = TinyConfig(Kind::kHybrid, true);
  Built built = Build(half, model::Precision::kFp32);
  ModelConfig interleaved = half;
  interleaved.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  Converted there = Convert(half, &built, interleaved);
  EXPECT_FALSE(std::equal(there.store->master().begin(), there.store->master().end(),
                          built.store->master().begin()));
  const BatchData batch = RandomBatch({kLength, 5}, half.vocab_size(), 3);
  const at::Tensor expected = *built.model->Logits(batch.view());
  auto model = *model::LanguageModel::Create(interleaved, there.store.get());
  const at::Tensor logits = *model->Logits(batch.view());
  EXPECT_LT(MaxDifference(logits, expected), 1e-5);
  StatusOr<Converted> back = ConvertModel(interleaved, there.store.get(), half, {});
  ASSERT_TRUE(back.ok());
  EXPECT_TRUE(std::equal(back->store->master().begin(), back->store->master().end(),
                         built.store->master().begin()));
}

TEST(ConvertModel, RefusesWhatCannotBeKept) {
  const ModelConfig dense = TinyConfig(Kind::kDense, true);
  Built built = Build(dense, model::Precision::kFp32);
  const auto refused = [&](const ModelConfig& to) {
    return Message(ConvertModel(dense, built.store.get(), to, {}).status());
  };
  EXPECT_NE(refused(DenseLimit(dense, heddle::v1::ATTENTION_KIND_MLA)).find("cannot go from dense"),
            std::string::npos);
  ModelConfig wide = dense;
  wide.set_d_ffn(30);
  EXPECT_NE(refused(wide).find("model.layers.2.mlp.down_proj.weight has another shape"),
            std::string::npos);
  ModelConfig deeper = dense;
  deeper.set_n_layers(4);
  EXPECT_NE(refused(deeper).find("model.layers.3.self_attn.q_proj.weight would be new"),
            std::string::npos);
  ModelConfig shallow = dense;
  shallow.set_n_layers(2);
  EXPECT_NE(refused(shallow).find("model.layers.2.mlp.up_proj.weight would be lost"),
            std::string::npos);
  const ModelConfig gsa = DenseLimit(dense, heddle::v1::ATTENTION_KIND_GSA);
  Converted sparse = Convert(dense, &built, gsa);
  EXPECT_NE(Message(ConvertModel(gsa, sparse.store.get(), dense, {}).status()).find("--dense"),
            std::string::npos);
  const StatusOr<Converted> dropped =
      ConvertModel(gsa, sparse.store.get(), dense, {.drop_sparse = true});
  ASSERT_TRUE(dropped.ok()) << dropped.status();
  EXPECT_EQ(dropped->dropped.size(), 3u * 9u);
}

// X1 across a conversion: dense-limit settings give the original logits.
class ConvertedLogits : public testing::TestWithParam<AttentionKind> {};

TEST_P(ConvertedLogits, AreTheOriginalsInTheDenseLimit) {
  const ModelConfig from = TinyConfig(Kind::kDense, true);
  Built built = Build(from, model::Precision::kFp32);
  std::vector<ModelConfig> targets = {DenseLimit(from, GetParam())};
  if (GetParam() == heddle::v1::ATTENTION_KIND_NSA) {
    targets.push_back(targets[0]);
    NsaConfig* nsa = targets[1].mutable_attention()->mutable_nsa();
    nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_LINEAR);
    nsa->set_kv(NsaConfig::KV_SEPARATE);
    targets.push_back(targets[0]);
    nsa = targets[2].mutable_attention()->mutable_nsa();
    nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_AVGPOOL);
    nsa->set_kernel_size(1);
    nsa->set_kernel_stride(1);
  }
  const BatchData batch = RandomBatch({kLength, 1, 7}, from.vocab_size(), 3);
  const at::Tensor expected = *built.model->Logits(batch.view());
  for (const ModelConfig& to : targets) {
    Converted converted = Convert(from, &built, to);
    auto model = *model::LanguageModel::Create(to, converted.store.get());
    const at::Tensor logits = *model->Logits(batch.view());
    EXPECT_LT(MaxDifference(logits, expected), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, ConvertedLogits,
                         testing::Values(heddle::v1::ATTENTION_KIND_SWA,
                                         heddle::v1::ATTENTION_KIND_NSA,
                                         heddle::v1::ATTENTION_KIND_DSA,
                                         heddle::v1::ATTENTION_KIND_GSA));

}  // namespace
}  // namespace heddle::hf
