#include "model/layers/feed_forward.h"

#include <gtest/gtest.h>

#include <cmath>

#include "heddle/v1/config.pb.h"
#include "model/layers/layers.h"
#include "tests/model/layers/layer_fixture.h"

namespace heddle::layers {
namespace {

using heddle::v1::ModelConfig;
using layers_test::Batch;
using layers_test::LayerFixture;
using layers_test::MaxDifference;
using layers_test::Outcome;
using layers_test::Runner;
using layers_test::ToTensor;
using layers_test::ToVector;

constexpr int64_t kWidth = 20;
constexpr int64_t kHidden = 27;
constexpr ModelConfig::Ffn kForms[] = {ModelConfig::FFN_SWIGLU, ModelConfig::FFN_GELU,
                                       ModelConfig::FFN_SILU};

struct Layer {
  Layer(ModelConfig::Ffn form, at::ScalarType type) : fixture(type) {
    ModelConfig config;
    config.set_ffn(form);
    AddFeedForward(&fixture, "mlp.", form == ModelConfig::FFN_SWIGLU, kWidth, kHidden);
    sublayer = MakeFeedForward(config, fixture.Build(0.3));
  }
  LayerFixture fixture;
  std::unique_ptr<Sublayer> sublayer;
};

double Act(ModelConfig::Ffn form, double x) {
  if (form == ModelConfig::FFN_GELU) return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
  return x / (1 + std::exp(-x));
}

std::vector<double> Expected(ModelConfig::Ffn form, const LayerFixture& fixture,
                             const Batch& batch) {
  const std::vector<double> up = fixture.Weight("mlp.up_proj.weight");
  const std::vector<double> down = fixture.Weight("mlp.down_proj.weight");
  std::vector<double> gate;
  if (form == ModelConfig::FFN_SWIGLU) gate = fixture.Weight("mlp.gate_proj.weight");
  std::vector<double> out = batch.residual;
  for (int64_t row = 0; row < batch.rows(); ++row) {
    for (int64_t f = 0; f < kHidden; ++f) {
      double u = 0, g = 0;
      for (int64_t i = 0; i < kWidth; ++i) {
        const double x = batch.h[static_cast<size_t>(row * kWidth + i)];
        u += x * up[static_cast<size_t>(f * kWidth + i)];
        if (!gate.empty()) g += x * gate[static_cast<size_t>(f * kWidth + i)];
      }
      const double hidden = gate.empty() ? Act(form, u) : Act(form, g) * u;
      for (int64_t i = 0; i < kWidth; ++i) {
        out[static_cast<size_t>(row * kWidth + i)] +=
            hidden * down[static_cast<size_t>(i * kHidden + f)];
      }
    }
  }
  return out;
}

TEST(FeedForward, IsItsFormulaInEveryFormAndType) {
  for (const ModelConfig::Ffn form : kForms) {
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      Layer layer(form, type);
      Batch batch({4, 0, 3}, kWidth, "ffn");
      batch.h = ToVector(ToTensor(batch.h, kWidth, type));
      const double tolerance = type == at::kDouble ? 1e-12 : (type == at::kFloat ? 1e-5 : 6e-2);
      Runner runner(layer.sublayer.get(), type);
      const std::vector<double> expected = Expected(form, layer.fixture, batch);
      EXPECT_LT(MaxDifference(runner.Infer(batch).out, expected), tolerance) << form;
      EXPECT_LT(MaxDifference(runner.Train(batch).out, expected), tolerance) << form;
    }
  }
}

TEST(FeedForward, C8GradientsEqualCentralDifferences) {
  for (const ModelConfig::Ffn form : kForms) {
    SCOPED_TRACE(static_cast<int>(form));
    Layer layer(form, at::kDouble);
    EXPECT_GT(CheckGradients(&layer.fixture, layer.sublayer.get(), Batch({5, 4}, kWidth, "ffn")),
              50);
  }
}

// C10: a forward that stops at what the backward needs gives the gradients of a whole one.
TEST(FeedForward, C10RecomputationChangesNoBit) {
  for (const ModelConfig::Ffn form : kForms) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      Layer kept(form, type), redone(form, type);
      const Batch batch({40, 1}, kWidth, "ffn");
      const Outcome a = Runner(kept.sublayer.get(), type).Train(batch);
      const Outcome b = Runner(redone.sublayer.get(), type).TrainWithRecomputation(batch);
      EXPECT_EQ(a, b);
      for (const std::string& name : kept.fixture.Names()) {
        EXPECT_EQ(kept.fixture.Gradient(name), redone.fixture.Gradient(name)) << name;
      }
    }
  }
}

// The gated form is the sequence of calls that dense blocks were trained with: the same bits.
TEST(FeedForward, SwigluIsTheJoinedProductSwigluAndDown) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    Layer layer(ModelConfig::FFN_SWIGLU, type);
    const Batch batch({33}, kWidth, "ffn");
    const at::Tensor h = ToTensor(batch.h, kWidth, type);
    const at::Tensor residual = ToTensor(batch.residual, kWidth, type);
    const at::Tensor pre = at::empty({33, 2 * kHidden}, h.options());
    const at::Tensor hidden = at::empty({33, kHidden}, h.options());
    const at::Tensor out = at::empty({33, kWidth}, h.options());
    const LayerStorage& storage = layer.fixture.storage();
    Linear(h, storage.JoinedWeight("mlp.gate_proj.weight", 2 * kHidden), pre);
    Swiglu(pre, hidden);
    LinearAdd(residual, hidden, storage.Weight("mlp.down_proj.weight"), out);
    EXPECT_EQ(Runner(layer.sublayer.get(), type).Train(batch).out, ToVector(out));
  }
}

TEST(FeedForward, C9NoRowsAndPackedEqualsAlone) {
  for (const ModelConfig::Ffn form : kForms) {
    Layer layer(form, at::kDouble);
    Runner runner(layer.sublayer.get(), at::kDouble);
    EXPECT_TRUE(runner.Train(Batch({}, kWidth, "ffn")).out.empty());
    for (const std::string& name : layer.fixture.Names()) {
      for (const double g : layer.fixture.Gradient(name)) ASSERT_EQ(g, 0.0);
    }
    const Batch both({3, 4}, kWidth, "ffn");
    Batch alone({3}, kWidth, "ffn");  // streams of values: the first document is the same
    const std::vector<double> whole = runner.Train(both).out;
    const std::vector<double> first = runner.Train(alone).out;
    EXPECT_LT(MaxDifference({whole.begin(), whole.begin() + 3 * kWidth}, first), 1e-10);
  }
}

}  // namespace
}  // namespace heddle::layers
