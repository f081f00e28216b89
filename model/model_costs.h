// What a model costs beside the counts of model_plan.h: the bytes of its caches in every stored
// form, and how much faster than its dense twin it can be. Counted FLOPs and bytes, not times
// (attention-and-moe.md sections 5.5, 6.4, 7.4, 10 and 12). Torch-free; of target model_plan.
#pragma once

#include <cstdint>
#include <vector>

namespace heddle::v1 {
class ModelConfig;
class KvCacheConfig;
}  // namespace heddle::v1

namespace heddle::model {

// How rows of keys and values are stored (section 10). NSA's compressed rows and its raw tail,
// sinks, index keys and MLA's rotary part keep `element_bytes`.
struct CacheFormat {
  int element_bytes = 2;
  bool quantized = false;  // fp8 or int8: one byte a value and fp32 scales
  // Index keys quantized too: 1 byte a value, one fp32 scale per 128.
  bool quantized_index = false;
};
// The form in which a sequence of `length` tokens stands: quantized beyond the threshold.
CacheFormat CacheFormatAt(const heddle::v1::KvCacheConfig& cache, int64_t length,
                          int element_bytes);

// Values per scale of MLA latents and index keys.
inline constexpr int64_t kScaleTile = 128;

// Bytes of the cache of one sequence at `length` tokens. Windows own their rings whatever the
// length. REQUIRES: PlanModel(config).ok().
int64_t CacheBytes(const heddle::v1::ModelConfig& config, int64_t length,
                   const CacheFormat& format);
// Of one layer.
int64_t LayerCacheBytes(const heddle::v1::ModelConfig& config, int layer, int64_t length,
                        const CacheFormat& format);

// Bytes by which the cache grows per token in the long run (a window: 0).
double CacheBytesPerToken(const heddle::v1::ModelConfig& config, const CacheFormat& format);

// Bytes that decoding the token at position `length` reads from the cache.
int64_t DecodeBytesRead(const heddle::v1::ModelConfig& config, int64_t length,
                        const CacheFormat& format);

// Against the dense twin: same sizes, every layer grouped-query attention over all keys, or naive
// MLA where the layer projects to a latent; means over the positions of a sequence.
struct SpeedUp {
  int64_t length = 0;
  double core_forward = 1;   // dense core FLOPs / own core FLOPs
  double core_training = 1;  // forward + backward, KL of stage 2 included
  double step_forward = 1;   // whole forward pass, projections and head included (Amdahl)
  double step_training = 1;
  double decode_bytes = 1;      // cache bytes read at the last position, dense / own
  double dense_core_share = 0;  // of the twin's training step
  double added_share = 0;       // projections that the twin lacks, of its training step
};
struct SpeedUpOptions {
  double index_cost = 1.0;  // relative cost of an indexer FLOP: 0.5 for FP8
};
// REQUIRES: PlanModel(config).ok(), length >= 1.
SpeedUp SpeedUpOverDense(const heddle::v1::ModelConfig& config, int64_t length,
                         const SpeedUpOptions& options = {});

// Parameters that one token visits: K of E experts.
int64_t ActiveParameters(const heddle::v1::ModelConfig& config, int64_t parameters);

// Smallest length <= `limit` from which a training step is faster than the dense twin's; 0 if there
// is none, and for a model without sparse layers.
int64_t BreakEvenLength(const heddle::v1::ModelConfig& config, int64_t limit);

}  // namespace heddle::model
