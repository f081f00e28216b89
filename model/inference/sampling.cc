#include "model/inference/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/rng/rng.h"

namespace heddle::inference {
namespace {

// Order of candidates: higher logit first, then lower id; NaN ranks below every number.
bool Before(std::span<const float> logits, int32_t a, int32_t b) {
  const auto value = [&](int32_t id) {
    const float logit = logits[static_cast<size_t>(id)];
    return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
  };
  if (value(a) != value(b)) return value(a) > value(b);
  return a < b;
}

}  // namespace

Status CheckSampling(const SamplingOptions& options) {
  if (!(options.temperature >= 0.0) || std::isinf(options.temperature)) {
    return InvalidArgument(Str("temperature: must be >= 0 (is ", options.temperature, ")"));
  }
  if (options.top_k < 0)
    return InvalidArgument(Str("top-k: must be >= 0 (is ", options.top_k, ")"));
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    return InvalidArgument(Str("top-p: must be in (0, 1] (is ", options.top_p, ")"));
  }
  return OkStatus();
}

StatusOr<int64_t> SampleToken(std::span<const float> logits, const SamplingOptions& options,
                              const Draw& draw) {
  HEDDLE_CHECK(!logits.empty());
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return Before(logits, a, b); };
  const int32_t best = *std::min_element(order.begin(), order.end(), before);
  const double maximum = logits[static_cast<size_t>(best)];
  if (!std::isfinite(maximum)) {
    return Internal(Str("no finite logit at position ", draw.position, ": the model has diverged"));
  }
  if (options.temperature == 0.0) return best;

  size_t kept = order.size();
  if (options.top_k > 0) kept = std::min(kept, static_cast<size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(kept), order.end(), before);
  std::vector<double> weights;
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    const double logit = logits[static_cast<size_t>(order[i])];
    const double weight =
        std::isnan(logit) ? 0.0 : std::exp((logit - maximum) / options.temperature);
    weights.push_back(weight);
    sum += weight;
  }
  // The smallest prefix that holds top_p of the kept mass.
  double mass = 0;
  size_t nucleus = 0;
  while (nucleus < kept && (nucleus == 0 || mass < options.top_p * sum)) mass += weights[nucleus++];
  const Rng rng = Rng(options.seed, "sampling").Child(draw.stream);
  double left = rng.UniformAt(static_cast<uint64_t>(draw.position)) * mass;
  for (size_t i = 0; i + 1 < nucleus; ++i) {
    if (left < weights[i]) return order[i];
    left -= weights[i];
  }
  return order[nucleus - 1];
}

}  // namespace heddle::inference
