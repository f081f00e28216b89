// C8: every gradient of the mixture of experts against central differences in fp64, over routers,
// losses and forms of experts, with choices that no step of the differences can change.
#include <gtest/gtest.h>

#include "tests/model/moe/moe_fixture.h"

namespace heddle::moe {
namespace {

using layers_test::CheckGradients;
using moe_test::Batch;
using moe_test::kWidth;
using moe_test::Margin;
using moe_test::ModelConfig;
using moe_test::MoeCase;
using moe_test::MoeConfig;
using moe_test::SmallConfig;

// `noise` moves the logits by itself: the margin is that of the quiet ones then, and not asked for.
void Check(const ModelConfig& config, bool noise = false) {
  SCOPED_TRACE(config.ShortDebugString());
  MoeCase c(config, at::kDouble);
  c.SetBias({0.1f, 0.0f, -0.1f, 0.05f, 0.0f, -0.05f});
  Batch batch({7, 0, 9}, kWidth, "gradients");
  batch.step.row_scale = 1.0 / 40;
  batch.step.seed = 21;
  if (!noise) {
    ASSERT_GT(Margin(c, batch), 1e-4);
  }
  EXPECT_GT(CheckGradients(&c.fixture, c.layer.get(), batch), 100);
  // The router learns from the output or from its losses.
  double sum = 0;
  for (const double g : c.fixture.Gradient("mlp.gate.weight")) sum += std::abs(g);
  EXPECT_GT(sum, 1e-3);
}

// Losses large enough that a wrong factor in them shows.
ModelConfig WithLosses(MoeConfig::Router router, MoeConfig::AuxForm form, bool norm_topk) {
  ModelConfig config = SmallConfig(6, 2);
  MoeConfig* moe = config.mutable_moe();
  moe->set_router(router);
  moe->set_aux_form(form);
  moe->set_norm_topk(norm_topk);
  moe->set_aux_loss(3.0);
  moe->set_z_loss(0.7);
  return config;
}

TEST(MoeGradients, C8EveryRouterWithEveryLoss) {
  for (const MoeConfig::AuxForm form :
       {MoeConfig::AUX_FORM_SWITCH, MoeConfig::AUX_FORM_SEQUENCE, MoeConfig::AUX_FORM_IMPORTANCE}) {
    Check(WithLosses(MoeConfig::ROUTER_SOFTMAX, form, true));
    Check(WithLosses(MoeConfig::ROUTER_SOFTMAX, form, false));
    Check(WithLosses(MoeConfig::ROUTER_SIGMOID, form, true));
  }
}

TEST(MoeGradients, C8EveryFormOfExpertWithSharedOnes) {
  for (const ModelConfig::Ffn form :
       {ModelConfig::FFN_SWIGLU, ModelConfig::FFN_GELU, ModelConfig::FFN_SILU}) {
    for (const int shared : {0, 2}) {
      ModelConfig config = SmallConfig(6, 3);
      config.set_ffn(form);
      config.mutable_moe()->set_n_shared(shared);
      config.mutable_moe()->set_route_scale(2.5);
      Check(config);
    }
  }
}

TEST(MoeGradients, C8OneExpertAndAllExperts) {
  for (const int top_k : {1, 6}) {
    ModelConfig config = SmallConfig(6, top_k);
    config.mutable_moe()->set_norm_topk(false);
    Check(config);
  }
}

TEST(MoeGradients, C8GroupLimits) {
  ModelConfig config = WithLosses(MoeConfig::ROUTER_SIGMOID, MoeConfig::AUX_FORM_SEQUENCE, true);
  config.mutable_moe()->set_n_groups(3);
  config.mutable_moe()->set_topk_groups(2);
  Check(config, /*noise=*/true);  // margins of groups are not measured
}

// Dropped assignments: no gradient to the expert, and the rest through weights as they are.
TEST(MoeGradients, C8Capacity) {
  for (const bool norm_topk : {true, false}) {
    ModelConfig config = SmallConfig(6, 2);
    config.mutable_moe()->set_norm_topk(norm_topk);
    config.mutable_moe()->set_capacity_factor(0.6);
    MoeCase c(config, at::kDouble);
    c.NewRunner().Train(Batch({7, 0, 9}, kWidth, "gradients"));
    EXPECT_GT(c.layer->counters().dropped, 5);
    Check(config);
  }
}

TEST(MoeGradients, C8NoiseIsAConstant) {
  ModelConfig config = WithLosses(MoeConfig::ROUTER_SOFTMAX, MoeConfig::AUX_FORM_SWITCH, true);
  config.mutable_moe()->set_noise_std(0.1);
  Check(config, /*noise=*/true);
}

TEST(MoeGradients, C8ForcedBalance) {
  ModelConfig config = WithLosses(MoeConfig::ROUTER_SOFTMAX, MoeConfig::AUX_FORM_SWITCH, true);
  config.mutable_moe()->set_force_balance(true);
  Check(config, /*noise=*/true);
}

}  // namespace
}  // namespace heddle::moe
