// The loop around a decoder: prompts of any lengths run as one batch, each ends by itself.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/status/status.h"
#include "model/inference/sampling.h"

namespace heddle::inference {

class Decoder;

struct Prompt {
  std::vector<int64_t> ids;
  // Keys the draws of this sequence, so that it gives the same tokens in any batch and order.
  uint64_t stream = 0;
};

struct GenerateOptions {
  int64_t max_new_tokens = 64;
  // Most tokens of a sequence, prompt included (max_position_embeddings); 0: no limit.
  int64_t max_length = 0;
  std::vector<int64_t>
      eos;  // a sequence ends after any of these tokens, which is part of the result
  SamplingOptions sampling;
};

enum class Finish { kEos, kMaxNewTokens, kMaxLength };

struct Generated {
  std::vector<int64_t> ids;  // new tokens
  Finish finish = Finish::kMaxNewTokens;
  int64_t cache_bytes = 0;  // of the sequence at its end
};

// Sees each token at once; prompt: index.
using OnToken = std::function<void(size_t prompt, int64_t token)>;

// New tokens of every prompt, in the order of the prompts. Caches are freed as sequences end.
// INVALID_ARGUMENT names the first bad prompt (no token, an id outside the vocabulary, no room
// within max_length) or option; INTERNAL as SampleToken.
StatusOr<std::vector<Generated>> Generate(Decoder* decoder, std::span<const Prompt> prompts,
                                          const GenerateOptions& options,
                                          const OnToken& on_token = {});

}  // namespace heddle::inference
