#include "model/moe/moe_layer.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <numeric>

#include "model/moe/dispatch.h"
#include "tests/model/moe/moe_fixture.h"

namespace heddle::moe {
namespace {

using layers_test::MaxDifference;
using layers_test::Normal;
using layers_test::ToTensor;
using layers_test::ToVector;
using moe_test::AddFunction;
using moe_test::Batch;
using moe_test::kBias;
using moe_test::kWidth;
using moe_test::ModelConfig;
using moe_test::MoeCase;
using moe_test::MoeConfig;
using moe_test::Outcome;
using moe_test::PlainMoe;
using moe_test::Runner;
using moe_test::SmallConfig;

// Every router, form of expert and limit at least once.
std::vector<ModelConfig> Forms() {
  std::vector<ModelConfig> forms(5, SmallConfig(6, 2));
  forms[1].set_ffn(ModelConfig::FFN_GELU);
  forms[1].mutable_moe()->set_norm_topk(false);
  forms[1].mutable_moe()->set_n_shared(2);
  forms[2].set_ffn(ModelConfig::FFN_SILU);
  forms[2].mutable_moe()->set_router(MoeConfig::ROUTER_SIGMOID);
  forms[2].mutable_moe()->set_route_scale(2.5);
  forms[2].mutable_moe()->set_n_groups(3);
  forms[2].mutable_moe()->set_topk_groups(2);
  forms[3].mutable_moe()->set_router(MoeConfig::ROUTER_SIGMOID);
  forms[3].mutable_moe()->set_n_shared(1);
  forms[3].mutable_moe()->set_top_k(4);
  forms[4].mutable_moe()->set_top_k(1);
  forms[4].mutable_moe()->set_norm_topk(false);
  forms[4].mutable_moe()->set_n_groups(2);
  return forms;
}

std::vector<float> SmallBias() { return {0.1f, 0.0f, -0.1f, 0.05f, 0.0f, -0.05f}; }

Batch Slice(const Batch& batch, int64_t begin, int64_t end) {
  Batch part({static_cast<int32_t>(end - begin)}, batch.width, "slice");
  const auto cut = [&](const std::vector<double>& v) {
    return std::vector<double>(v.begin() + begin * batch.width, v.begin() + end * batch.width);
  };
  part.h = cut(batch.h);
  part.residual = cut(batch.residual);
  part.gradient = cut(batch.gradient);
  part.step = batch.step;
  part.step.first_token += begin;
  return part;
}

TEST(Moe, IsTheWeightedSumOfItsExpertsInEveryFormAndType) {
  for (const ModelConfig& config : Forms()) {
    SCOPED_TRACE(config.ShortDebugString());
    for (const bool with_bias : {true, false}) {
      for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
        MoeCase c(config, type, with_bias);
        if (with_bias) c.SetBias(SmallBias());
        Batch batch({30, 0, 11}, kWidth, "forms");
        batch.h = ToVector(ToTensor(batch.h, kWidth, type));
        batch.residual = ToVector(ToTensor(batch.residual, kWidth, type));
        const std::vector<double> expected = PlainMoe(c, batch);
        double largest = 0;
        for (const double v : expected) largest = std::max(largest, std::abs(v));
        const double tolerance =
            largest * (type == at::kDouble ? 1e-13 : (type == at::kFloat ? 1e-6 : 2e-2));
        Runner runner = c.NewRunner();
        EXPECT_LT(MaxDifference(runner.Infer(batch).out, expected), tolerance);
        EXPECT_LT(MaxDifference(runner.Train(batch).out, expected), tolerance);
      }
    }
  }
}

TEST(Moe, E1TheCoefficientIsAppliedOnce) {
  ModelConfig config = SmallConfig(8, 2);
  config.mutable_moe()->set_aux_loss(0.01);
  config.mutable_moe()->set_z_loss(1e-3);
  MoeCase c(config, at::kDouble);
  c.fixture.Set("mlp.gate.weight", std::vector<double>(8 * kWidth, 0.0));
  Batch batch({10, 5}, kWidth, "e1");
  batch.step.row_scale = 1.0 / 15;
  Runner runner = c.NewRunner();
  const layers::LayerLosses losses = runner.Train(batch).losses;
  EXPECT_NEAR(losses.balance, 0.01, 1e-15);
  EXPECT_NEAR(losses.router_z, 1e-3 * std::log(8.0) * std::log(8.0), 1e-15);
  EXPECT_EQ(losses.indexer, 0.0);
  EXPECT_EQ(runner.Infer(batch).losses.Total(), 0.0);
  batch.step.row_scale = 0;
  EXPECT_EQ(runner.Train(batch).losses.Total(), 0.0);
}

TEST(Moe, E3AllExpertsOfASoftmaxRouterAreADenseMixture) {
  ModelConfig config = SmallConfig(5, 5);
  config.mutable_moe()->set_norm_topk(false);
  MoeCase c(config, at::kDouble);
  const Batch batch({9}, kWidth, "e3");
  const std::vector<double> gate = c.fixture.Weight("mlp.gate.weight");
  std::vector<double> expected = batch.residual;
  for (int64_t row = 0; row < 9; ++row) {
    const double* x = batch.h.data() + row * kWidth;
    double z[5] = {}, sum = 0;
    for (int e = 0; e < 5; ++e) {
      for (int64_t i = 0; i < kWidth; ++i) z[e] += x[i] * gate[static_cast<size_t>(e * kWidth + i)];
      sum += std::exp(z[e]);
    }
    for (int e = 0; e < 5; ++e) {
      AddFunction(c, MoeCase::Expert(e), x, std::exp(z[e]) / sum, expected.data() + row * kWidth);
    }
  }
  EXPECT_LT(MaxDifference(c.NewRunner().Infer(batch).out, expected), 1e-11);
}

TEST(Moe, E4PermutingTokensPermutesOutputs) {
  for (const ModelConfig& config : Forms()) {
    MoeCase c(config, at::kDouble);
    const Batch batch({23}, kWidth, "e4");
    Batch permuted = batch;
    const auto from = [](int64_t row) { return (row * 7 + 3) % 23; };
    const auto permute = [&](const std::vector<double>& v) {
      std::vector<double> out(v.size());
      for (int64_t row = 0; row < 23; ++row) {
        std::copy_n(v.begin() + from(row) * kWidth, kWidth, out.begin() + row * kWidth);
      }
      return out;
    };
    permuted.h = permute(batch.h);
    permuted.residual = permute(batch.residual);
    permuted.gradient = permute(batch.gradient);
    Runner runner = c.NewRunner();
    const Outcome a = runner.Train(batch);
    const Outcome b = runner.Train(permuted);
    EXPECT_LT(MaxDifference(permute(a.out), b.out), 1e-12);
    EXPECT_LT(MaxDifference(permute(a.dh), b.dh), 1e-12);
  }
}

TEST(Moe, E5AConstantShiftOfTheBiasChangesNothing) {
  for (const ModelConfig& config : Forms()) {
    MoeCase c(config, at::kDouble);
    const Batch batch({25}, kWidth, "e5");
    Runner runner = c.NewRunner();
    const Outcome before = runner.Train(batch);
    c.SetBias(std::vector<float>(6, 0.5f));
    EXPECT_EQ(before, runner.Train(batch));
    c.SetBias({0, 0, 0, 5, 5, 5});
    EXPECT_NE(before.out, runner.Train(batch).out);
    EXPECT_LT(MaxDifference(runner.Train(batch).out, PlainMoe(c, batch)), 1e-11);
  }
}

// The golden step of section 14 and E6.
TEST(Moe, E6BiasMovesBySignStepsAndKeepsItsSumWhenCentered) {
  for (const bool center : {false, true}) {
    ModelConfig config = SmallConfig(5, 2);
    config.mutable_moe()->set_bias_update_rate(1e-3);
    config.mutable_moe()->set_bias_center(center);
    MoeCase c(config, at::kFloat);
    const std::span<double> loads = c.layer->statistics();
    ASSERT_EQ(loads.size(), 5u);
    const std::vector<double> counts = {19, 19, 5, 18, 19};
    std::copy(counts.begin(), counts.end(), loads.begin());
    c.layer->UpdateBuffers();
    const float shift = center ? 0.6e-3f : 0.0f;  // the mean of the signs is -3/5
    for (int e = 0; e < 5; ++e) {
      EXPECT_FLOAT_EQ(c.bias()[e], (e == 2 ? 1e-3f : -1e-3f) + shift) << e;
    }
    double sum = 0;
    for (int step = 0; step < 100; ++step) c.layer->UpdateBuffers();
    for (int e = 0; e < 5; ++e) sum += c.bias()[e];
    EXPECT_NEAR(sum, center ? 0.0 : -3e-3 * 101, 1e-5);
    // Balanced loads and no loads at all: no step.
    const std::vector<float> before(c.bias(), c.bias() + 5);
    for (const double load : {7.0, 0.0}) {
      std::fill(loads.begin(), loads.end(), load);
      c.layer->UpdateBuffers();
      EXPECT_EQ(before, std::vector<float>(c.bias(), c.bias() + 5));
    }
  }
}

TEST(Moe, E6WithoutARateTheBiasStays) {
  MoeCase c(SmallConfig(5, 2), at::kFloat);
  c.NewRunner().Train(Batch({40}, kWidth, "e6"));
  c.layer->UpdateBuffers();
  for (int e = 0; e < 5; ++e) EXPECT_EQ(c.bias()[e], 0.0f);
  MoeCase without(SmallConfig(5, 2), at::kFloat, /*with_bias=*/false);
  EXPECT_TRUE(without.layer->statistics().empty());
  without.layer->UpdateBuffers();
}

TEST(Moe, E8IdenticalExpertsMakeTheRoutingIrrelevant) {
  for (const MoeConfig::Router router : {MoeConfig::ROUTER_SOFTMAX, MoeConfig::ROUTER_SIGMOID}) {
    ModelConfig config = SmallConfig(6, 3);
    config.mutable_moe()->set_router(router);
    MoeCase c(config, at::kDouble);
    for (int e = 1; e < 6; ++e) {
      for (const char* part : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
        c.fixture.Set(MoeCase::Expert(e) + part, c.fixture.Weight(MoeCase::Expert(0) + part));
      }
    }
    const Batch batch({17}, kWidth, "e8");
    std::vector<double> expected = batch.residual;
    for (int64_t row = 0; row < 17; ++row) {
      AddFunction(c, MoeCase::Expert(0), batch.h.data() + row * kWidth, 1.0,
                  expected.data() + row * kWidth);
    }
    for (const char* gate : {"one", "another"}) {
      c.fixture.Set("mlp.gate.weight", Normal(6 * kWidth, gate));
      EXPECT_LT(MaxDifference(c.NewRunner().Infer(batch).out, expected), 1e-11);
    }
  }
}

TEST(Moe, E9CapacityDropsTheCountedRestAndNothingWhenLarge) {
  for (ModelConfig config : Forms()) {
    const int top_k = config.moe().top_k();
    const Batch batch({20, 7}, kWidth, "e9");
    MoeCase dropless(config, at::kDouble);
    const Outcome whole = dropless.NewRunner().Train(batch);
    EXPECT_EQ(dropless.layer->counters().assignments, 27 * top_k);
    EXPECT_EQ(dropless.layer->counters().dropped, 0);
    config.mutable_moe()->set_capacity_factor(1e6);
    MoeCase roomy(config, at::kDouble);
    EXPECT_EQ(whole, roomy.NewRunner().Train(batch));
    EXPECT_EQ(dropless.Gradients(), roomy.Gradients());
    EXPECT_EQ(roomy.layer->counters().dropped, 0);
    // Room for one token per expert: ceil(f N K / E) = 1.
    config.mutable_moe()->set_capacity_factor(6.0 / (27 * top_k));
    MoeCase one(config, at::kDouble);
    Runner runner = one.NewRunner();
    const Outcome dropped = runner.Train(batch);
    EXPECT_LT(MaxDifference(dropped.out, PlainMoe(one, batch, 1)), 1e-11);
    int64_t used = 0, beyond = 0;
    for (const double load : one.layer->statistics()) {
      used += load > 0;
      beyond += static_cast<int64_t>(std::max(0.0, load - 1));
    }
    EXPECT_EQ(one.layer->counters().dropped, beyond);
    EXPECT_EQ(used + beyond, 27 * top_k);
    // The statistics count what the router asked for; inference drops nothing.
    EXPECT_TRUE(std::equal(one.layer->statistics().begin(), one.layer->statistics().end(),
                           dropless.layer->statistics().begin()));
    EXPECT_LT(MaxDifference(runner.Infer(batch).out, whole.out), 1e-12);
  }
}

// Loads are sums: micro-batches and ranks that share a step move the bias like one batch.
TEST(Moe, E10TheBiasUpdateDoesNotDependOnTheSplitOfTheStep) {
  ModelConfig config = SmallConfig(6, 2);
  config.mutable_moe()->set_bias_update_rate(1e-3);
  config.mutable_moe()->set_bias_center(true);
  MoeCase whole(config, at::kFloat), first(config, at::kFloat), second(config, at::kFloat);
  const Batch batch({64}, kWidth, "e10");
  whole.NewRunner().Train(batch);
  Runner first_runner = first.NewRunner();
  first_runner.Train(Slice(batch, 0, 10));
  first_runner.Train(Slice(batch, 10, 31));
  second.NewRunner().Train(Slice(batch, 31, 64));
  for (size_t e = 0; e < 6; ++e) {
    const double sum = first.layer->statistics()[e] + second.layer->statistics()[e];
    EXPECT_EQ(sum, whole.layer->statistics()[e]);
    first.layer->statistics()[e] = second.layer->statistics()[e] = sum;
  }
  for (MoeCase* c : {&whole, &first, &second}) c->layer->UpdateBuffers();
  for (int e = 0; e < 6; ++e) {
    EXPECT_EQ(whole.bias()[e], first.bias()[e]);
    EXPECT_EQ(whole.bias()[e], second.bias()[e]);
  }
  EXPECT_NE(*std::max_element(whole.bias(), whole.bias() + 6), 0.0f);
}

TEST(Moe, E11SharedExpertsContributeFullyWhateverTheRouterSays) {
  for (const ModelConfig::Ffn form :
       {ModelConfig::FFN_SWIGLU, ModelConfig::FFN_GELU, ModelConfig::FFN_SILU}) {
    ModelConfig config = SmallConfig(4, 1);
    config.set_ffn(form);
    config.mutable_moe()->set_n_shared(2);
    config.mutable_moe()->set_route_scale(3.0);
    MoeCase c(config, at::kDouble);
    for (int e = 0; e < 4; ++e) {
      c.fixture.Set(MoeCase::Expert(e) + "down_proj.weight",
                    std::vector<double>(static_cast<size_t>(kWidth * 11), 0.0));
    }
    const Batch batch({12}, kWidth, "e11");
    std::vector<double> expected = batch.residual;
    for (int64_t row = 0; row < 12; ++row) {
      AddFunction(c, "mlp.shared_experts.", batch.h.data() + row * kWidth, 1.0,
                  expected.data() + row * kWidth);
    }
    for (const double scale : {0.0, 1.0, 30.0}) {
      c.fixture.Set("mlp.gate.weight", Normal(4 * kWidth, "gate", scale));
      EXPECT_LT(MaxDifference(c.NewRunner().Train(batch).out, expected), 1e-11);
    }
    EXPECT_EQ(c.layer->counters().assignments, 3 * 12);  // the shared ones are not routed
  }
}

TEST(Moe, C2C4PackedEqualsAloneAndDocumentsInAnotherOrderPermuteOutputs) {
  for (ModelConfig config : Forms()) {
    config.mutable_moe()->set_aux_form(MoeConfig::AUX_FORM_SEQUENCE);
    config.mutable_moe()->set_aux_loss(0.1);
    config.mutable_moe()->set_z_loss(0.1);
    MoeCase packed(config, at::kDouble), alone(config, at::kDouble);
    Batch batch({13, 0, 1, 20}, kWidth, "c2");
    batch.step.row_scale = 1.0 / 34;
    const Outcome whole = packed.NewRunner().Train(batch);
    Runner runner = alone.NewRunner();
    Outcome last, sum;
    for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 13}, {13, 14}, {14, 34}}) {
      last = runner.Train(Slice(batch, begin, end));
      sum.out.insert(sum.out.end(), last.out.begin(), last.out.end());
      sum.dh.insert(sum.dh.end(), last.dh.begin(), last.dh.end());
      sum.losses.balance += last.losses.balance;
      sum.losses.router_z += last.losses.router_z;
    }
    EXPECT_LT(MaxDifference(whole.out, sum.out), 1e-12);
    EXPECT_LT(MaxDifference(whole.dh, sum.dh), 1e-12);
    EXPECT_NEAR(whole.losses.balance, sum.losses.balance, 1e-13);
    EXPECT_NEAR(whole.losses.router_z, sum.losses.router_z, 1e-13);
    for (const auto& [name, gradient] : packed.Gradients()) {
      EXPECT_LT(MaxDifference(gradient, alone.fixture.Gradient(name)), 1e-11) << name;
    }
    // The last document first.
    Batch swapped({20, 13, 0, 1}, kWidth, "c2");
    const auto rotate = [](const std::vector<double>& v) {
      std::vector<double> out = v;
      std::rotate(out.begin(), out.begin() + 14 * kWidth, out.end());
      return out;
    };
    swapped.h = rotate(batch.h);
    swapped.residual = rotate(batch.residual);
    EXPECT_LT(MaxDifference(runner.Infer(swapped).out, rotate(whole.out)), 1e-12);
  }
}

// C1 and C3: without noise and capacity a row's result does not depend on the rows beside it.
TEST(Moe, C3RowByRowInferenceEqualsTheWholeBatch) {
  for (ModelConfig config : Forms()) {
    config.mutable_moe()->set_noise_std(0.3);
    config.mutable_moe()->set_capacity_factor(0.5);
    MoeCase c(config, at::kDouble);
    c.SetBias(SmallBias());
    const Batch batch({33}, kWidth, "c3");
    Runner runner = c.NewRunner();
    const std::vector<double> whole = runner.Infer(batch).out;
    std::vector<double> steps = runner.Infer(Slice(batch, 0, 20)).out;
    for (int64_t row = 20; row < 33; ++row) {
      const std::vector<double> one = runner.Infer(Slice(batch, row, row + 1)).out;
      steps.insert(steps.end(), one.begin(), one.end());
    }
    EXPECT_LT(MaxDifference(whole, steps), 1e-12);
    EXPECT_EQ(c.layer->counters().assignments, 0);  // inference counts nothing
    for (const double load : c.layer->statistics()) EXPECT_EQ(load, 0.0);
  }
}

// Ties included: two experts have the same router row. Several pieces per expert, uneven loads.
TEST(Moe, C5SameBitsRunToRunAndForAnyNumberOfThreads) {
  const int threads = at::get_num_threads();
  for (const int form : {0, 1}) {  // gated, and not gated with shared experts
    ModelConfig config = Forms()[static_cast<size_t>(form)];
    config.set_d_model(48);
    config.mutable_moe()->set_d_expert(40);
    config.mutable_moe()->set_aux_loss(0.1);
    config.mutable_moe()->set_z_loss(0.1);
    config.mutable_moe()->set_noise_std(0.01);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      Batch batch({1600, 613}, 48, "c5");
      batch.step.row_scale = 1e-3;
      std::vector<Outcome> outcomes;
      std::vector<std::map<std::string, std::vector<double>>> gradients;
      for (const int n : {1, 2, 2}) {
        at::set_num_threads(n);
        MoeCase c(config, type);
        std::vector<double> gate = c.fixture.Weight("mlp.gate.weight");
        std::copy_n(gate.begin(), 48, gate.begin() + 2 * 48);
        c.fixture.Set("mlp.gate.weight", gate);
        outcomes.push_back(c.NewRunner().Train(batch));
        gradients.push_back(c.Gradients());
      }
      at::set_num_threads(threads);
      for (size_t i = 1; i < outcomes.size(); ++i) {
        EXPECT_EQ(outcomes[0], outcomes[i]) << "type " << static_cast<int>(type);
        for (const auto& [name, gradient] : gradients[0]) {
          EXPECT_EQ(MaxDifference(gradient, gradients[i][name]), 0.0)
              << name << " type " << static_cast<int>(type) << " run " << i;
        }
      }
    }
  }
}

TEST(Moe, C7LaterTokensLeaveEarlierOnesAlone) {
  for (const ModelConfig& config : Forms()) {
    MoeCase c(config, at::kDouble);
    const Batch batch({40}, kWidth, "c7");
    Runner runner = c.NewRunner();
    const std::vector<double> before = runner.Train(batch).out;
    for (const int64_t s : {5, 20, 39}) {
      for (const double change : {1e-9, 3.0}) {
        Batch other = batch;
        for (int64_t i = 0; i < kWidth; ++i) {
          other.h[static_cast<size_t>(s * kWidth + i)] += i % 2 == 0 ? change : -change;
        }
        const std::vector<double> after = runner.Train(other).out;
        const auto end = static_cast<std::ptrdiff_t>(s * kWidth);
        const std::vector<double> a(before.begin(), before.begin() + end);
        const std::vector<double> b(after.begin(), after.begin() + end);
        // The same experts: the same products, bit by bit. Another choice gives products of other
        // sizes, which LibTorch may add up in another order.
        if (change < 1) {
          EXPECT_EQ(a, b) << s;
        } else {
          EXPECT_LT(MaxDifference(a, b), 1e-12) << s;
        }
        EXPECT_NE(before, after);
      }
    }
  }
}

TEST(Moe, C9EmptyBatchesAndExpertsWithoutTokens) {
  for (ModelConfig config : Forms()) {
    config.mutable_moe()->set_aux_loss(0.1);
    config.mutable_moe()->set_bias_update_rate(1e-3);
    for (const at::ScalarType type : {at::kDouble, at::kBFloat16}) {
      MoeCase c(config, type);
      Runner runner = c.NewRunner();
      for (const std::vector<int32_t>& lengths : {std::vector<int32_t>{}, {0}, {0, 0}}) {
        Batch none(lengths, kWidth, "c9");
        none.step.row_scale = 1;
        EXPECT_TRUE(runner.Train(none).out.empty());
        EXPECT_TRUE(runner.TrainWithRecomputation(none).out.empty());
        EXPECT_TRUE(runner.Infer(none).out.empty());
      }
      for (const auto& [name, gradient] : c.Gradients()) {
        for (const double g : gradient) ASSERT_EQ(g, 0.0) << name;
      }
      c.layer->UpdateBuffers();
      for (int e = 0; e < 6; ++e) EXPECT_EQ(c.bias()[e], 0.0f);
      // One token: E - K experts have none.
      runner.Train(Batch({0, 1}, kWidth, "c9"));
      int untouched = 0;
      for (int e = 0; e < 6; ++e) {
        const std::vector<double> g = c.fixture.Gradient(MoeCase::Expert(e) + "down_proj.weight");
        untouched += std::all_of(g.begin(), g.end(), [](double v) { return v == 0.0; });
      }
      EXPECT_EQ(untouched, 6 - config.moe().top_k());
    }
  }
}

// Any configuration, any ragged batch, against the plain loops; recomputation gives the same bits.
TEST(Moe, C9RandomShapesEqualThePlainSum) {
  const Rng rng(2026, "moe.random_shapes");
  int compared = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    RngCursor draw(rng.Child(seed));
    const auto below = [&](uint64_t bound) { return static_cast<int>(draw.Below(bound)); };
    const int groups = 1 + below(3);
    const int per_group = 1 + below(5);
    const int topk_groups = 1 + below(static_cast<uint64_t>(groups));
    ModelConfig config =
        SmallConfig(groups * per_group, 1 + below(static_cast<uint64_t>(topk_groups * per_group)));
    MoeConfig* moe = config.mutable_moe();
    moe->set_n_groups(groups);
    moe->set_topk_groups(topk_groups);
    moe->set_n_shared(below(3));
    moe->set_d_expert(1 + below(40));
    moe->set_norm_topk(below(2) == 0);
    if (below(2) == 0) moe->set_router(MoeConfig::ROUTER_SIGMOID);
    if (below(2) == 0) moe->set_bias_update_rate(1e-3);
    if (below(2) == 0) moe->set_capacity_factor(0.1 * (1 + below(20)));
    moe->set_route_scale(0.5 + 0.5 * below(4));
    config.set_ffn(static_cast<ModelConfig::Ffn>(below(3)));
    std::vector<int32_t> lengths;
    for (int i = below(4); i >= 0; --i) lengths.push_back(below(3) == 0 ? 0 : below(60));
    MoeCase c(config, at::kDouble), again(config, at::kDouble);
    const Batch batch(lengths, kWidth, "random" + std::to_string(seed));
    if (batch.rows() > 0 && moe_test::Margin(c, batch) < 1e-9) continue;  // sums differ in order
    const int64_t capacity =
        Capacity(moe->capacity_factor(), batch.rows(), moe->top_k(), moe->n_experts());
    Runner runner = c.NewRunner();
    const Outcome trained = runner.Train(batch);
    EXPECT_LT(MaxDifference(trained.out, PlainMoe(c, batch, capacity)), 1e-10);
    EXPECT_LT(MaxDifference(runner.Infer(batch).out, PlainMoe(c, batch)), 1e-10);
    EXPECT_EQ(trained, again.NewRunner().TrainWithRecomputation(batch));
    EXPECT_EQ(c.Gradients(), again.Gradients());
    ++compared;
  }
  EXPECT_GT(compared, 50);
}

// Bugs 35 and 36: recomputation neither counts again nor routes again.
TEST(Moe, C10RecomputationChangesNoBitCountsOnceAndKeepsTheRouting) {
  for (ModelConfig config : Forms()) {
    config.mutable_moe()->set_aux_loss(0.1);
    config.mutable_moe()->set_z_loss(0.1);
    config.mutable_moe()->set_noise_std(0.1);
    config.mutable_moe()->set_capacity_factor(1.0);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      MoeCase kept(config, type), redone(config, type);
      Batch batch({50, 20}, kWidth, "c10");
      batch.step.row_scale = 0.01;
      batch.step.seed = 9;
      const Outcome a = kept.NewRunner().Train(batch);
      // A bias that would turn the choice around, if it were made again.
      const Outcome b = redone.NewRunner().TrainWithRecomputation(batch, [&] {
        redone.SetBias({9, 0, 9, 0, 9, 0});
      });
      EXPECT_EQ(a, b);
      EXPECT_EQ(kept.Gradients(), redone.Gradients());
      EXPECT_TRUE(std::equal(kept.layer->statistics().begin(), kept.layer->statistics().end(),
                             redone.layer->statistics().begin()));
      EXPECT_EQ(
          std::accumulate(kept.layer->statistics().begin(), kept.layer->statistics().end(), 0.0),
          70 * config.moe().top_k());
      EXPECT_EQ(kept.layer->counters().assignments, redone.layer->counters().assignments);
      EXPECT_EQ(kept.layer->counters().dropped, redone.layer->counters().dropped);
      EXPECT_GT(kept.layer->counters().dropped, 0);
    }
  }
}

TEST(Moe, NoiseIsThereInTrainingAloneAndNotPartOfTheSplit) {
  ModelConfig config = SmallConfig(6, 2);
  config.mutable_moe()->set_noise_std(0.5);
  MoeCase noisy(config, at::kDouble);
  config.mutable_moe()->set_noise_std(0);
  MoeCase quiet(config, at::kDouble);
  Batch batch({40}, kWidth, "noise");
  batch.step.seed = 3;
  Runner runner = noisy.NewRunner();
  const std::vector<double> whole = runner.Train(batch).out;
  EXPECT_EQ(runner.Infer(batch).out, quiet.NewRunner().Infer(batch).out);
  EXPECT_NE(whole, quiet.NewRunner().Train(batch).out);
  std::vector<double> parts = runner.Train(Slice(batch, 0, 15)).out;
  const std::vector<double> rest = runner.Train(Slice(batch, 15, 40)).out;
  parts.insert(parts.end(), rest.begin(), rest.end());
  EXPECT_LT(MaxDifference(whole, parts), 1e-12);
  batch.step.step = 1;
  EXPECT_NE(whole, runner.Train(batch).out);
}

TEST(Moe, NanIsCountedAndNotHidden) {
  for (const ModelConfig& config : Forms()) {
    MoeCase c(config, at::kFloat);
    Batch batch({10}, kWidth, "nan");
    batch.h[3 * kWidth] = std::nan("");
    const Outcome o = c.NewRunner().Train(batch);
    EXPECT_TRUE(std::isnan(o.out[3 * kWidth]));
    EXPECT_FALSE(std::isnan(o.out[2 * kWidth]));
    EXPECT_EQ(c.layer->counters().nan_tokens, 1);
  }
}

}  // namespace
}  // namespace heddle::moe
