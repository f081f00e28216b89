// FLOPs, cache bytes and speed-ups against hand counts and the tables of attention-and-moe.md
// sections 5.5, 10 and 12.
#include "model/model_costs.h"

#include <gtest/gtest.h>

#include <cmath>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"
#include "tests/model/plan_configs.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using plan_test::DsaOnMla;
using plan_test::OfKind;
using plan_test::TinyDense;

constexpr int64_t kLengths[] = {2048, 4096, 8192, 16384, 32768, 65536, 131072};

ModelConfig Gqa(heddle::v1::AttentionKind kind, int heads, int kv_heads, int width) {
  ModelConfig config;
  config.set_n_layers(1);
  config.set_d_model(heads * width);
  config.set_n_heads(heads);
  config.set_n_kv_heads(kv_heads);
  config.set_head_dim(width);
  config.mutable_attention()->set_kind(kind);
  return config;
}

ModelConfig Gsa(int heads, int kv_heads, int k) {
  ModelConfig config = Gqa(heddle::v1::ATTENTION_KIND_GSA, heads, kv_heads, 128);
  config.mutable_attention()->mutable_gsa()->set_k_base(k);
  return config;
}

ModelConfig NsaToy() {
  ModelConfig config = Gqa(heddle::v1::ATTENTION_KIND_NSA, 32, 2, 128);
  config.mutable_attention()->mutable_nsa()->set_topk(8);
  return config;
}

ModelConfig V32() {
  ModelConfig config = *plan_test::Preset("dsa-v32");
  config.set_n_layers(1);
  return config;
}

// Printed with two decimals below 10, one below 100, none above: half a unit of the last digit, and
// a little for sums that were approximated.
void ExpectPrinted(double value, double printed, const std::string& what) {
  const double half = printed < 10 ? 0.006 : printed < 100 ? 0.06 : 0.6;
  EXPECT_NEAR(value, printed, half) << what;
}

// Section 12: core speed-up over dense, mean over causal positions, forward / forward + backward.
TEST(SpeedUpOverDense, IsTheTableOfTheSpecification) {
  ModelConfig dsa = Gqa(heddle::v1::ATTENTION_KIND_DSA, 8, 8, 32);
  dsa.mutable_attention()->mutable_dsa()->set_topk(64);
  const struct {
    const char* name;
    ModelConfig config;
    double forward[7];
    double training[7];
  } rows[] = {
      {"NSA toy",
       NsaToy(),
       {1.03, 1.78, 2.98, 4.62, 6.43, 8.01, 9.15},
       {1.06, 1.85, 3.19, 5.15, 7.50, 9.76, 11.5}},
      {"GSA Hq8 k256",
       Gsa(8, 2, 256),
       {2.78, 4.06, 5.36, 6.41, 7.11, 7.53, 7.76},
       {3.39, 5.89, 9.63, 14.3, 18.9, 22.6, 25.0}},
      {"GSA Hq16 k512",
       Gsa(16, 4, 512),
       {2.00, 3.37, 5.45, 8.06, 10.7, 12.8, 14.2},
       {2.09, 3.78, 6.88, 12.1, 19.8, 29.2, 38.4}},
      {"GSA Hq32 k2048",
       Gsa(32, 8, 2048),
       {0.97, 1.28, 2.13, 3.77, 6.56, 10.8, 16.1},
       {0.97, 1.28, 2.18, 4.01, 7.50, 13.9, 24.5}},
      {"DSA Hq8 D32 k64",
       dsa,
       {1.78, 1.88, 1.94, 1.97, 1.98, 1.99, 2.00},
       {4.33, 5.34, 6.06, 6.49, 6.74, 6.87, 6.93}},
  };
  for (const auto& row : rows) {
    for (int i = 0; i < 7; ++i) {
      const SpeedUp speed = SpeedUpOverDense(row.config, kLengths[i]);
      const std::string what = Str(row.name, " at ", kLengths[i]);
      ExpectPrinted(speed.core_forward, row.forward[i], what);
      ExpectPrinted(speed.core_training, row.training[i], what + ", training");
    }
  }
  const double window[] = {4.21, 8.14, 16.0, 31.8, 63.3, 126, 252};
  const double absorbed[] = {0.28, 0.36, 0.59, 1.00, 1.63, 2.44, 3.27};
  const double half_cost[] = {0.29, 0.38, 0.63, 1.12, 1.95, 3.23, 4.87};
  ModelConfig swa = Gqa(heddle::v1::ATTENTION_KIND_SWA, 8, 2, 128);
  for (int i = 0; i < 7; ++i) {
    const std::string at = Str(" at ", kLengths[i]);
    ExpectPrinted(SpeedUpOverDense(swa, kLengths[i]).core_forward, window[i], "SWA" + at);
    ExpectPrinted(SpeedUpOverDense(V32(), kLengths[i]).core_forward, absorbed[i], "V3.2" + at);
    ExpectPrinted(SpeedUpOverDense(V32(), kLengths[i], {.index_cost = 0.5}).core_forward,
                  half_cost[i], "V3.2, FP8 indexer" + at);
  }
  // NSA loses below about 2k tokens.
  ExpectPrinted(SpeedUpOverDense(NsaToy(), 512).core_forward, 0.48, "NSA toy at 512");
}

// Section 12, decode bytes read per step, dense / variant in bf16.
TEST(SpeedUpOverDense, ReadsAsManyCacheBytesAsTheSpecificationSays) {
  const double toy[] = {5.3, 8.0, 10.7, 12.8};
  const double paper[] = {4.0, 6.4, 9.15, 11.64};
  const double gsa[] = {6.4, 7.1, 7.5, 7.8};
  const double dsa[] = {3.9, 5.4, 6.7, 7.6};
  ModelConfig n16 = NsaToy();
  n16.mutable_attention()->mutable_nsa()->set_topk(16);
  ModelConfig mla = V32();
  mla.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_MLA);
  for (int i = 0; i < 4; ++i) {
    const int64_t length = int64_t{8192} << i;
    EXPECT_NEAR(SpeedUpOverDense(NsaToy(), length).decode_bytes, toy[i], 0.051) << length;
    EXPECT_NEAR(SpeedUpOverDense(n16, length).decode_bytes, paper[i], 0.051) << length;
    EXPECT_NEAR(SpeedUpOverDense(Gsa(8, 2, 256), length).decode_bytes, gsa[i], 0.051) << length;
    const CacheFormat fp8 = {.quantized = true, .quantized_index = true};
    const double read = static_cast<double>(DecodeBytesRead(V32(), length, fp8));
    EXPECT_NEAR(static_cast<double>(DecodeBytesRead(mla, length, {})) / read, dsa[i], 0.051)
        << length;
  }
}

// dsa-medium at its 128 tokens: core 66k of about 5.8M FLOPs per token and layer, indexer 166k.
TEST(SpeedUpOverDense, SaysThatDsaMediumCannotBeFaster) {
  const ModelConfig config = *plan_test::Preset("dsa-medium");
  ModelConfig dense = config;
  dense.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DENSE);
  const TokenFlops own = FlopsPerToken(config, 128);
  const TokenFlops twin = FlopsPerToken(dense, 128);
  EXPECT_DOUBLE_EQ(twin.forward_core / 6, 66'048);
  EXPECT_NEAR((twin.forward_weights + twin.forward_core) / 6, 5.8e6, 5e4);
  EXPECT_NEAR((own.forward_weights - twin.forward_weights) / 6, 165'888, 1e-3);
  EXPECT_LT(SpeedUpOverDense(config, 128).step_forward, 1.0);
  EXPECT_LT(SpeedUpOverDense(config, 128).step_training, 1.0);
  EXPECT_EQ(BreakEvenLength(config, config.max_position_embeddings()), 0);
  const int64_t length = BreakEvenLength(config, 1 << 20);
  ASSERT_GT(length, 128);
  EXPECT_GT(SpeedUpOverDense(config, length).step_training, 1.0);
  EXPECT_LE(SpeedUpOverDense(config, length - 1).step_training, 1.0);
  EXPECT_EQ(BreakEvenLength(dense, 1 << 20), 0);
}

// Amdahl: (P + D) / (P' + V) with P the projections of each.
TEST(SpeedUpOverDense, AppliesToTheWholeStep) {
  const ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_SWA);
  const SpeedUp speed = SpeedUpOverDense(config, 4096);
  const TokenFlops own = FlopsPerToken(config, 4096);
  const TokenFlops dense = FlopsPerToken(TinyDense(), 4096);
  EXPECT_DOUBLE_EQ(speed.step_training, dense.training / own.training);
  EXPECT_DOUBLE_EQ(speed.core_forward, dense.forward_core / own.forward_core);
  EXPECT_DOUBLE_EQ(speed.dense_core_share,
                   (dense.training - 3 * dense.forward_weights) / dense.training);
  EXPECT_DOUBLE_EQ(SpeedUpOverDense(TinyDense(), 4096).step_training, 1.0);
}

// X3: hand counts for L = 100 of one layer each.
TEST(ModelCosts, X3FlopsOfNsaAreCountedAsByHand) {
  const ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_NSA);  // l 16 r 8 B 32 n 4 W 64
  const int64_t length = 100;
  double attention = 0;
  double scores = 0;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t windows = t < 15 ? 0 : (t - 15) / 8 + 1;
    const int64_t keys = windows + std::min<int64_t>(128, t + 1) + std::min<int64_t>(64, t + 1);
    EXPECT_EQ(VisibleKeys(config, 0, t), keys) << t;
    attention += 2.0 * 4 * 128 * static_cast<double>(keys);
    scores += 2.0 * 4 * 64 * static_cast<double>(windows);
  }
  const TokenFlops flops = FlopsPerToken(config, length);
  EXPECT_NEAR(flops.forward_core, 4 * (attention + scores) / length, 1e-6);
  // Projections, gate 3 d Hq, compression 2 Hk D l/r, feed-forward; then the tied head.
  const double weights = 256.0 * 64 * 12 + 3 * 256.0 * 4 + 2.0 * 2 * 64 * 2 + 3 * 256.0 * 688;
  EXPECT_NEAR(flops.forward_weights, 2 * (4 * weights + 256.0 * 8192), 1e-3);
  EXPECT_NEAR(flops.training - 3 * flops.forward_weights, 4 * (3.5 * attention + scores) / length,
              1e-3);
}

TEST(ModelCosts, X3FlopsOfDsaOnMlaWithExpertsAreCountedAsByHand) {
  ModelConfig config = DsaOnMla(48);  // H 4, dn 32 dr 32 dv 64 dc 128, HI 2 dI 32 k 64
  config.mutable_moe()->set_n_experts(4);
  config.mutable_moe()->set_n_shared(1);
  config.mutable_moe()->set_d_expert(172);
  const int64_t length = 100;
  double pairs = 0;
  for (int64_t t = 0; t < length; ++t) pairs += static_cast<double>(std::min<int64_t>(64, t + 1));
  const double attention = 2.0 * 4 * (2 * 128 + 32) * pairs;
  const double index = 2.0 * 2 * 32 * length * (length + 1) / 2;
  const double kl = 6.0 * 2 * 32 * pairs;
  const TokenFlops flops = FlopsPerToken(config, length);
  EXPECT_NEAR(flops.forward_core, 4 * (attention + index) / length, 1e-6);
  EXPECT_NEAR(flops.training - 3 * flops.forward_weights,
              4 * (3.5 * attention + index + kl) / length, 1e-3);
  const double latent = 256.0 * 48 + 48.0 * 4 * 64 + 256.0 * 160 + 128.0 * 4 * 96 + 256.0 * 256;
  const double indexer = 48.0 * 64 + 256.0 * (32 + 2);
  const double experts = 256.0 * 4 + 3 * 256.0 * 172 * (2 + 1);  // K 2 of 4, and the shared one
  EXPECT_NEAR(flops.forward_weights, 2 * (4 * (latent + indexer + experts) + 256.0 * 8192), 1e-3);
}

TEST(ModelCosts, X3FlopsOfGsaAreCountedAsByHand) {
  const ModelConfig config = OfKind(heddle::v1::ATTENTION_KIND_GSA);
  const TokenFlops flops = FlopsPerToken(config, 64);
  const double pairs = 64.0 * 65 / 2;  // k_base 64: everything
  EXPECT_NEAR(flops.forward_core, 4 * (1024.0 + 2 * 64) * pairs / 64, 1e-6);
  const double layer = 256.0 * 64 * 12 + 256.0 * (64 + 32 + 2) + 256.0 * (128 + 256);
  EXPECT_NEAR(flops.forward_weights, 2 * (4 * (layer + 3 * 256.0 * 688) + 256.0 * 8192), 1e-3);
}

TEST(ModelCosts, NamesTheLengthUpToWhichNothingIsLeftOut) {
  EXPECT_EQ(FullyVisible(TinyDense(), 0), INT64_MAX);
  EXPECT_EQ(FullyVisible(OfKind(heddle::v1::ATTENTION_KIND_MLA), 0), INT64_MAX);
  EXPECT_EQ(FullyVisible(OfKind(heddle::v1::ATTENTION_KIND_SWA), 0), 68);
  EXPECT_EQ(FullyVisible(OfKind(heddle::v1::ATTENTION_KIND_DSA), 0), 64);
  EXPECT_EQ(FullyVisible(OfKind(heddle::v1::ATTENTION_KIND_NSA), 0), 64);
  ModelConfig gsa = OfKind(heddle::v1::ATTENTION_KIND_GSA);
  EXPECT_EQ(FullyVisible(gsa, 0), 32);
  gsa.mutable_attention()->mutable_gsa()->set_use_adaptive_k(false);
  EXPECT_EQ(FullyVisible(gsa, 0), 64);
}

// C13 for sections 2, 4, 5.5, 6.4, 7.4 and 8: bytes of one layer of 100 tokens in bf16.
TEST(CacheBytes, FollowsTheFormulaOfEachMechanism) {
  const auto bytes = [](const ModelConfig& config) { return LayerCacheBytes(config, 0, 100, {}); };
  const int64_t row = 2 * 2 * 64 * 2;  // 2 Hk D b
  EXPECT_EQ(bytes(TinyDense()), 100 * row);
  EXPECT_EQ(bytes(OfKind(heddle::v1::ATTENTION_KIND_SWA)), 68 * row);
  ModelConfig nsa = OfKind(heddle::v1::ATTENTION_KIND_NSA);
  const int64_t windows = (100 - 16) / 8 + 1;
  EXPECT_EQ(bytes(nsa), (100 + windows + 16) * row);
  nsa.mutable_attention()->mutable_nsa()->set_kv(heddle::v1::NsaConfig::KV_SEPARATE);
  EXPECT_EQ(bytes(nsa), (100 + windows + 16 + 64) * row);
  EXPECT_EQ(LayerCacheBytes(nsa, 0, 15, {}), (15 + 16 + 64) * row);
  EXPECT_EQ(bytes(OfKind(heddle::v1::ATTENTION_KIND_DSA)), 100 * (row + 32 * 2));
  EXPECT_EQ(bytes(OfKind(heddle::v1::ATTENTION_KIND_GSA)), 100 * (row + 32 * 2));
  EXPECT_EQ(bytes(OfKind(heddle::v1::ATTENTION_KIND_MLA)), 100 * (128 + 32) * 2);
  EXPECT_EQ(bytes(DsaOnMla(0)), 100 * (128 + 32 + 32) * 2);
  EXPECT_EQ(CacheBytes(TinyDense(), 100, {}), 4 * 100 * row);
  EXPECT_EQ(KvCacheBytes(TinyDense(), 100, 4), 4 * 100 * row * 2);
}

// Section 5.5: maxB 4, maxL 8192, Hk 2, D 128, 8 layers, l 32, r 16, W 512, bf16: 303.0 MB.
TEST(CacheBytes, AllocatesTheExampleOfNsa) {
  ModelConfig config = *plan_test::Preset("toy-nsa-llama");
  config.mutable_attention()->mutable_nsa()->set_kv(heddle::v1::NsaConfig::KV_SEPARATE);
  EXPECT_NEAR(4 * static_cast<double>(CacheBytes(config, 8192, {})) / 1e6, 303.0, 0.05);
}

// Section 10: 656 B per MLA row and 132 B per index key in FP8, 2 Hk (D + 4) B per GQA row.
TEST(CacheBytes, CountsQuantizedRowsWithTheirScales) {
  const CacheFormat quantized = {.quantized = true};
  EXPECT_EQ(LayerCacheBytes(V32(), 0, 1, quantized), 656 + 2 * 128);
  EXPECT_EQ(LayerCacheBytes(V32(), 0, 1, {.quantized = true, .quantized_index = true}), 656 + 132);
  ModelConfig mla = V32();
  mla.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_MLA);
  EXPECT_EQ(LayerCacheBytes(mla, 0, 1, {}), 1152);
  EXPECT_EQ(LayerCacheBytes(TinyDense(), 0, 100, quantized), 100 * 2 * 2 * (64 + 4));
  // The window's rows are quantized, the sinks are not.
  EXPECT_EQ(LayerCacheBytes(OfKind(heddle::v1::ATTENTION_KIND_SWA), 0, 100, quantized),
            64 * 2 * 2 * (64 + 4) + 4 * 2 * 2 * 64 * 2);
  // Nor are NSA's compressed rows and its raw tail.
  EXPECT_EQ(LayerCacheBytes(OfKind(heddle::v1::ATTENTION_KIND_NSA), 0, 100, quantized),
            100 * 2 * 2 * (64 + 4) + (11 + 16) * 2 * 2 * 64 * 2);
}

TEST(CacheBytes, QuantizesBeyondTheThreshold) {
  heddle::v1::KvCacheConfig cache;
  cache.set_threshold(512);
  EXPECT_FALSE(CacheFormatAt(cache, 4096, 2).quantized);
  cache.set_quantization(heddle::v1::KvCacheConfig::QUANTIZATION_INT8);
  EXPECT_FALSE(CacheFormatAt(cache, 512, 2).quantized);
  EXPECT_TRUE(CacheFormatAt(cache, 513, 2).quantized);
  EXPECT_EQ(CacheFormatAt(cache, 513, 4).element_bytes, 4);
}

// Section 12: KV store per token per layer.
TEST(CacheBytes, GrowsByTheStoreOfOneToken) {
  const double row = 2 * 2 * 64 * 2;
  EXPECT_DOUBLE_EQ(CacheBytesPerToken(TinyDense(), {}), 4 * row);
  EXPECT_DOUBLE_EQ(CacheBytesPerToken(OfKind(heddle::v1::ATTENTION_KIND_SWA), {}), 0);
  EXPECT_DOUBLE_EQ(CacheBytesPerToken(OfKind(heddle::v1::ATTENTION_KIND_NSA), {}),
                   4 * row * (1 + 1.0 / 8));
  EXPECT_DOUBLE_EQ(CacheBytesPerToken(OfKind(heddle::v1::ATTENTION_KIND_GSA), {}),
                   4 * (row + 32 * 2));
  EXPECT_DOUBLE_EQ(CacheBytesPerToken(*plan_test::Preset("swa-mla-base"), {}), 8 * (256 + 64) * 2);
}

}  // namespace
}  // namespace heddle::model
