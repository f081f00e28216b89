#include "model/recall.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using model_test::BatchData;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

constexpr int64_t kKeys = 4;
const std::vector<int32_t> kLengths = {13, 1, 9};

// DSA in every layer, over grouped queries or the latent of MLA; the last layer shares a selection.
heddle::v1::ModelConfig Selecting(bool latent, int q_lora_rank) {
  heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  heddle::v1::DsaConfig* dsa = attention->mutable_dsa();
  dsa->set_n_indexer_heads(2);
  dsa->set_d_indexer(8);
  dsa->set_topk(kKeys);
  dsa->set_index_share_every(2);
  if (!latent) return config;
  dsa->set_core(heddle::v1::DsaConfig::CORE_MLA);
  heddle::v1::MlaConfig* mla = attention->mutable_mla();
  mla->set_q_lora_rank(q_lora_rank);
  mla->set_kv_lora_rank(7);
  mla->set_qk_nope_head_dim(5);
  mla->set_qk_rope_head_dim(4);
  mla->set_v_head_dim(3);
  return config;
}

std::unique_ptr<ParameterStore> StoreOf(const heddle::v1::ModelConfig& config,
                                        const std::string& zero = "none") {
  auto store = *ParameterStore::Create(*PlanModel(config), Precision::kFp32);
  InitParameters(7, store.get());
  for (const TensorSpec& tensor : store->plan().tensors) {
    const std::span<float> values = store->master(tensor);
    const bool matrix = tensor.init != InitKind::kOnes;
    const float factor = tensor.name.find(zero) != std::string::npos ? 0.0f : 15.0f;
    for (float& value : values) value *= matrix ? factor : 1.0f;
  }
  store->RefreshComputeWeights();
  return store;
}

// Queries of 0 attend to all keys alike: the selected ones hold their share by number.
TEST(Recall, IsTheShareOfTheKeysWhereAttentionIsEven) {
  double share = 0;
  int64_t rows = 0;
  for (const int32_t length : kLengths) {
    for (int64_t t = kKeys; t < length; ++t) {
      share += static_cast<double>(kKeys) / static_cast<double>(t + 1);
      ++rows;
    }
  }
  share /= static_cast<double>(rows);
  for (const int rank : {0, 6}) {
    for (const bool latent : {false, true}) {
      const heddle::v1::ModelConfig config = Selecting(latent, rank);
      const std::string query = latent && rank > 0 ? "self_attn.q_b_proj" : "self_attn.q_proj";
      const auto store = StoreOf(config, query);
      const BatchData batch = RandomBatch(kLengths, config.vocab_size(), 3);
      const auto layers = MeasureRecall(config, store.get(), batch.view(), 1);
      ASSERT_TRUE(layers.ok()) << layers.status();
      ASSERT_EQ(layers->size(), 3u);  // one of them without weights of its own
      for (const LayerRecall& layer : *layers) {
        EXPECT_EQ(layer.rows, rows);
        EXPECT_EQ(layer.keys, kKeys);
        EXPECT_NEAR(layer.recall, share, 1e-5);
        EXPECT_NEAR(layer.random, share, 1e-5);
      }
    }
  }
}

TEST(Recall, MeasuresTheHeadsOfMla) {
  for (const int rank : {0, 6}) {
    const heddle::v1::ModelConfig config = Selecting(/*latent=*/true, rank);
    const auto store = StoreOf(config);
    const BatchData batch = RandomBatch(kLengths, config.vocab_size(), 3);
    const std::vector<float> before(store->master().begin(), store->master().end());
    const auto layers = MeasureRecall(config, store.get(), batch.view(), 1);
    ASSERT_TRUE(layers.ok()) << layers.status();
    const auto again = *MeasureRecall(config, store.get(), batch.view(), 2);
    for (size_t i = 0; i < layers->size(); ++i) {
      const LayerRecall& layer = (*layers)[i];
      EXPECT_EQ(layer.layer, static_cast<int>(i));
      EXPECT_GT(layer.recall, 0.0);
      EXPECT_LT(layer.recall, 1.0);
      EXPECT_NE(layer.recall, layer.random);
      EXPECT_EQ(layer.recall, again[i].recall);  // the seed draws the random sets alone
      EXPECT_NE(layer.random, again[i].random);
    }
    EXPECT_TRUE(std::equal(before.begin(), before.end(), store->master().begin()));
  }
}

TEST(Recall, SaysWhereThereIsNothingToMeasure) {
  heddle::v1::ModelConfig config = Selecting(/*latent=*/true, 0);
  config.mutable_attention()->mutable_dsa()->set_topk(13);
  const BatchData batch = RandomBatch(kLengths, config.vocab_size(), 3);
  const auto all = MeasureRecall(config, StoreOf(config).get(), batch.view(), 1);
  EXPECT_EQ(all.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(all.status()).find("longer documents"), std::string::npos);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_MLA);
  config.mutable_attention()->mutable_dsa()->Clear();
  const auto none = MeasureRecall(config, StoreOf(config).get(), batch.view(), 1);
  EXPECT_EQ(none.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(none.status()).find("no layer"), std::string::npos);
}

}  // namespace
}  // namespace heddle::model
