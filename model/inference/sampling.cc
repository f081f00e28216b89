#include "model/inference/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/rng/rng.h"
#include "model/inference/decoder.h"

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

int64_t SampleToken(std::span<const float> logits, const SamplingOptions& options,
                    int64_t position) {
  HEDDLE_CHECK(!logits.empty());
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return Before(logits, a, b); };
  if (options.temperature == 0.0) return *std::min_element(order.begin(), order.end(), before);

  size_t kept = order.size();
  if (options.top_k > 0) kept = std::min(kept, static_cast<size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(kept), order.end(), before);
  const double maximum = logits[static_cast<size_t>(order.front())];
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
  const Rng rng(options.seed, "sampling");
  double left = rng.UniformAt(static_cast<uint64_t>(position)) * mass;
  for (size_t i = 0; i + 1 < nucleus; ++i) {
    if (left < weights[i]) return order[i];
    left -= weights[i];
  }
  return order[nucleus - 1];
}

StatusOr<std::vector<int64_t>> Generate(Decoder* decoder, std::span<const int64_t> prompt,
                                        const GenerateOptions& options,
                                        const std::function<void(int64_t)>& on_token) {
  RETURN_IF_ERROR(CheckSampling(options.sampling));
  if (options.max_new_tokens < 0) return InvalidArgument("max-new-tokens: must be >= 0");
  std::vector<int64_t> tokens;
  if (options.max_new_tokens == 0) return tokens;
  ASSIGN_OR_RETURN(std::vector<float> logits, decoder->Feed(prompt));
  while (true) {
    const int64_t token = SampleToken(logits, options.sampling, decoder->length());
    tokens.push_back(token);
    if (on_token) on_token(token);
    if (options.eos == token) return tokens;
    if (static_cast<int64_t>(tokens.size()) >= options.max_new_tokens) return tokens;
    ASSIGN_OR_RETURN(logits, decoder->Feed(std::span(&token, 1)));
  }
}

}  // namespace heddle::inference
