#include "model/layers/norm.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "heddle/v1/config.pb.h"
#include "tests/model/layers/layer_fixture.h"

namespace heddle::layers {
namespace {

using heddle::v1::ModelConfig;
using layers_test::LayerFixture;
using layers_test::MaxDifference;
using layers_test::Normal;
using layers_test::ToTensor;
using layers_test::ToVector;

constexpr int64_t kWidth = 21;
constexpr NormKind kKinds[] = {NormKind::kRms, NormKind::kLayer, NormKind::kDyt};

ModelConfig ConfigOf(NormKind kind) {
  ModelConfig config;
  config.set_norm_eps(1e-3);
  if (kind == NormKind::kLayer) config.set_norm(ModelConfig::NORM_LAYERNORM);
  if (kind == NormKind::kDyt) config.set_norm(ModelConfig::NORM_DYT);
  return config;
}

void AddNorm(LayerFixture* fixture, NormKind kind, const std::string& name, int64_t width) {
  if (kind == NormKind::kDyt) fixture->Add(name + ".alpha", {1});
  fixture->Add(name + ".weight", {width});
  if (kind != NormKind::kRms) fixture->Add(name + ".bias", {width});
}

std::vector<double> Expected(NormKind kind, const LayerFixture& fixture, const std::string& name,
                             const std::vector<double>& x, double eps) {
  const std::vector<double> gain = fixture.Weight(name + ".weight");
  const size_t width = gain.size();
  std::vector<double> y(x.size());
  for (size_t row = 0; row < x.size() / width; ++row) {
    const double* v = x.data() + row * width;
    double mean = 0, square = 0;
    for (size_t i = 0; i < width; ++i) mean += v[i] / static_cast<double>(width);
    if (kind == NormKind::kRms) mean = 0;
    for (size_t i = 0; i < width; ++i) {
      square += (v[i] - mean) * (v[i] - mean) / static_cast<double>(width);
    }
    for (size_t i = 0; i < width; ++i) {
      double value = (v[i] - mean) / std::sqrt(square + eps);
      if (kind == NormKind::kDyt) value = std::tanh(fixture.Weight(name + ".alpha")[0] * v[i]);
      const double bias = kind == NormKind::kRms ? 0.0 : fixture.Weight(name + ".bias")[i];
      y[row * width + i] = value * gain[i] + bias;
    }
  }
  return y;
}

struct NormPass {
  std::vector<double> y, dx, weight_gradient, bias_gradient, alpha_gradient;
  bool operator==(const NormPass&) const = default;
};

NormPass RunNorm(const Norm& norm, LayerFixture* fixture, const std::string& name,
                 const std::vector<double>& x, const std::vector<double>& dy, int64_t width) {
  const at::ScalarType type = fixture->storage().type;
  const at::Tensor tx = ToTensor(x, width, type);
  const at::Tensor y = at::full(tx.sizes(), std::nan(""), tx.options());
  const at::Tensor saved =
      at::full({tx.size(0)}, std::nan(""), at::TensorOptions().dtype(StatisticsType(type)));
  norm.Forward(tx, y, saved);
  fixture->ZeroGradients();
  const at::Tensor dx = at::full(tx.sizes(), std::nan(""), tx.options());
  norm.Backward(tx, saved, ToTensor(dy, width, type), at::Tensor(), dx);
  NormPass pass{ToVector(y), ToVector(dx), fixture->Gradient(name + ".weight"), {}, {}};
  if (fixture->storage().Has(name + ".bias")) {
    pass.bias_gradient = fixture->Gradient(name + ".bias");
  }
  if (fixture->storage().Has(name + ".alpha")) {
    pass.alpha_gradient = fixture->Gradient(name + ".alpha");
  }
  return pass;
}

TEST(Norm, IsItsFormulaInEveryTypeAndWithinALayerOrOutside) {
  for (const NormKind kind : kKinds) {
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      for (const int layer : {2, LayerStorage::kNoLayer}) {
        const std::string name = layer == 2 ? "input_layernorm" : "model.norm";
        LayerFixture fixture(type, layer);
        AddNorm(&fixture, kind, name, kWidth);
        const Norm norm(ConfigOf(kind), fixture.Build(1.0), name);
        const std::vector<double> x = ToVector(ToTensor(Normal(7 * kWidth, "x"), kWidth, type));
        const NormPass pass = RunNorm(norm, &fixture, name, x, Normal(7 * kWidth, "dy"), kWidth);
        const double tolerance = type == at::kDouble ? 1e-12 : (type == at::kFloat ? 1e-5 : 5e-2);
        EXPECT_LT(MaxDifference(pass.y, Expected(kind, fixture, name, x, 1e-3)), tolerance)
            << static_cast<int>(kind);
      }
    }
  }
}

TEST(Norm, KindAndEpsilonOfItsOwn) {
  LayerFixture fixture(at::kDouble);
  AddNorm(&fixture, NormKind::kLayer, "self_attn.indexer.k_norm", 5);
  const Norm norm(NormKind::kLayer, 0.5, fixture.Build(1.0), "self_attn.indexer.k_norm");
  const std::vector<double> x = Normal(15, "x");
  const NormPass pass = RunNorm(norm, &fixture, "self_attn.indexer.k_norm", x, x, 5);
  EXPECT_LT(MaxDifference(pass.y,
                          Expected(NormKind::kLayer, fixture, "self_attn.indexer.k_norm", x, 0.5)),
            1e-12);
}

// C8: every weight and the input, by central differences.
TEST(Norm, C8GradientsEqualCentralDifferences) {
  for (const NormKind kind : kKinds) {
    SCOPED_TRACE(static_cast<int>(kind));
    LayerFixture fixture(at::kDouble);
    AddNorm(&fixture, kind, "n", kWidth);
    const Norm norm(ConfigOf(kind), fixture.Build(1.0), "n");
    std::vector<double> x = Normal(6 * kWidth, "x");
    const std::vector<double> dy = Normal(6 * kWidth, "dy");
    const NormPass pass = RunNorm(norm, &fixture, "n", x, dy, kWidth);
    const auto loss = [&] {
      const std::vector<double> y = Expected(kind, fixture, "n", x, 1e-3);
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
      return sum;
    };
    const auto slope = [&](double* value) {
      const double before = *value, step = 1e-5;
      *value = before + step;
      const double above = loss();
      *value = before - step;
      const double below = loss();
      *value = before;
      return (above - below) / (2 * step);
    };
    for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(pass.dx[i], slope(&x[i]), 1e-8) << i;
    const auto check = [&](const std::string& name, const std::vector<double>& gradient) {
      if (gradient.empty()) return;  // not of this kind
      double* weight = fixture.storage().Weight(name).data_ptr<double>();
      for (size_t i = 0; i < gradient.size(); ++i) {
        EXPECT_NEAR(gradient[i], slope(weight + i), 1e-8) << name << i;
      }
    };
    check("n.weight", pass.weight_gradient);
    check("n.bias", pass.bias_gradient);
    check("n.alpha", pass.alpha_gradient);
  }
}

TEST(Norm, BackwardAddsToGradientsAndAcceptsItsOutputAsInput) {
  for (const NormKind kind : kKinds) {
    LayerFixture fixture(at::kFloat);
    AddNorm(&fixture, kind, "n", kWidth);
    const Norm norm(ConfigOf(kind), fixture.Build(1.0), "n");
    const std::vector<double> x = Normal(6 * kWidth, "x"), dy = Normal(6 * kWidth, "dy");
    const NormPass once = RunNorm(norm, &fixture, "n", x, dy, kWidth);
    const at::Tensor tx = ToTensor(x, kWidth, at::kFloat), tdy = ToTensor(dy, kWidth, at::kFloat);
    const at::Tensor residual = ToTensor(Normal(6 * kWidth, "r"), kWidth, at::kFloat);
    const at::Tensor y = at::empty(tx.sizes(), tx.options());
    const at::Tensor saved = at::empty({6}, tx.options());
    norm.Forward(tx, y, saved);
    const at::Tensor in_dy = tdy.clone(), in_residual = residual.clone();
    norm.Backward(tx, saved, in_dy, residual, in_dy);
    norm.Backward(tx, saved, tdy, in_residual, in_residual);
    EXPECT_EQ(ToVector(in_dy), ToVector(in_residual));
    std::vector<double> sum = once.dx;
    const std::vector<double> r = ToVector(residual);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += r[i];
    EXPECT_LT(MaxDifference(ToVector(in_dy), sum), 1e-5);
    std::vector<double> thrice = once.weight_gradient;
    for (double& g : thrice) g *= 3;
    EXPECT_LT(MaxDifference(fixture.Gradient("n.weight"), thrice), 1e-4);
  }
}

// C5: sums over many rows have the same bits for any number of threads.
TEST(Norm, C5SameBitsForAnyNumberOfThreads) {
  const int threads = at::get_num_threads();
  for (const NormKind kind : kKinds) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      LayerFixture fixture(type);
      AddNorm(&fixture, kind, "n", kWidth);
      const Norm norm(ConfigOf(kind), fixture.Build(1.0), "n");
      const std::vector<double> x = Normal(1000 * kWidth, "x"), dy = Normal(1000 * kWidth, "dy");
      at::set_num_threads(1);
      const NormPass one = RunNorm(norm, &fixture, "n", x, dy, kWidth);
      at::set_num_threads(2);
      EXPECT_EQ(one, RunNorm(norm, &fixture, "n", x, dy, kWidth));
      at::set_num_threads(threads);
    }
  }
}

TEST(Norm, C9NoRows) {
  for (const NormKind kind : kKinds) {
    LayerFixture fixture(at::kFloat);
    AddNorm(&fixture, kind, "n", kWidth);
    const Norm norm(ConfigOf(kind), fixture.Build(1.0), "n");
    const NormPass pass = RunNorm(norm, &fixture, "n", {}, {}, kWidth);
    EXPECT_EQ(pass.weight_gradient, std::vector<double>(kWidth, 0.0));
  }
}

}  // namespace
}  // namespace heddle::layers
