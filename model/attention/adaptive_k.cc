#include "model/attention/adaptive_k.h"

#include <algorithm>
#include <cmath>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"

namespace heddle::attention {
namespace {

AdaptiveK::Kind KindOf(const heddle::v1::GsaConfig& config) {
  if (!config.use_adaptive_k()) return AdaptiveK::Kind::kFixed;
  switch (config.adaptive_k()) {
    case heddle::v1::GsaConfig::ADAPTIVE_K_VARIANCE:
      return AdaptiveK::Kind::kVariance;
    case heddle::v1::GsaConfig::ADAPTIVE_K_ENTROPY:
      return AdaptiveK::Kind::kEntropy;
    case heddle::v1::GsaConfig::ADAPTIVE_K_LEARNED:
      return AdaptiveK::Kind::kLearned;
    default:
      return AdaptiveK::Kind::kVarianceCausal;
  }
}

double Sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace

AdaptiveK::AdaptiveK(const heddle::v1::GsaConfig& config)
    : kind_(KindOf(config)),
      k_base_(config.k_base()),
      k_min_(config.k_min()),
      k_max_(config.k_max()),
      temperature_(config.adaptive_k_temperature()) {}

double AdaptiveK::Spread(const ScoreSpread& row) const {
  if (kind_ != Kind::kVariance) return row.variance;
  if (row.columns < 2) return 0;
  const double visible = static_cast<double>(row.visible);
  const double columns = static_cast<double>(row.columns);
  const double sum = visible * row.mean;
  const double squares = visible * (row.variance + row.mean * row.mean);
  return (squares - sum * sum / columns) / (columns - 1);
}

double AdaptiveK::Learned(const ScoreSpread& row) const {
  HEDDLE_CHECK(static_cast<int>(mlp_.second.size()) == kHidden, "the MLP has no weights");
  const std::array<double, 3> in = {row.mean, std::sqrt(std::max(row.variance, 0.0)), row.maximum};
  double out = mlp_.second_bias;
  for (size_t i = 0; i < mlp_.second.size(); ++i) {
    double hidden = mlp_.first_bias[i];
    for (size_t j = 0; j < in.size(); ++j) hidden += mlp_.first[3 * i + j] * in[j];
    out += mlp_.second[i] * std::max(hidden, 0.0);
  }
  return out;
}

int32_t AdaptiveK::Count(const ScoreSpread& row, double reference) const {
  const double base = static_cast<double>(k_base_);
  if (kind_ == Kind::kFixed) return static_cast<int32_t>(std::min(k_base_, row.visible));
  double k = 0;
  switch (kind_) {
    case Kind::kEntropy:
      k = base *
          (0.5 + temperature_ * row.entropy / std::log(static_cast<double>(row.visible) + 1));
      break;
    case Kind::kLearned:
      k = static_cast<double>(k_min_) +
          Sigmoid(Learned(row)) * static_cast<double>(k_max_ - k_min_);
      break;
    default: {
      const double relative = reference > 0 ? Spread(row) / (reference + 1e-8) : 1.0;
      k = base * (0.5 + 1.0 / (1.0 + temperature_ * relative));
      break;
    }
  }
  const double least = static_cast<double>(k_min_);
  k = std::min(k >= least ? k : least, static_cast<double>(k_max_));
  return static_cast<int32_t>(std::min(static_cast<int64_t>(std::floor(k)), row.visible));
}

}  // namespace heddle::attention
