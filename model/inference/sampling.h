// From logits to tokens: greedy, or sampled with temperature, top-k and top-p. Draws are counter
// based: a seed, a sequence and a position give the same draw whatever came before and whatever
// else is in the batch. Torch-free.
#pragma once

#include <cstdint>
#include <span>

#include "base/status/status.h"

namespace heddle::inference {

struct SamplingOptions {
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: all tokens
  double top_p = 1.0;        // smallest set of tokens with at least this probability
  uint64_t seed = 0;
};
// INVALID_ARGUMENT names the option that is out of range.
Status CheckSampling(const SamplingOptions& options);

// Which draw of a seed: `stream` tells sequences of a batch apart.
struct Draw {
  uint64_t stream = 0;
  int64_t position = 0;  // of the token to come
};

// Ties go to the lower id, NaN never wins. INTERNAL if no logit is finite: the model has diverged.
// REQUIRES: logits not empty, options checked.
StatusOr<int64_t> SampleToken(std::span<const float> logits, const SamplingOptions& options,
                              const Draw& draw);

}  // namespace heddle::inference
