// DSA on MLA (attention-and-moe.md sections 6 and 8): every head of a token attends to the keys
// that one indexer selects.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "model/attention/dsa_indexer.h"
#include "model/attention/mla_absorbed.h"
#include "model/attention/mla_layer.h"
#include "tests/model/attention/mla_harness.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using layers::CacheRows;
using layers::LayerLosses;
using layers::Pass;
using layers::StepInfo;
using model_test::Gen;

using Lengths = std::vector<int32_t>;

// The indexer's queries from the input, and from the query latent.
const std::vector<MlaSizes> kKinds = {
    {.name = "plain"},
    {.name = "query latent", .heads = 3, .value = 6, .query_latent = 7, .layernorm = true}};
constexpr int32_t kTopK = 4;

at::Tensor Inputs(const MlaHarness& harness, int64_t rows, double phase = 0.7) {
  const int64_t d = harness.config().d_model();
  return Matrix(Gen(rows * d, phase), d, harness.type());
}

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  const std::vector<double> x = Values(a), y = Values(b);
  EXPECT_EQ(x.size(), y.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
    const double difference = std::abs(x[i] - y[i]);
    if (!(difference <= worst)) worst = difference;
  }
  return worst;
}

bool OfIndexer(const std::string& name) { return name.find("indexer") != std::string::npos; }

// Losses of the layer as means over `rows`.
StepInfo Training(int64_t rows, bool warmup = false) {
  StepInfo step;
  step.row_scale = 1.0 / static_cast<double>(rows);
  step.indexer_warmup = warmup;
  return step;
}

// M5: with as many keys as there are, or in stage 1, DSA on MLA is MLA, forward and backward.
TEST(DsaMla, M5SelectingEverythingIsMla) {
  const Lengths lengths = {13, 0, 5, 1};
  for (const MlaSizes& sizes : kKinds) {
    for (const bool warmup : {false, true}) {
      MlaHarness dense(sizes);
      MlaHarness sparse(DsaMlaConfigOf(sizes, warmup ? kTopK : 13), at::kDouble);
      const StepInfo step = Training(19, warmup);
      LayerLosses losses;
      const at::Tensor h = Inputs(dense, 19);
      const at::Tensor g = Inputs(dense, 19, 0.9);
      EXPECT_LE(MaxDifference(sparse.Forward(lengths, h, {.step = &step, .losses = &losses}),
                              dense.Forward(lengths, h)),
                1e-12)
          << sizes.name;
      EXPECT_GT(losses.indexer, 0);
      EXPECT_LE(MaxDifference(sparse.Backward(lengths, h, g, &step), dense.Backward(lengths, h, g)),
                1e-12)
          << sizes.name;
      for (const std::string& name : dense.Names()) {
        const std::vector<double> got = sparse.Gradient(name);
        const std::vector<double> expected = dense.Gradient(name);
        for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-12) << name;
      }
    }
  }
}

TEST(DsaMla, SelectsFewerKeysThanThereAre) {
  MlaHarness dense(kKinds[0]);
  MlaHarness sparse(DsaMlaConfigOf(kKinds[0], kTopK), at::kDouble);
  const at::Tensor h = Inputs(dense, 20);
  const at::Tensor y = dense.Forward({20}, h);
  const at::Tensor z = sparse.Forward({20}, h);
  EXPECT_LE(MaxDifference(z.narrow(0, 0, kTopK), y.narrow(0, 0, kTopK)), 1e-13);
  EXPECT_GE(MaxDifference(z.narrow(0, kTopK, 20 - kTopK), y.narrow(0, kTopK, 20 - kTopK)), 1e-3);
}

TEST(DsaMla, C1C2PrefixesAndPackingChangeNothing) {
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(DsaMlaConfigOf(sizes, kTopK), at::kDouble);
    const at::Tensor h = Inputs(harness, 24);
    const at::Tensor packed = harness.Forward({15, 0, 1, 8}, h).clone();
    EXPECT_LE(MaxDifference(harness.Forward({8}, h.narrow(0, 16, 8)), packed.narrow(0, 16, 8)),
              1e-13);
    for (int32_t t = 1; t <= 15; ++t) {
      EXPECT_LE(MaxDifference(harness.Forward({t}, h.narrow(0, 0, t)), packed.narrow(0, 0, t)),
                1e-13)
          << sizes.name << ' ' << t;
    }
  }
}

TEST(DsaMla, C7TheFutureChangesNoBitOfThePast) {
  for (const MlaSizes& sizes : kKinds) {
    for (const at::ScalarType type : {at::kDouble, at::kBFloat16}) {
      MlaHarness harness(DsaMlaConfigOf(sizes, kTopK), type);
      const at::Tensor h = Inputs(harness, 20);
      const at::Tensor y = harness.Forward({20}, h);
      for (const int64_t s : {1, 7, 19}) {
        const at::Tensor changed = h.clone();
        changed[s].add_(0.5);
        const at::Tensor other = harness.Forward({20}, changed);
        EXPECT_EQ(Values(other.narrow(0, 0, s)), Values(y.narrow(0, 0, s))) << sizes.name;
        EXPECT_NE(Values(other[s]), Values(y[s])) << sizes.name;
      }
    }
  }
}

// C9: lengths around k, single tokens, no token at all.
TEST(DsaMla, C9EdgesOfLengths) {
  MlaHarness harness(DsaMlaConfigOf(kKinds[1], kTopK), at::kDouble);
  for (const Lengths& lengths :
       std::vector<Lengths>{{0}, {1}, {0, 1, 0}, {kTopK - 1, kTopK, kTopK + 1}}) {
    const int64_t rows = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const StepInfo step = Training(std::max<int64_t>(rows, 1));
    LayerLosses losses;
    const at::Tensor h = Inputs(harness, rows);
    const at::Tensor y = harness.Forward(lengths, h, {.step = &step, .losses = &losses});
    const at::Tensor dh = harness.Backward(lengths, h, Inputs(harness, rows, 0.9), &step);
    for (const double value : Values(y)) EXPECT_TRUE(std::isfinite(value));
    for (const double value : Values(dh)) EXPECT_TRUE(std::isfinite(value));
  }
}

// C8 for both losses, D4: the indexer learns from its own loss only, the rest from the other only.
TEST(DsaMla, C8D4EachLossReachesItsOwnWeights) {
  const Lengths lengths = {9, 4};
  constexpr double kStep = 1e-5;
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(DsaMlaConfigOf(sizes, kTopK), at::kDouble);
    const StepInfo step = Training(13);
    const at::Tensor h = Inputs(harness, 13);
    const at::Tensor g = Inputs(harness, 13, 0.9);
    LayerLosses losses;
    harness.Forward(lengths, h, {.step = &step, .losses = &losses});
    harness.Backward(lengths, h, g, &step);
    const std::vector<double> weights = Values(g);
    // The loss a weight belongs to.
    const auto loss = [&](const std::string& name) {
      LayerLosses own;
      const std::vector<double> y =
          Values(harness.Forward(lengths, h, {.step = &step, .losses = &own}));
      return OfIndexer(name) ? own.indexer
                             : std::inner_product(y.begin(), y.end(), weights.begin(), 0.0);
    };
    for (const std::string& name : harness.Names()) {
      const std::vector<double> gradient = harness.Gradient(name);
      std::vector<double> weight = harness.Weight(name);
      EXPECT_GT(*std::max_element(gradient.begin(), gradient.end()), 0) << name;  // D11
      for (size_t i = 0; i < weight.size(); i += 1 + weight.size() / 6) {
        const double kept = weight[i];
        weight[i] = kept + kStep;
        harness.SetWeight(name, weight);
        const double up = loss(name);
        weight[i] = kept - kStep;
        harness.SetWeight(name, weight);
        const double down = loss(name);
        weight[i] = kept;
        harness.SetWeight(name, weight);
        ASSERT_NEAR((up - down) / (2 * kStep), gradient[i], 5e-8)
            << sizes.name << ' ' << name << ' ' << i;
      }
    }
    // Without the indexer's loss nothing changes but the indexer's gradients, which vanish.
    MlaHarness without(DsaMlaConfigOf(sizes, kTopK), at::kDouble);
    without.Forward(lengths, h);
    without.Backward(lengths, h, g);
    for (const std::string& name : harness.Names()) {
      const std::vector<double> gradient = without.Gradient(name);
      if (OfIndexer(name)) {
        EXPECT_TRUE(std::ranges::all_of(gradient, [](double v) { return v == 0; })) << name;
      } else {
        EXPECT_EQ(gradient, harness.Gradient(name)) << name;
      }
    }
  }
}

TEST(DsaMla, C10RecomputationRepeatsTheSelectionAndCountsOnce) {
  const Lengths lengths = {40, 0, 9};
  for (const bool warmup : {false, true}) {
    for (const at::ScalarType type : {at::kDouble, at::kBFloat16}) {
      const heddle::v1::ModelConfig config = DsaMlaConfigOf(kKinds[1], kTopK);
      MlaHarness kept(config, type);
      MlaHarness recomputed(config, type);
      const StepInfo step = Training(49, warmup);
      LayerLosses once, twice;
      const at::Tensor h = Inputs(kept, 49);
      const at::Tensor g = Inputs(kept, 49, 0.9);
      const at::Tensor y = kept.Forward(lengths, h, {.step = &step, .losses = &once});
      EXPECT_EQ(Values(recomputed.Forward(
                    lengths, h, {.pass = Pass::kSelect, .step = &step, .losses = &twice})),
                Values(y));
      recomputed.Forward(
          lengths, h,
          {.pass = Pass::kRecompute, .step = &step, .losses = &twice, .want_out = false});
      EXPECT_EQ(once.indexer, twice.indexer);
      EXPECT_EQ(Values(kept.Backward(lengths, h, g, &step)),
                Values(recomputed.Backward(lengths, h, g, &step)));
      for (const std::string& name : kept.Names()) {
        EXPECT_EQ(kept.Gradient(name), recomputed.Gradient(name)) << name;
      }
    }
  }
}

// M4: decoding selects what the forward selected and attends to those rows of the cache in absorbed
// form.
TEST(DsaMla, M4DecodeEqualsPrefillAtEveryPosition) {
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(DsaMlaConfigOf(sizes, kTopK), at::kDouble);
    const at::Tensor h = Inputs(harness, 19);
    CacheRows rows;
    const at::Tensor y = harness.Forward({19}, h, {.pass = Pass::kInference, .rows = &rows});
    EXPECT_EQ(rows.index_k.sizes(), (std::vector<int64_t>{19, 8}));
    const at::Tensor cache = at::cat({rows.latent, rows.rotary_k}, 1);
    const AbsorbedMla absorbed(harness.config(), harness.storage(), harness.ropes());
    const MlaShape& shape = absorbed.shape();
    DsaIndexer indexer(harness.config(), harness.storage(), harness.ropes(), shape.rotary, nullptr);
    layers::BufferPool pool;
    for (int32_t t = 0; t < 19; ++t) {
      pool.Release(0);
      const std::vector<int32_t> position = {t};
      const at::Tensor x = h.narrow(0, t, 1);
      const AbsorbedMla::Tokens token = absorbed.Project(x, position, &pool);
      const IndexRows index = indexer.Project(position, token.indexer_u_BU, x, &pool);
      const std::vector<int32_t> selected =
          indexer.SelectCached(index, 0, {rows.index_k.narrow(0, 0, t + 1)});
      ASSERT_EQ(selected.size(), static_cast<size_t>(std::min(t + 1, kTopK)));
      const at::Tensor gathered = cache.index_select(0, at::tensor(selected, at::kInt));
      const at::Tensor z = at::empty({1, shape.heads, shape.latent}, x.options());
      absorbed.Attend(token.query_BHL[0], gathered, z[0]);
      const at::Tensor out = at::zeros({1, x.size(1)}, x.options());
      absorbed.Output(z, out, &pool, out);
      EXPECT_LE(MaxDifference(out[0], y[t]), 1e-12) << sizes.name << ' ' << t;
    }
  }
}

// D12 on MLA: the indexer rotates dr dims in half layout beside an interleaved core.
TEST(DsaMla, D12TheIndexerRotatesInHalfLayout) {
  MlaHarness harness(DsaMlaConfigOf(kKinds[0], kTopK), at::kDouble);
  const at::Tensor h = Inputs(harness, 6);
  CacheRows rows;
  harness.Forward({6}, h, {.pass = Pass::kInference, .rows = &rows});
  // Position 0 is not rotated: the same input at position 5 shows what the rotation did.
  const at::Tensor repeated = h.narrow(0, 0, 1).expand({6, h.size(1)}).contiguous();
  harness.Forward({6}, repeated, {.pass = Pass::kInference, .rows = &rows});
  const std::vector<double> still = Values(rows.index_k[0]);
  const std::vector<double> turned = Values(rows.index_k[5]);
  const std::vector<double> inverse = {1.0, 1e-2};  // theta 1e4, 4 dims
  for (size_t i = 0; i < 2; ++i) {
    const double c = std::cos(5 * inverse[i]), s = std::sin(5 * inverse[i]);
    EXPECT_NEAR(turned[i], still[i] * c - still[i + 2] * s, 1e-12);
    EXPECT_NEAR(turned[i + 2], still[i + 2] * c + still[i] * s, 1e-12);
  }
  for (size_t i = 4; i < 8; ++i) EXPECT_NEAR(turned[i], still[i], 1e-12);
}

}  // namespace
}  // namespace heddle::attention
