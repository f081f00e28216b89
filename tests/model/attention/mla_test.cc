#include "model/attention/mla_layer.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "kernels/attention/reference.h"
#include "model/attention/mla_absorbed.h"
#include "model/attention/mla_projection.h"
#include "tests/model/attention/mla_harness.h"
#include "tests/model/golden.h"

namespace heddle::attention {
namespace {

using layers::CacheRows;
using layers::Pass;
using model_test::Gen;
using model_test::Summarize;

using Lengths = std::vector<int32_t>;

// With and without a query latent, both norms, values narrower than, as wide as and wider than
// keys.
const std::vector<MlaSizes> kKinds = {
    {.name = "plain"},
    {.name = "query latent", .value = 8, .query_latent = 5},
    {.name = "layernorm", .heads = 3, .nope = 2, .rotary = 6, .layernorm = true},
    {.name = "all", .heads = 1, .value = 11, .latent = 9, .query_latent = 7, .layernorm = true}};

at::Tensor Inputs(const MlaHarness& harness, int64_t rows, double phase = 0.7) {
  const int64_t d = harness.config().d_model();
  return Matrix(Gen(rows * d, phase), d, harness.type());
}

int64_t Sum(const Lengths& lengths) { return std::accumulate(lengths.begin(), lengths.end(), 0L); }

double MaxDifference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= worst)) worst = difference;
  }
  return worst;
}
double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return MaxDifference(Values(a), Values(b));
}
double Largest(const std::vector<double>& values) {
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

// f's gradient at x, by central differences, along one direction that moves every element and along
// a few single elements.
void ExpectGradient(const std::vector<double>& x, const std::vector<double>& gradient,
                    const std::string& what,
                    const std::function<double(const std::vector<double>&)>& f) {
  constexpr double kStep = 1e-5;
  const auto check = [&](const std::vector<double>& direction) {
    std::vector<double> up = x, down = x;
    double expected = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      up[i] += kStep * direction[i];
      down[i] -= kStep * direction[i];
      expected += gradient[i] * direction[i];
    }
    ASSERT_NEAR((f(up) - f(down)) / (2 * kStep), expected, 5e-8) << what;
  };
  check(Gen(static_cast<int64_t>(x.size()), 0.2));
  for (size_t i = 0; i < x.size(); i += 1 + x.size() / 5) {
    std::vector<double> unit(x.size(), 0.0);
    unit[i] = 1.0;
    check(unit);
  }
}

// ---- Values -------------------------------------------------------------------------------------

// attention-and-moe.md section 14.
TEST(Mla, GoldenOutput) {
  MlaHarness harness({.name = "golden"});
  harness.SetWeight("self_attn.q_proj.weight", Transposed(Gen(12 * 16, 0.15, 0.3), 12));
  harness.SetWeight("self_attn.kv_a_proj_with_mqa.weight", Transposed(Gen(12 * 10, 0.25, 0.3), 12));
  harness.SetWeight("self_attn.kv_a_layernorm.weight", std::vector<double>(6, 1.0));
  harness.SetWeight("self_attn.kv_b_proj.weight", Transposed(Gen(6 * 14, 0.35, 0.3), 6));
  harness.SetWeight("self_attn.o_proj.weight", Transposed(Gen(6 * 12, 0.45, 0.3), 6));
  const at::Tensor y = harness.Forward({40}, Inputs(harness, 40));
  const model_test::Summary got = Summarize(Values(y));
  EXPECT_NEAR(got.sum, -0.07154422661365, 1e-12);
  EXPECT_NEAR(got.sum_of_squares, 0.07324584503922, 1e-12);
  EXPECT_NEAR(got.first, -0.0070072675588, 1e-12);
  EXPECT_NEAR(got.last, -0.00397451654649, 1e-12);
}

// C9: zero-length documents, single tokens, batches without any row.
TEST(Mla, C9EqualsTheReferenceOnRaggedBatches) {
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(sizes);
    for (const Lengths& lengths :
         std::vector<Lengths>{{17}, {1}, {0, 3, 0, 1, 0}, {5, 2, 9}, {0}, {0, 0}}) {
      const at::Tensor h = Inputs(harness, Sum(lengths));
      const std::vector<double> expected = ReferenceMla(harness, lengths, Values(h));
      EXPECT_LE(MaxDifference(Values(harness.Forward(lengths, h)), expected), 1e-12) << sizes.name;
      const at::Tensor dh = harness.Backward(lengths, h, Inputs(harness, Sum(lengths), 0.9));
      EXPECT_TRUE(std::isfinite(Largest(Values(dh)))) << sizes.name;
    }
  }
}

TEST(Mla, EqualsTheReferenceForRandomShapes) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RngCursor random(Rng(seed, "test.mla"));
    const auto draw = [&](uint64_t low, uint64_t high) {
      return static_cast<int32_t>(low + random.Below(high - low + 1));
    };
    MlaSizes sizes;
    sizes.d = draw(1, 20);
    sizes.heads = draw(1, 4);
    sizes.nope = draw(1, 9);
    sizes.rotary = 2 * draw(1, 4);
    sizes.value = draw(1, 18);
    sizes.latent = draw(2, 15);
    sizes.query_latent = draw(0, 1) * draw(2, 9);
    sizes.layernorm = draw(0, 1) == 1;
    MlaHarness harness(sizes);
    Lengths lengths;
    for (int32_t b = draw(1, 5); b > 0; --b) lengths.push_back(draw(0, 12));
    const at::Tensor h = Inputs(harness, Sum(lengths));
    EXPECT_LE(MaxDifference(Values(harness.Forward(lengths, h)),
                            ReferenceMla(harness, lengths, Values(h))),
              1e-11);
  }
}

// Normal values that keep a product of `columns` terms near 1.
std::vector<double> RandomWeight(size_t count, int64_t columns, const std::string& name) {
  const Rng rng(3, name);
  std::vector<double> values;
  for (size_t i = 0; i < count; ++i) {
    values.push_back(rng.NormalAt(i) / std::sqrt(static_cast<double>(columns)));
  }
  return values;
}

// Widths of the presets, which take the bf16 kernel, padded or not; documents around its tiles.
TEST(Mla, LowerPrecisionsFollowFp64ForwardAndBackward) {
  const std::vector<MlaSizes> presets = {{"tiny", 48, 2, 32, 32, 64, 32, 0, false},
                                         {"small", 48, 2, 64, 32, 64, 32, 24, false},
                                         {"swa-mla", 48, 1, 128, 64, 128, 64, 0, true},
                                         {"odd", 48, 2, 10, 6, 12, 20, 0, false}};
  const Lengths lengths = {70, 0, 1, 130};
  for (const MlaSizes& sizes : presets) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      MlaHarness harness(sizes, type);
      MlaHarness exact(sizes, at::kDouble);
      for (const std::string& name : harness.Names()) {
        if (name.find("proj") != std::string::npos) {
          harness.SetWeight(name, RandomWeight(harness.Weight(name).size(), sizes.d, name));
        }
        exact.SetWeight(name, harness.Weight(name));
      }
      const at::Tensor h = Inputs(harness, 201);
      const at::Tensor g = Inputs(harness, 201, 0.9);
      const at::Tensor wide_h = h.to(at::kDouble);
      const double tolerance = type == at::kFloat ? 2e-5 : 6e-2;
      const auto check = [&](const std::vector<double>& got, const std::vector<double>& expected,
                             const std::string& what) {
        EXPECT_LE(MaxDifference(got, expected), tolerance * Largest(expected))
            << sizes.name << ' ' << what << " bits " << (type == at::kFloat ? 32 : 16);
      };
      check(Values(harness.Forward(lengths, h)), Values(exact.Forward(lengths, wide_h)), "out");
      check(Values(harness.Backward(lengths, h, g)),
            Values(exact.Backward(lengths, wide_h, g.to(at::kDouble))), "dh");
      for (const std::string& name : harness.Names()) {
        check(harness.Gradient(name), exact.Gradient(name), name);
      }
    }
  }
}

// M3: without a rotated part, with the latent as wide as the model and the identity as its map,
// MLA is multi-head attention. Rows of mean square 1 pass the norm unchanged.
TEST(Mla, M3ReducesToMultiHeadAttention) {
  const MlaSizes sizes{
      .name = "mha", .d = 8, .heads = 2, .nope = 4, .rotary = 0, .value = 4, .latent = 8};
  heddle::v1::ModelConfig config = MlaConfigOf(sizes);
  config.set_norm_eps(1e-300);
  MlaHarness harness(config, at::kDouble);
  std::vector<double> identity(64, 0.0);
  for (size_t i = 0; i < 8; ++i) identity[9 * i] = 1.0;
  harness.SetWeight("self_attn.kv_a_proj_with_mqa.weight", identity);
  harness.SetWeight("self_attn.kv_a_layernorm.weight", std::vector<double>(8, 1.0));
  std::vector<double> up;  // identity for keys and values of both heads
  for (size_t head = 0; head < 2; ++head) {
    for (int repeat = 0; repeat < 2; ++repeat) {
      const auto begin = identity.begin() + static_cast<long>(32 * head);
      up.insert(up.end(), begin, begin + 32);
    }
  }
  harness.SetWeight("self_attn.kv_b_proj.weight", up);
  harness.SetWeight("self_attn.q_proj.weight", identity);
  harness.SetWeight("self_attn.o_proj.weight", identity);

  const Lengths lengths = {6, 11};
  std::vector<double> x = Gen(17 * 8, 0.7);
  for (size_t row = 0; row < 17; ++row) {
    double squares = 0;
    for (size_t i = 0; i < 8; ++i) squares += x[8 * row + i] * x[8 * row + i] / 8;
    for (size_t i = 0; i < 8; ++i) x[8 * row + i] /= std::sqrt(squares);
  }
  const std::vector<int32_t> cu = {0, 6, 17};
  const kernels::attention::Shape shape{.heads = 2,
                                        .kv_heads = 2,
                                        .key_dim = 4,
                                        .value_dim = 4,
                                        .documents = 2,
                                        .cu_seqlens = cu.data(),
                                        .scale = 0.5};
  std::vector<double> expected(x.size()), lse(34);
  ReferenceForward(shape, x.data(), x.data(), x.data(), expected.data(), lse.data());
  EXPECT_LE(MaxDifference(Values(harness.Forward(lengths, Matrix(x, 8, at::kDouble))), expected),
            1e-12);
}

// R3 on this layer: the rotary columns of stored weights belong to one layout.
TEST(Mla, R3HalfLayoutIsThePermutedInterleavedOne) {
  const MlaSizes sizes{.name = "layout", .rotary = 6};
  MlaHarness interleaved(sizes);
  heddle::v1::ModelConfig config = MlaConfigOf(sizes);
  config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_HALF);
  MlaHarness half(config, at::kDouble);
  const at::Tensor h = Inputs(half, 20);
  const at::Tensor y = interleaved.Forward({20}, h);
  EXPECT_GE(MaxDifference(y, half.Forward({20}, h)), 1e-3);
  // Rows [first, first + 6) of a weight with 12 columns: pairs (2i, 2i+1) move to (i, i+3).
  const auto permute = [](std::vector<double>* weight, size_t first) {
    const std::vector<double> from = *weight;
    for (size_t i = 0; i < 6; ++i) {
      const size_t source = i < 3 ? 2 * i : 2 * (i - 3) + 1;
      std::copy_n(from.begin() + static_cast<long>((first + source) * 12), 12,
                  weight->begin() + static_cast<long>((first + i) * 12));
    }
  };
  std::vector<double> query = half.Weight("self_attn.q_proj.weight");
  std::vector<double> down = half.Weight("self_attn.kv_a_proj_with_mqa.weight");
  permute(&query, 4);
  permute(&query, 14);
  permute(&down, 6);
  half.SetWeight("self_attn.q_proj.weight", query);
  half.SetWeight("self_attn.kv_a_proj_with_mqa.weight", down);
  EXPECT_LE(MaxDifference(y, half.Forward({20}, h)), 1e-13);
}

TEST(Mla, YarnScalesTheSoftmaxAndTheFrequencies) {
  heddle::v1::ModelConfig config =
      MlaConfigOf({.name = "yarn", .nope = 128, .rotary = 64, .value = 5});
  heddle::v1::RopeScalingConfig* scaling = config.mutable_rope()->mutable_scaling();
  scaling->set_type(heddle::v1::RopeScalingConfig::TYPE_YARN);
  scaling->set_factor(40);
  scaling->set_original_max_position_embeddings(4096);
  config.set_max_position_embeddings(163840);
  MlaHarness harness(config, at::kDouble);
  const MlaShape shape = MlaShapeOf(config, harness.ropes()->Tables(64));
  EXPECT_NEAR(shape.scale, 1.3688879454113936 * 1.3688879454113936 / std::sqrt(192.0), 1e-15);
  const at::Tensor h = Inputs(harness, 30);
  const at::Tensor y = harness.Forward({30}, h);
  EXPECT_LE(MaxDifference(Values(y), ReferenceMla(harness, {30}, Values(h))), 1e-12);
  config.set_max_position_embeddings(4096);  // within the original length: no scaling at all
  MlaHarness plain(config, at::kDouble);
  EXPECT_NEAR(MlaShapeOf(config, plain.ropes()->Tables(64)).scale, 1 / std::sqrt(192.0), 1e-15);
  EXPECT_GE(MaxDifference(y, plain.Forward({30}, h)), 1e-4);
}

// The layer finds every tensor of the model's plan, and uses every one.
TEST(Mla, TakesTheTensorsOfTheModelPlan) {
  std::vector<heddle::v1::ModelConfig> configs;
  for (const MlaSizes& sizes : kKinds) {
    configs.push_back(MlaConfigOf(sizes));
    configs.push_back(DsaMlaConfigOf(sizes, 4));
  }
  for (const heddle::v1::ModelConfig& config : configs) {
    const StatusOr<model::ModelPlan> plan = model::PlanModel(config);
    ASSERT_TRUE(plan.ok()) << plan.status();
    const MlaHarness harness(config, at::kDouble);
    size_t of_attention = 0;
    for (const model::TensorSpec& spec : plan->tensors) {
      if (spec.name.find("self_attn.") != std::string::npos) ++of_attention;
    }
    EXPECT_EQ(of_attention, harness.plan().tensors.size());
    for (const model::TensorSpec& spec : harness.plan().tensors) {
      const model::TensorSpec* planned = plan->Find(spec.name);
      ASSERT_NE(planned, nullptr) << spec.name;
      EXPECT_EQ(planned->shape, spec.shape) << spec.name;
    }
  }
}

// ---- Properties ---------------------------------------------------------------------------------

TEST(Mla, C1PrefixesAreConsistent) {
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(sizes);
    const at::Tensor h = Inputs(harness, 14);
    const at::Tensor full = harness.Forward({14}, h);
    for (int32_t t = 1; t < 14; ++t) {
      EXPECT_LE(MaxDifference(harness.Forward({t}, h.narrow(0, 0, t)), full.narrow(0, 0, t)), 1e-12)
          << sizes.name << ' ' << t;
    }
  }
}

TEST(Mla, C2PackedEqualsAloneForwardAndBackward) {
  const Lengths lengths = {4, 0, 7, 1};
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness packed(sizes);
    MlaHarness alone(sizes);
    const at::Tensor h = Inputs(packed, 12);
    const at::Tensor g = Inputs(packed, 12, 0.9);
    const at::Tensor y = packed.Forward(lengths, h);
    const at::Tensor dh = packed.Backward(lengths, h, g);
    int64_t first = 0;
    for (const int32_t length : lengths) {
      const at::Tensor part = h.narrow(0, first, length);
      EXPECT_LE(MaxDifference(alone.Forward({length}, part), y.narrow(0, first, length)), 1e-12);
      EXPECT_LE(MaxDifference(alone.Backward({length}, part, g.narrow(0, first, length)),
                              dh.narrow(0, first, length)),
                1e-12)
          << sizes.name;
      first += length;
    }
    for (const std::string& name : packed.Names()) {
      EXPECT_LE(MaxDifference(packed.Gradient(name), alone.Gradient(name)), 1e-11) << name;
    }
  }
}

TEST(Mla, C4PermutingDocumentsPermutesOutputs) {
  MlaHarness harness(kKinds[1]);
  const at::Tensor h = Inputs(harness, 9);
  const at::Tensor y = harness.Forward({4, 5}, h);
  const auto swapped = [](const at::Tensor& t) {
    return at::cat({t.narrow(0, 4, 5), t.narrow(0, 0, 4)});
  };
  EXPECT_LE(MaxDifference(harness.Forward({5, 4}, swapped(h)), swapped(y)), 1e-13);
}

// Products of matrices are LibTorch's: threads may change them in bf16 and fp32, repetition may
// not.
TEST(Mla, C5RepeatsItselfBitwise) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    MlaHarness harness({"bits", 64, 4, 32, 32, 64, 32, 16, true}, type);
    const Lengths lengths = {150, 3, 70};
    const at::Tensor h = Inputs(harness, 223);
    const at::Tensor g = Inputs(harness, 223, 0.9);
    std::vector<std::vector<double>> runs;
    for (int run = 0; run < 2; ++run) {
      harness.ZeroGradients();
      std::vector<double> all = Values(harness.Forward(lengths, h));
      const std::vector<double> dh = Values(harness.Backward(lengths, h, g));
      all.insert(all.end(), dh.begin(), dh.end());
      for (const std::string& name : harness.Names()) {
        const std::vector<double> dw = harness.Gradient(name);
        all.insert(all.end(), dw.begin(), dw.end());
      }
      runs.push_back(std::move(all));
    }
    EXPECT_EQ(runs[0], runs[1]);
  }
}

TEST(Mla, C7TheFutureChangesNoBitOfThePast) {
  for (const MlaSizes& sizes : kKinds) {
    for (const at::ScalarType type : {at::kDouble, at::kBFloat16}) {
      MlaHarness harness(sizes, type);
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

// dh, and the gradients that the harness holds, are the slopes of `loss`.
void ExpectLayerGradients(const MlaSizes& sizes, MlaHarness* harness, const at::Tensor& h,
                          const std::vector<double>& dh,
                          const std::function<double(const at::Tensor&)>& loss) {
  ExpectGradient(Values(h), dh, sizes.name + " h", [&](const std::vector<double>& x) {
    return loss(Matrix(x, sizes.d, at::kDouble));
  });
  for (const std::string& name : harness->Names()) {
    const std::vector<double> weight = harness->Weight(name);
    ExpectGradient(weight, harness->Gradient(name), sizes.name + ' ' + name,
                   [&](const std::vector<double>& w) {
                     harness->SetWeight(name, w);
                     return loss(h);
                   });
    harness->SetWeight(name, weight);
  }
}

// Along a direction that moves every element, and along single elements.
TEST(Mla, C8GradientsAreThoseOfCentralDifferences) {
  const Lengths lengths = {5, 0, 1, 3};
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(sizes);
    const at::Tensor h = Inputs(harness, 9);
    const at::Tensor g = Inputs(harness, 9, 0.9);
    harness.Forward(lengths, h);
    const std::vector<double> dh = Values(harness.Backward(lengths, h, g));
    const auto loss = [&](const at::Tensor& input) {
      const std::vector<double> y = Values(harness.Forward(lengths, input));
      const std::vector<double> weight = Values(g);
      return std::inner_product(y.begin(), y.end(), weight.begin(), 0.0);
    };
    ExpectLayerGradients(sizes, &harness, h, dh, loss);
  }
}

TEST(Mla, C10RecomputationChangesNoBit) {
  const Lengths lengths = {40, 0, 9};
  for (const MlaSizes& sizes : kKinds) {
    for (const at::ScalarType type : {at::kDouble, at::kBFloat16}) {
      MlaHarness kept(sizes, type);
      MlaHarness recomputed(sizes, type);
      const at::Tensor h = Inputs(kept, 49);
      const at::Tensor g = Inputs(kept, 49, 0.9);
      const at::Tensor y = kept.Forward(lengths, h);
      EXPECT_EQ(Values(recomputed.Forward(lengths, h, {.pass = Pass::kSelect})), Values(y));
      recomputed.Forward(lengths, h, {.pass = Pass::kRecompute, .want_out = false});
      EXPECT_EQ(Values(kept.Backward(lengths, h, g)), Values(recomputed.Backward(lengths, h, g)));
      for (const std::string& name : kept.Names()) {
        EXPECT_EQ(kept.Gradient(name), recomputed.Gradient(name)) << sizes.name << ' ' << name;
      }
      EXPECT_EQ(Values(kept.Forward(lengths, h, {.pass = Pass::kInference})), Values(y));
    }
  }
}

// ---- Absorbed form ------------------------------------------------------------------------------

// out of tokens [first, first + count) of one document against rows [0, t] of its cache.
at::Tensor DecodeRow(const AbsorbedMla& absorbed, const AbsorbedMla::Tokens& tokens, int64_t b,
                     const at::Tensor& rows) {
  const MlaShape& shape = absorbed.shape();
  const at::Tensor z = at::empty({1, shape.heads, shape.latent}, rows.options());
  absorbed.Attend(tokens.query_BHL[b], rows, z[0]);
  return z;
}

at::Tensor JoinRows(const at::Tensor& latent, const at::Tensor& rotary) {
  return at::cat({latent, rotary}, 1);
}

// M1 and C3: at every position the absorbed form over the rows cached by the naive forward gives
// the naive output; so does a cache that decoding filled itself (M4).
void ExpectAbsorbedEqualsNaive(const heddle::v1::ModelConfig& config, at::ScalarType type,
                               double tolerance) {
  MlaHarness harness(config, type);
  const at::Tensor h = Inputs(harness, 23);
  CacheRows rows;
  const at::Tensor y = harness.Forward({23}, h, {.pass = Pass::kInference, .rows = &rows});
  const at::Tensor prefilled = JoinRows(rows.latent, rows.rotary_k);
  const AbsorbedMla absorbed(config, harness.storage(), harness.ropes());
  at::Tensor own = at::empty({0, absorbed.row_width()}, h.options());
  layers::BufferPool pool;
  for (int32_t t = 0; t < 23; ++t) {
    pool.Release(0);
    const std::vector<int32_t> position = {t};
    const at::Tensor x = h.narrow(0, t, 1);
    const AbsorbedMla::Tokens token = absorbed.Project(x, position, &pool);
    own = at::cat({own, JoinRows(token.latent_BC, token.rotary_BR)});
    EXPECT_LE(MaxDifference(own[t], prefilled[t]), tolerance);
    for (const at::Tensor& cache : {prefilled.narrow(0, 0, t + 1), own}) {
      const at::Tensor out = at::zeros({1, x.size(1)}, x.options());
      absorbed.Output(DecodeRow(absorbed, token, 0, cache), out, &pool, out);
      EXPECT_LE(MaxDifference(out[0], y[t]), tolerance * std::max(1.0, Largest(Values(y)))) << t;
    }
  }
}

TEST(Mla, M1AbsorbedEqualsNaiveAtEveryPosition) {
  for (const MlaSizes& sizes : kKinds) {
    ExpectAbsorbedEqualsNaive(MlaConfigOf(sizes), at::kDouble, 1e-12);
    ExpectAbsorbedEqualsNaive(MlaConfigOf(sizes), at::kFloat, 1e-5);
  }
  ExpectAbsorbedEqualsNaive(MlaConfigOf({"tiny", 48, 4, 32, 32, 64, 32, 0, false}), at::kBFloat16,
                            3e-2);
}

// M1, gradients: the derivative of the absorbed form, which has no backward of its own, is what the
// naive backward computes, for the input and for every weight.
TEST(Mla, M1NaiveGradientsAreThoseOfTheAbsorbedForm) {
  constexpr int32_t kTokens = 6;
  for (const MlaSizes& sizes : kKinds) {
    MlaHarness harness(sizes);
    const at::Tensor h = Inputs(harness, kTokens);
    const std::vector<double> g = Values(Inputs(harness, kTokens, 0.9));
    harness.Forward({kTokens}, h);
    const std::vector<double> dh =
        Values(harness.Backward({kTokens}, h, Matrix(g, sizes.d, at::kDouble)));
    const auto loss = [&](const at::Tensor& input) {
      const AbsorbedMla absorbed(harness.config(), harness.storage(), harness.ropes());
      at::Tensor cache = at::empty({0, absorbed.row_width()}, input.options());
      layers::BufferPool pool;
      double sum = 0;
      for (int32_t t = 0; t < kTokens; ++t) {
        pool.Release(0);
        const std::vector<int32_t> position = {t};
        const AbsorbedMla::Tokens token = absorbed.Project(input.narrow(0, t, 1), position, &pool);
        cache = at::cat({cache, JoinRows(token.latent_BC, token.rotary_BR)});
        const at::Tensor out = at::zeros({1, sizes.d}, input.options());
        absorbed.Output(DecodeRow(absorbed, token, 0, cache), out, &pool, out);
        const std::vector<double> y = Values(out);
        sum += std::inner_product(y.begin(), y.end(), g.begin() + t * sizes.d, 0.0);
      }
      return sum;
    };
    ExpectLayerGradients(sizes, &harness, h, dh, loss);
  }
}

// M4: a batch of sequences of unequal length, each at its own position.
TEST(Mla, M4DecodesABatchOfUnequalSequences) {
  const MlaSizes& sizes = kKinds[1];
  MlaHarness harness(sizes);
  const Lengths lengths = {5, 1, 9};
  const at::Tensor h = Inputs(harness, 15);
  CacheRows rows;
  const at::Tensor y = harness.Forward(lengths, h, {.pass = Pass::kInference, .rows = &rows});
  const at::Tensor cache = JoinRows(rows.latent, rows.rotary_k);
  const AbsorbedMla absorbed(harness.config(), harness.storage(), harness.ropes());
  // The last token of each.
  const std::vector<int32_t> positions = {4, 0, 8};
  const at::Tensor last = at::cat({h.narrow(0, 4, 1), h.narrow(0, 5, 1), h.narrow(0, 14, 1)});
  layers::BufferPool pool;
  const AbsorbedMla::Tokens tokens = absorbed.Project(last, positions, &pool);
  EXPECT_EQ(tokens.indexer_u_BU.size(1), sizes.query_latent);
  std::vector<at::Tensor> z;
  int64_t first = 0;
  for (int64_t b = 0; b < 3; ++b) {
    const int64_t length = lengths[static_cast<size_t>(b)];
    z.push_back(DecodeRow(absorbed, tokens, b, cache.narrow(0, first, length)));
    first += length;
  }
  const at::Tensor out = at::empty(last.sizes(), last.options());
  absorbed.Output(at::cat(z), last, &pool, out);
  const at::Tensor expected = at::cat({y.narrow(0, 4, 1), y.narrow(0, 5, 1), y.narrow(0, 14, 1)});
  EXPECT_LE(MaxDifference(out.sub(last), expected), 1e-12);
}

// The cost of a step must not hold an up-projection of the cache: attention over the rows reads no
// weight at all.
TEST(Mla, AbsorbedAttentionReadsNoWeights) {
  MlaHarness harness(kKinds[0]);
  const at::Tensor h = Inputs(harness, 12);
  CacheRows rows;
  harness.Forward({12}, h, {.pass = Pass::kInference, .rows = &rows});
  const at::Tensor cache = JoinRows(rows.latent, rows.rotary_k).clone();
  const AbsorbedMla absorbed(harness.config(), harness.storage(), harness.ropes());
  layers::BufferPool pool;
  const std::vector<int32_t> position = {11};
  const AbsorbedMla::Tokens token = absorbed.Project(h.narrow(0, 11, 1), position, &pool);
  const at::Tensor z = DecodeRow(absorbed, token, 0, cache);
  for (const std::string& name : harness.Names()) {
    harness.SetWeight(name, std::vector<double>(harness.Weight(name).size(), std::nan("")));
  }
  EXPECT_EQ(Values(DecodeRow(absorbed, token, 0, cache)), Values(z));
}

// M2, C13: dc + dr values per token, however many heads.
TEST(Mla, M2CachesLatentAndRotaryPartOnly) {
  for (const int32_t heads : {1, 4}) {
    MlaHarness harness({.name = "cache", .heads = heads});
    const at::Tensor h = Inputs(harness, 8);
    CacheRows rows;
    harness.Forward({5, 3}, h, {.pass = Pass::kInference, .rows = &rows});
    EXPECT_EQ(rows.latent.sizes(), (std::vector<int64_t>{8, 6}));
    EXPECT_EQ(rows.rotary_k.sizes(), (std::vector<int64_t>{8, 4}));
    for (const at::Tensor& other : {rows.k, rows.v, rows.raw_k, rows.raw_v, rows.index_k}) {
      EXPECT_FALSE(other.defined());
    }
    const AbsorbedMla absorbed(harness.config(), harness.storage(), harness.ropes());
    EXPECT_EQ(absorbed.row_width(), 10);
  }
}

}  // namespace
}  // namespace heddle::attention
