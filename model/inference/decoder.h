// Generation of one sequence with a KV cache per layer: dense layers keep every key and value,
// sliding-window layers a ring of W rows and A pinned rows. Feeding tokens one by one gives the
// logits of feeding them at once (attention-and-moe.md sections 2 and 4).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
}
namespace heddle::model {
class ParameterStore;
}

namespace heddle::inference {

class Decoder {
 public:
  // INVALID_ARGUMENT as PlanModel. `store` is borrowed and was made for `config`.
  static StatusOr<std::unique_ptr<Decoder>> Create(const heddle::v1::ModelConfig& config,
                                                   model::ParameterStore* store);
  virtual ~Decoder() = default;

  // Appends tokens at the next positions and returns the logits [V] after the last one. The first
  // call runs all its tokens at once, later calls one by one. INVALID_ARGUMENT for no token or an
  // id outside the vocabulary. Blocking; one thread.
  virtual StatusOr<std::vector<float>> Feed(std::span<const int64_t> ids) = 0;

  // Forgets the sequence, keeps the buffers.
  virtual void Reset() = 0;

  // Tokens fed since Reset.
  virtual int64_t length() const = 0;
  // Bytes that hold keys and values at this length; KvCacheBytes() at the compute type's width.
  virtual int64_t cache_bytes() const = 0;
};

}  // namespace heddle::inference
