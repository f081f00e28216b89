// Generation with a cache per layer and sequence, for every kind of attention. Sequences of any
// lengths run together: prompts as one packed batch through the layers of training, whose keys and
// values fill the caches, then one token of each sequence at a time against its own cache. Feeding
// tokens one by one gives the logits of feeding them at once, and a sequence gives the same alone
// and in any batch (attention-and-moe.md, C2-C4).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "model/inference/kv_cache.h"

namespace heddle::v1 {
class KvCacheConfig;
class ModelConfig;
}  // namespace heddle::v1
namespace heddle::model {
class ParameterStore;
}

namespace heddle::inference {

struct DecoderOptions {
  CacheQuantization cache;
};
// From memory.kv_cache.
DecoderOptions DecoderOptionsOf(const heddle::v1::KvCacheConfig& config);

using SequenceId = int64_t;

// Tokens that follow what a sequence holds.
struct Turn {
  SequenceId sequence = 0;
  std::span<const int64_t> ids;
};

// Tokens that went through the blocks, each counted once per block it went through, divided by the
// number of blocks: a decoder that runs its prefix again is seen here.
struct DecoderCounters {
  int64_t prefill_rows = 0;
  int64_t decode_rows = 0;
  // Keys that decoding scored, summed over layers and branches, once per key head that has keys of
  // its own: X4.
  int64_t attended_keys = 0;
};

class Decoder {
 public:
  // INVALID_ARGUMENT as PlanModel. `store` is borrowed and was made for `config`.
  static StatusOr<std::unique_ptr<Decoder>> Create(const heddle::v1::ModelConfig& config,
                                                   model::ParameterStore* store,
                                                   const DecoderOptions& options = {});
  virtual ~Decoder() = default;

  // A new sequence without tokens, with room for `reserve` of them.
  virtual SequenceId Open(int64_t reserve = 0) = 0;
  // Frees the caches of an open sequence; its id is not used again.
  virtual void Close(SequenceId sequence) = 0;

  // Appends each turn's tokens to its sequence and returns the logits after the last of them,
  // [turns, V] fp32 (fp64 for kFp64). Turns of empty sequences run at once as one packed batch, the
  // others token by token, one of each sequence at a time. INVALID_ARGUMENT names the first bad
  // turn (no token, an id outside the vocabulary, a sequence that is not open or stands twice);
  // then nothing has changed. LibTorch's exceptions pass through. Blocking; one thread.
  virtual StatusOr<at::Tensor> Feed(std::span<const Turn> turns) = 0;

  // Tokens of an open sequence.
  virtual int64_t length(SequenceId sequence) const = 0;
  // Bytes that its caches need at this length; model::KvCacheBytes() of it.
  virtual int64_t cache_bytes(SequenceId sequence) const = 0;
  // Bytes of its buffers: those of the reserved length, or of the next doubling.
  virtual int64_t allocated_bytes(SequenceId sequence) const = 0;
  virtual DecoderCounters counters() const = 0;
};

}  // namespace heddle::inference
