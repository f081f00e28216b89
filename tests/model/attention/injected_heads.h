// A layer that computes on the q, k, v of section 14 exactly: its input rows are [h | one-hot], so
// that projections of the one-hot part place any values, and h (12 columns) feeds the indexer and
// the gates as the golden values want it. The output projection is the identity.
#pragma once

#include <string>
#include <vector>

#include "tests/model/attention/layer_harness.h"
#include "tests/model/golden.h"

namespace heddle::model_test {

inline constexpr int32_t kInjectedRows = 40;
inline constexpr int64_t kInjectedHidden = 12;
inline constexpr int64_t kInjectedWidth = kInjectedHidden + kInjectedRows;
inline constexpr int64_t kInjectedHeads = 4;
inline constexpr int64_t kInjectedDim = 8;

inline heddle::v1::ModelConfig InjectedConfig() {
  heddle::v1::ModelConfig config = SmallModel(kInjectedWidth);
  config.set_n_heads(kInjectedHeads);
  config.set_n_kv_heads(2);
  config.set_head_dim(kInjectedDim);
  return config;
}

inline at::Tensor InjectedInput() {
  at::Tensor x = at::zeros({kInjectedRows, kInjectedWidth}, at::kDouble);
  x.narrow(1, 0, kInjectedHidden)
      .copy_(
          FromVector(Gen(kInjectedRows * kInjectedHidden, 0.7), {kInjectedRows, kInjectedHidden}));
  for (int64_t t = 0; t < kInjectedRows; ++t) x[t][kInjectedHidden + t] = 1.0;
  return x;
}

// gen([heads, 40, 8], phase) as the weight [heads 8, 52] that gives it on the one-hot part.
inline at::Tensor InjectedHeads(int64_t heads, double phase) {
  const at::Tensor rows = FromVector(SwapHeads(Gen(heads * kInjectedRows * kInjectedDim, phase),
                                               heads, kInjectedRows, kInjectedDim),
                                     {kInjectedRows, heads * kInjectedDim});
  at::Tensor weight = at::zeros({heads * kInjectedDim, kInjectedWidth}, at::kDouble);
  weight.narrow(1, kInjectedHidden, kInjectedRows).copy_(rows.t());
  return weight;
}

// A matrix gen([12, out], phase, scale), [in, out], on the hidden part.
inline at::Tensor InjectedMatrix(int64_t out, double phase, double scale = 0.3) {
  at::Tensor weight = at::zeros({out, kInjectedWidth}, at::kDouble);
  weight.narrow(1, 0, kInjectedHidden)
      .copy_(FromVector(Gen(kInjectedHidden * out, phase, scale), {kInjectedHidden, out}).t());
  return weight;
}

inline void InjectHeads(LayerHarness* harness) {
  harness->Set("self_attn.q_proj.weight", InjectedHeads(kInjectedHeads, 0.3));
  harness->Set("self_attn.k_proj.weight", InjectedHeads(2, 1.1));
  harness->Set("self_attn.v_proj.weight", InjectedHeads(2, 2.0));
  const at::Tensor o = harness->Weight("self_attn.o_proj.weight");
  o.zero_();
  for (int64_t i = 0; i < o.size(1); ++i) o[i][i] = 1.0;
}

inline void InjectIndexer(LayerHarness* harness) {
  harness->Set("self_attn.indexer.q_proj.weight", InjectedMatrix(12, 0.4));
  harness->Set("self_attn.indexer.k_proj.weight", InjectedMatrix(4, 1.3));
  harness->Set("self_attn.indexer.weights_proj.weight", InjectedMatrix(3, 2.2));
}

// dL/dout for dL/do = gen([4, 40, 8], 0.9).
inline at::Tensor InjectedOutputGradient() {
  at::Tensor dout = at::zeros({kInjectedRows, kInjectedWidth}, at::kDouble);
  dout.narrow(1, 0, kInjectedHeads * kInjectedDim)
      .copy_(FromVector(SwapHeads(Gen(kInjectedHeads * kInjectedRows * kInjectedDim, 0.9),
                                  kInjectedHeads, kInjectedRows, kInjectedDim),
                        {kInjectedRows, kInjectedHeads * kInjectedDim}));
  return dout;
}

// The layer's output as [Hq, T, D].
inline std::vector<double> InjectedOutput(const at::Tensor& out) {
  return SwapHeads(ToVector(out.narrow(1, 0, kInjectedHeads * kInjectedDim)), kInjectedRows,
                   kInjectedHeads, kInjectedDim);
}

inline void ExpectSummary(const std::vector<double>& values, const Summary& golden) {
  const Summary got = Summarize(values);
  EXPECT_NEAR(got.sum, golden.sum, 1e-9);
  EXPECT_NEAR(got.sum_of_squares, golden.sum_of_squares, 1e-9);
  EXPECT_NEAR(got.first, golden.first, 1e-12);
  EXPECT_NEAR(got.last, golden.last, 1e-12);
}

}  // namespace heddle::model_test
