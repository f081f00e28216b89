// From logits to tokens: greedy, or sampled with temperature, top-k and top-p. Draws are counter
// based, so that a seed and a position give the same token whatever came before. Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/status/status.h"

namespace heddle::inference {

class Decoder;

struct SamplingOptions {
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: all tokens
  double top_p = 1.0;        // smallest set of tokens with at least this probability
  uint64_t seed = 0;
};
// INVALID_ARGUMENT names the option that is out of range.
Status CheckSampling(const SamplingOptions& options);

// Token for the sequence position `position`. Ties go to the lower id. NaN never wins.
// REQUIRES: logits not empty, options checked.
int64_t SampleToken(std::span<const float> logits, const SamplingOptions& options,
                    int64_t position);

struct GenerateOptions {
  int64_t max_new_tokens = 64;
  std::optional<int64_t> eos;  // generation ends after this token; it is part of the result
  SamplingOptions sampling;
};
// New tokens after `prompt`. Stops at eos or max_new_tokens. `on_token` (may be empty) sees each
// token at once. INVALID_ARGUMENT as Feed and CheckSampling, and for max_new_tokens < 0.
StatusOr<std::vector<int64_t>> Generate(Decoder* decoder, std::span<const int64_t> prompt,
                                        const GenerateOptions& options,
                                        const std::function<void(int64_t)>& on_token = {});

}  // namespace heddle::inference
