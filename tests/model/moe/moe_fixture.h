// A mixture of experts with a hand-built plan, and the same layer as plain loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "model/moe/moe_layer.h"
#include "tests/model/layers/layer_fixture.h"

namespace heddle::moe_test {

using heddle::v1::ModelConfig;
using heddle::v1::MoeConfig;
using layers_test::Batch;
using layers_test::LayerFixture;
using layers_test::Outcome;
using layers_test::Runner;

// Odd widths on purpose: no multiple of the vector length.
inline constexpr int64_t kWidth = 20;

inline ModelConfig SmallConfig(int experts, int top_k) {
  ModelConfig config;
  config.set_d_model(kWidth);
  MoeConfig* moe = config.mutable_moe();
  moe->set_n_experts(experts);
  moe->set_top_k(top_k);
  moe->set_d_expert(11);
  moe->set_aux_loss(0);
  moe->set_z_loss(0);
  return config;
}

inline constexpr char kBias[] = "mlp.gate.e_score_correction_bias";

struct MoeCase {
  MoeCase(const ModelConfig& c, at::ScalarType type, bool with_bias = true)
      : config(c), fixture(type) {
    const MoeConfig& moe = config.moe();
    const bool gated = config.ffn() == ModelConfig::FFN_SWIGLU;
    const int64_t d = config.d_model();
    fixture.Add("mlp.gate.weight", {moe.n_experts(), d});
    for (int e = 0; e < moe.n_experts(); ++e) {
      AddFeedForward(&fixture, Expert(e), gated, d, moe.d_expert());
    }
    if (moe.n_shared() > 0) {
      AddFeedForward(&fixture, "mlp.shared_experts.", gated, d,
                     int64_t{moe.n_shared()} * moe.d_expert());
    }
    if (with_bias) fixture.AddBuffer(kBias, moe.n_experts());
    fixture.HasExperts(moe.n_experts());
    layer = moe::MakeMoe(config, fixture.Build(0.4));
  }
  static std::string Expert(int e) { return "mlp.experts." + std::to_string(e) + "."; }

  float* bias() { return fixture.storage().Buffer(kBias); }
  void SetBias(const std::vector<float>& values) {
    std::copy(values.begin(), values.end(), bias());
  }
  std::map<std::string, std::vector<double>> Gradients() const {
    std::map<std::string, std::vector<double>> all;
    for (const std::string& name : fixture.Names()) all[name] = fixture.Gradient(name);
    return all;
  }
  Runner NewRunner() { return Runner(layer.get(), fixture.storage().type); }

  ModelConfig config;
  LayerFixture fixture;
  std::unique_ptr<moe::MoeLayer> layer;
};

inline double Act(ModelConfig::Ffn form, double x) {
  if (form == ModelConfig::FFN_GELU) return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
  return x / (1 + std::exp(-x));
}

// out += weight f(x) of the function under `prefix`.
inline void AddFunction(const MoeCase& c, const std::string& prefix, const double* x, double weight,
                        double* out) {
  const std::vector<double> up = c.fixture.Weight(prefix + "up_proj.weight");
  const std::vector<double> down = c.fixture.Weight(prefix + "down_proj.weight");
  std::vector<double> gate;
  if (c.config.ffn() == ModelConfig::FFN_SWIGLU) {
    gate = c.fixture.Weight(prefix + "gate_proj.weight");
  }
  const size_t d = static_cast<size_t>(c.config.d_model());
  const size_t hidden = up.size() / d;
  for (size_t f = 0; f < hidden; ++f) {
    double u = 0, g = 0;
    for (size_t i = 0; i < d; ++i) {
      u += x[i] * up[f * d + i];
      if (!gate.empty()) g += x[i] * gate[f * d + i];
    }
    const double value = gate.empty() ? Act(c.config.ffn(), u) : Act(c.config.ffn(), g) * u;
    for (size_t i = 0; i < d; ++i) out[i] += weight * value * down[i * hidden + f];
  }
}

inline std::vector<double> ScoresOf(const MoeConfig& moe, const std::vector<double>& z) {
  std::vector<double> s;
  if (moe.router() == MoeConfig::ROUTER_SIGMOID) {
    for (const double v : z) s.push_back(1 / (1 + std::exp(-v)));
    return s;
  }
  double sum = 0;
  for (const double v : z) sum += std::exp(v);
  for (const double v : z) s.push_back(std::exp(v) / sum);
  return s;
}

// The k best indices of `allowed` by a stable sort, ascending.
inline std::vector<int> StableTop(const std::vector<double>& scores, std::vector<int> allowed,
                                  int k) {
  std::stable_sort(allowed.begin(), allowed.end(), [&](int a, int b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  allowed.resize(static_cast<size_t>(k));
  std::sort(allowed.begin(), allowed.end());
  return allowed;
}

inline std::vector<int> ChosenOf(const MoeConfig& moe, const std::vector<double>& biased) {
  const bool two = moe.router() == MoeConfig::ROUTER_SIGMOID || moe.bias_update_rate() > 0;
  const int per_group = moe.n_experts() / moe.n_groups();
  std::vector<double> group_scores;
  std::vector<int> groups;
  for (int g = 0; g < moe.n_groups(); ++g) {
    std::vector<double> members(biased.begin() + g * per_group,
                                biased.begin() + (g + 1) * per_group);
    std::sort(members.rbegin(), members.rend());
    double score = members[0];
    if (two && per_group > 1) score += members[1];
    group_scores.push_back(score);
    groups.push_back(g);
  }
  std::vector<int> allowed;
  for (const int g : StableTop(group_scores, groups, moe.topk_groups())) {
    for (int e = g * per_group; e < (g + 1) * per_group; ++e) allowed.push_back(e);
  }
  return StableTop(biased, allowed, moe.top_k());
}

struct PlainRow {
  std::vector<double> scores;
  std::vector<int> chosen;
  std::vector<double> weights;
  double margin = 0;  // between the worst chosen and the best other expert, groups left aside
};

// One token's routing, without noise.
inline PlainRow PlainRoute(MoeCase& c, const double* x) {
  const MoeConfig& moe = c.config.moe();
  const std::vector<double> gate = c.fixture.Weight("mlp.gate.weight");
  const size_t d = static_cast<size_t>(c.config.d_model());
  std::vector<double> z(static_cast<size_t>(moe.n_experts()), 0.0);
  for (size_t e = 0; e < z.size(); ++e) {
    for (size_t i = 0; i < d; ++i) z[e] += x[i] * gate[e * d + i];
  }
  PlainRow row;
  row.scores = ScoresOf(moe, z);
  std::vector<double> biased = row.scores;
  const float* bias = c.bias();
  for (size_t e = 0; bias != nullptr && e < z.size(); ++e) biased[e] += bias[e];
  row.chosen = ChosenOf(moe, biased);
  double sum = 0, worst_in = INFINITY, best_out = -INFINITY;
  for (int e = 0; e < moe.n_experts(); ++e) {
    const size_t i = static_cast<size_t>(e);
    const bool in = std::count(row.chosen.begin(), row.chosen.end(), e) > 0;
    if (in) sum += row.scores[i];
    if (in) worst_in = std::min(worst_in, biased[i]);
    if (!in) best_out = std::max(best_out, biased[i]);
  }
  row.margin = std::abs(worst_in - best_out);
  const bool normalise = moe.norm_topk() || moe.router() == MoeConfig::ROUTER_SIGMOID;
  for (const int e : row.chosen) {
    row.weights.push_back(moe.route_scale() * row.scores[static_cast<size_t>(e)] /
                          (normalise ? sum : 1.0));
  }
  return row;
}

// The layer's output as plain sums over tokens in their order; `capacity` per expert.
inline std::vector<double> PlainMoe(MoeCase& c, const Batch& batch, int64_t capacity = INT64_MAX) {
  std::vector<double> out = batch.residual;
  std::map<int, int64_t> used;
  for (int64_t row = 0; row < batch.rows(); ++row) {
    const double* x = batch.h.data() + row * batch.width;
    double* y = out.data() + row * batch.width;
    const PlainRow route = PlainRoute(c, x);
    if (c.config.moe().n_shared() > 0) AddFunction(c, "mlp.shared_experts.", x, 1.0, y);
    for (size_t j = 0; j < route.chosen.size(); ++j) {
      if (used[route.chosen[j]]++ >= capacity) continue;
      AddFunction(c, MoeCase::Expert(route.chosen[j]), x, route.weights[j], y);
    }
  }
  return out;
}

// Smallest distance of any token's choice from a tie.
inline double Margin(MoeCase& c, const Batch& batch) {
  double margin = INFINITY;
  for (int64_t row = 0; row < batch.rows(); ++row) {
    margin = std::min(margin, PlainRoute(c, batch.h.data() + row * batch.width).margin);
  }
  return margin;
}

}  // namespace heddle::moe_test
