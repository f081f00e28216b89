#include "model/model_plan.h"

#include <gtest/gtest.h>

#include <set>

#include "heddle/v1/config.pb.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;

ModelConfig TinyDense() {
  ModelConfig config;
  config.set_vocab_size(8192);
  config.set_d_model(256);
  config.set_n_layers(4);
  config.set_n_heads(4);
  config.set_n_kv_heads(2);
  config.set_head_dim(64);
  config.set_d_ffn(688);
  config.set_tie_embeddings(true);
  return config;
}

ModelConfig SmallDense() {
  ModelConfig config;
  config.set_vocab_size(8192);
  config.set_d_model(512);
  config.set_n_layers(8);
  config.set_n_heads(8);
  config.set_n_kv_heads(2);
  config.set_head_dim(64);
  config.set_d_ffn(1376);
  config.set_tie_embeddings(false);
  return config;
}

ModelConfig Swa(ModelConfig config, int window, int sinks) {
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_SWA);
  config.mutable_attention()->mutable_swa()->set_window(window);
  config.mutable_attention()->mutable_swa()->set_sink_size(sinks);
  return config;
}

int64_t Parameters(const ModelConfig& config) {
  const StatusOr<ModelPlan> plan = PlanModel(config);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? plan->parameters : 0;
}

// attention-and-moe.md section 11.
TEST(ModelPlan, CountsThePresetsExactly) {
  EXPECT_EQ(Parameters(TinyDense()), 4'999'424);
  EXPECT_EQ(Parameters(Swa(TinyDense(), 64, 4)), 4'999'424);
  EXPECT_EQ(Parameters(SmallDense()), 30'548'480);
  EXPECT_EQ(Parameters(Swa(SmallDense(), 256, 4)), 30'548'480);
}

TEST(ModelPlan, NamesTensorsAsTheContractSays) {
  const ModelPlan plan = *PlanModel(SmallDense());
  std::set<std::string> names;
  for (const TensorSpec& tensor : plan.tensors) names.insert(tensor.name);
  EXPECT_EQ(names.size(), plan.tensors.size());
  for (const char* name :
       {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.7.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight",
        "model.layers.3.self_attn.v_proj.weight", "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.mlp.down_proj.weight"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
  EXPECT_EQ(names.size(), 3u + 8u * 9u);
  EXPECT_EQ(plan.Find("model.layers.0.self_attn.k_proj.weight")->shape,
            (std::vector<int64_t>{128, 512}));
  EXPECT_EQ(plan.Find("model.layers.0.mlp.down_proj.weight")->shape,
            (std::vector<int64_t>{512, 1376}));
  EXPECT_EQ(PlanModel(TinyDense())->Find("lm_head.weight"), nullptr);
}

TEST(ModelPlan, LaysTensorsOutWithoutOverlapAndKeepsGroupsJoined) {
  ModelConfig odd = TinyDense();
  odd.set_d_model(36);
  odd.set_head_dim(6);
  odd.set_d_ffn(50);
  odd.set_vocab_size(101);
  for (const ModelConfig& config : {TinyDense(), odd}) {
    const ModelPlan plan = *PlanModel(config);
    int64_t end = 0;
    for (const TensorSpec& tensor : plan.tensors) {
      EXPECT_GE(tensor.offset, end) << tensor.name;
      const bool joined = tensor.name.find("k_proj") != std::string::npos ||
                          tensor.name.find("v_proj") != std::string::npos ||
                          tensor.name.find("up_proj") != std::string::npos;
      if (joined) {
        EXPECT_EQ(tensor.offset, end) << tensor.name;
      } else {
        EXPECT_EQ(tensor.offset % kFlatAlignment, 0) << tensor.name;
      }
      end = tensor.offset + tensor.elements;
    }
    EXPECT_GE(plan.flat_elements, end);
    int64_t unit_end = 0;
    for (const UnitSpec& unit : plan.units) {
      EXPECT_EQ(unit.offset, unit_end) << unit.name;
      unit_end += unit.elements;
    }
    EXPECT_EQ(unit_end, plan.flat_elements);
    EXPECT_EQ(plan.units.size(), 2u + 4u);
  }
}

TEST(ModelPlan, DecaysNoNormAndScalesMatricesIntoTheResidualStream) {
  const ModelPlan plan = *PlanModel(TinyDense());
  EXPECT_FALSE(plan.Find("model.layers.1.input_layernorm.weight")->decays);
  EXPECT_FALSE(plan.Find("model.norm.weight")->decays);
  EXPECT_TRUE(plan.Find("model.embed_tokens.weight")->decays);
  EXPECT_DOUBLE_EQ(plan.Find("model.layers.1.mlp.up_proj.weight")->init_stddev, 0.02);
  EXPECT_NEAR(plan.Find("model.layers.1.self_attn.o_proj.weight")->init_stddev,
              0.02 / std::sqrt(8.0), 1e-15);
}

// Hand count for tiny-dense: 2 x (4 (d (2 Hq + 2 Hk) D + 3 d ff) + d V), C = 2 Hq (Dk + Dv) = 1024.
TEST(ModelPlan, CountsFlopsAsByHand) {
  const TokenFlops dense = FlopsPerToken(TinyDense(), 1024);
  EXPECT_DOUBLE_EQ(dense.forward_weights,
                   2.0 * (4 * (256.0 * 12 * 64 + 3 * 256.0 * 688) + 256.0 * 8192));
  EXPECT_DOUBLE_EQ(dense.forward_core, 4 * 1024.0 * 1025 / 2);
  EXPECT_DOUBLE_EQ(dense.training, 3 * dense.forward_weights + 3.5 * dense.forward_core);
}

TEST(ModelPlan, CountsVisibleKeysOfAWindowWithSinks) {
  const ModelConfig config = Swa(TinyDense(), 6, 2);
  double sum = 0;
  for (int64_t t = 0; t < 40; ++t) {
    // |S_t| = min(t+1, W + min(A, max(0, t+1-W))), attention-and-moe.md section 4.
    const int64_t expected =
        std::min<int64_t>(t + 1, 6 + std::min<int64_t>(2, std::max<int64_t>(0, t + 1 - 6)));
    EXPECT_EQ(VisibleKeys(config, 0, t), expected) << t;
    sum += static_cast<double>(expected);
  }
  EXPECT_DOUBLE_EQ(FlopsPerToken(config, 40).forward_core, 4 * 1024.0 * sum / 40);
}

TEST(ModelPlan, CountsCacheBytes) {
  // Per token and layer: b Hk (Dk + Dv).
  EXPECT_EQ(KvCacheBytes(TinyDense(), 100, 2), 100 * 4 * 2 * 128 * 2);
  // A window's cache does not grow: b Hk (Dk + Dv) (W + A).
  EXPECT_EQ(KvCacheBytes(Swa(TinyDense(), 64, 4), 100, 2), 68 * 4 * 2 * 128 * 2);
  EXPECT_EQ(KvCacheBytes(Swa(TinyDense(), 64, 4), 10'000, 2), 68 * 4 * 2 * 128 * 2);
}

TEST(ModelPlan, NamesEveryProblemAtOnce) {
  ModelConfig config = TinyDense();
  config.set_n_kv_heads(3);
  config.set_head_dim(33);
  config.set_dropout(0.1);
  config.set_norm_eps(0);
  config.mutable_attention()->mutable_nsa()->set_topk(2);
  const Status status = PlanModel(config).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  for (const char* key :
       {"model.n_kv_heads", "model.head_dim", "model.dropout", "model.norm_eps",
        "model.attention.nsa.topk"}) {
    EXPECT_NE(Message(status).find(key), std::string::npos) << key << " in " << status;
  }
}

TEST(ModelPlan, EstimatesNothingForAModelItRefuses) {
  ModelConfig config = TinyDense();
  config.set_n_heads(0);
  EXPECT_EQ(EstimateMemory(config, heddle::v1::TrainingConfig()).Total(), 0);
}

TEST(ModelPlan, EstimatesLessMemoryWithRecomputation) {
  heddle::v1::TrainingConfig training;
  const MemoryEstimate all = EstimateMemory(SmallDense(), training);
  const ModelPlan plan = *PlanModel(SmallDense());
  EXPECT_EQ(all.master, 4 * plan.flat_elements);
  EXPECT_EQ(all.moments, 8 * plan.flat_elements);
  EXPECT_EQ(all.compute_weights, 2 * plan.flat_elements);
  training.set_gradient_checkpointing(heddle::v1::TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  EXPECT_LT(EstimateMemory(SmallDense(), training).activations, all.activations / 3);
  training.set_precision(heddle::v1::TrainingConfig::PRECISION_FP32);
  EXPECT_EQ(EstimateMemory(SmallDense(), training).compute_weights, 0);
}

}  // namespace
}  // namespace heddle::model
