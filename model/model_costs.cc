#include "model/model_costs.h"

#include <algorithm>
#include <cmath>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"
#include "model/model_plan_internal.h"

namespace heddle::model {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::ModelConfig;
using heddle::v1::NsaConfig;

// Flash backward recomputes the scores: 2.5 x the forward (attention-and-moe.md section 2).
constexpr double kCoreTrainingFactor = 3.5;

// Sum over t = 0 .. length-1 of min(t + 1, limit).
double SumMin(int64_t length, int64_t limit) {
  const double head = static_cast<double>(std::min(length, limit));
  const double tail = static_cast<double>(std::max<int64_t>(length - limit, 0));
  return head * (head + 1) / 2 + tail * static_cast<double>(limit);
}

// Windows of `kernel` tokens every `stride` that end at or before position t (section 5.1).
int64_t CompressedKeys(const NsaConfig& nsa, int64_t length) {
  if (length < nsa.kernel_size()) return 0;
  return (length - nsa.kernel_size()) / nsa.kernel_stride() + 1;
}

// Sum of CompressedKeys over lengths 1 .. length.
double SumCompressed(const NsaConfig& nsa, int64_t length) {
  const int64_t last = length - nsa.kernel_size();  // largest j of floor(j / r) + 1
  if (last < 0) return 0;
  const int64_t r = nsa.kernel_stride();
  const double full = static_cast<double>(last / r);
  const double rest = static_cast<double>(last % r + 1);
  return static_cast<double>(r) * full * (full + 1) / 2 + rest * (full + 1);
}

// FLOPs of one layer, weights per token, core summed over the positions of a sequence.
struct LayerFlops {
  double weights = 0;    // multiply-adds per token
  double attention = 0;  // flash attention, forward
  double scores = 0;     // indexer or block scores, forward only
  double kl = 0;         // backward of the indexer's loss in stage 2
  double Forward() const { return attention + scores; }
  double Training() const { return kCoreTrainingFactor * attention + scores + kl; }
};

class LayerCounter {
 public:
  // `dense`: the layer's dense twin.
  LayerCounter(const ModelConfig& config, int layer, bool dense)
      : config_(config),
        attention_(config.attention()),
        heads_(HeadsOf(config)),
        latent_(LayerUsesLatent(config, layer)),
        has_indexer_(LayerHasIndexer(config, layer)),
        experts_(LayerHasExperts(config, layer)),
        kind_(dense ? (latent_ ? heddle::v1::ATTENTION_KIND_MLA : heddle::v1::ATTENTION_KIND_DENSE)
                    : LayerKind(config, layer)),
        d_(config.d_model()) {}

  LayerFlops Count(int64_t length) const {
    LayerFlops flops;
    flops.weights = (latent_ ? Latent() : Projections()) + Extra() + FeedForward();
    const double per_key = PerKey();
    switch (kind_) {
      case heddle::v1::ATTENTION_KIND_NSA:
        flops.attention = per_key * (SumCompressed(attention_.nsa(), length) +
                                     SumMin(length, SelectedTokens(attention_.nsa())) +
                                     SumMin(length, attention_.nsa().window_size()));
        // Probabilities of the compressed branch, formed again for the block scores.
        flops.scores =
            2.0 * Wide(heads_.query * heads_.dim) * SumCompressed(attention_.nsa(), length);
        break;
      case heddle::v1::ATTENTION_KIND_SWA: {
        const Window window = WindowOf(config_);
        flops.attention = per_key * SumMin(length, window.keys + window.sinks);
        break;
      }
      case heddle::v1::ATTENTION_KIND_DSA:
        AddIndexed(length, attention_.dsa().topk(),
                   Wide(int64_t{attention_.dsa().n_indexer_heads()} * attention_.dsa().d_indexer()),
                   &flops);
        break;
      case heddle::v1::ATTENTION_KIND_GSA:
        AddIndexed(length, attention_.gsa().k_base(),
                   Wide(int64_t{attention_.gsa().n_indexer_heads()} * attention_.gsa().d_indexer()),
                   &flops);
        break;
      default:
        flops.attention = per_key * SumMin(length, length);
    }
    return flops;
  }

  static int64_t SelectedTokens(const NsaConfig& nsa) {
    return int64_t{nsa.topk()} * nsa.block_size();
  }

 private:
  static double Wide(int64_t value) { return static_cast<double>(value); }

  // C of section 2; section 8 for latents: naive, or absorbed where rows are selected.
  double PerKey() const {
    const heddle::v1::MlaConfig& mla = attention_.mla();
    if (!latent_) return 4.0 * Wide(heads_.query * heads_.dim);
    const int64_t width =
        kind_ == heddle::v1::ATTENTION_KIND_DSA
            ? 2 * int64_t{mla.kv_lora_rank()} + mla.qk_rope_head_dim()
            : int64_t{mla.qk_nope_head_dim()} + mla.qk_rope_head_dim() + mla.v_head_dim();
    return 2.0 * Wide(heads_.query * width);
  }

  void AddIndexed(int64_t length, int64_t k, double index_width, LayerFlops* flops) const {
    const double selected = SumMin(length, k);
    flops->attention = PerKey() * selected;
    if (!has_indexer_) return;
    flops->scores = 2.0 * index_width * SumMin(length, length);
    flops->kl = 6.0 * index_width * selected;
  }

  double Projections() const {
    return d_ * Wide(heads_.dim) * Wide(2 * heads_.query + 2 * heads_.kv);
  }

  double Latent() const {
    const heddle::v1::MlaConfig& mla = attention_.mla();
    const double h = Wide(heads_.query);
    const double qk = mla.qk_nope_head_dim() + mla.qk_rope_head_dim();
    const double rq = mla.q_lora_rank();
    const double query = rq == 0 ? d_ * h * qk : d_ * rq + rq * h * qk;
    return query + d_ * (mla.kv_lora_rank() + mla.qk_rope_head_dim()) +
           Wide(mla.kv_lora_rank()) * h * (mla.qk_nope_head_dim() + mla.v_head_dim()) +
           h * mla.v_head_dim() * d_;
  }

  // Projections that the dense twin does not have.
  double Extra() const {
    if (kind_ == heddle::v1::ATTENTION_KIND_NSA) return NsaExtra();
    if (kind_ == heddle::v1::ATTENTION_KIND_DSA) {
      if (!has_indexer_) return 0;
      const heddle::v1::DsaConfig& dsa = attention_.dsa();
      const double rq = attention_.mla().q_lora_rank();
      const double hi = dsa.n_indexer_heads();
      return hi * dsa.d_indexer() * (latent_ && rq > 0 ? rq : d_) + d_ * (dsa.d_indexer() + hi);
    }
    if (kind_ == heddle::v1::ATTENTION_KIND_GSA) {
      const heddle::v1::GsaConfig& gsa = attention_.gsa();
      const double hi = gsa.n_indexer_heads();
      const bool per_head = gsa.gate_form() == heddle::v1::GsaConfig::GATE_FORM_PER_HEAD;
      const double output = Wide(per_head ? heads_.query : heads_.query * heads_.dim);
      return d_ * (hi * gsa.d_indexer() + gsa.d_indexer() + hi) +
             (gsa.use_value_gate() ? d_ * Wide(heads_.kv * heads_.dim) : 0.0) +
             (gsa.use_output_gate() ? d_ * output : 0.0);
    }
    return 0;
  }

  double NsaExtra() const {
    const NsaConfig& nsa = attention_.nsa();
    const double width = Wide(heads_.dim);
    const double overlap = Wide(nsa.kernel_size()) / Wide(nsa.kernel_stride());
    const bool linear = nsa.compress_type() == NsaConfig::COMPRESS_TYPE_LINEAR;
    const double compress = 2.0 * Wide(heads_.kv) * width * (linear ? width : 1.0) * overlap;
    const double separate =
        nsa.kv() == NsaConfig::KV_SEPARATE ? 4.0 * d_ * Wide(heads_.kv) * width : 0.0;
    return compress + separate + 3.0 * d_ * Wide(heads_.query);
  }

  double FeedForward() const {
    const double matrices = config_.ffn() == ModelConfig::FFN_SWIGLU ? 3.0 : 2.0;
    if (!experts_) return matrices * d_ * config_.d_ffn();
    const heddle::v1::MoeConfig& moe = config_.moe();
    const double visited = moe.top_k() + moe.n_shared();
    return visited * matrices * d_ * moe.d_expert() + d_ * moe.n_experts();
  }

  const ModelConfig& config_;
  const heddle::v1::AttentionConfig& attention_;
  const Heads heads_;
  const bool latent_;
  const bool has_indexer_;
  const bool experts_;
  const AttentionKind kind_;
  const double d_;
};

struct ModelFlops {
  double weights = 0;  // FLOPs per token, forward
  double core_forward = 0;
  double core_training = 0;
};

ModelFlops CountModel(const ModelConfig& config, int64_t length, bool dense, double index_cost) {
  ModelFlops total;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    const LayerFlops flops = LayerCounter(config, layer, dense).Count(length);
    total.weights += 2.0 * flops.weights;
    // Block scores of NSA are no indexer: only what has a loss of its own gets cheaper.
    const double cheaper = flops.kl > 0 ? (1.0 - index_cost) * flops.scores : 0.0;
    total.core_forward += flops.Forward() - cheaper;
    total.core_training += flops.Training() - cheaper;
  }
  total.weights += 2.0 * static_cast<double>(config.d_model()) * config.vocab_size();
  total.core_forward /= static_cast<double>(length);
  total.core_training /= static_cast<double>(length);
  return total;
}

bool AnySparse(const ModelConfig& config) {
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    const AttentionKind kind = LayerKind(config, layer);
    if (kind != heddle::v1::ATTENTION_KIND_DENSE && kind != heddle::v1::ATTENTION_KIND_MLA) {
      return true;
    }
  }
  return false;
}

// The same model with a dense cache in every layer.
ModelConfig DenseTwin(const ModelConfig& config) {
  ModelConfig twin = config;
  heddle::v1::AttentionConfig* attention = twin.mutable_attention();
  attention->clear_pattern();
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    attention->add_pattern(LayerUsesLatent(config, layer) ? heddle::v1::ATTENTION_KIND_MLA
                                                          : heddle::v1::ATTENTION_KIND_DENSE);
  }
  return twin;
}

}  // namespace

int64_t FullyVisible(const ModelConfig& config, int layer) {
  const heddle::v1::AttentionConfig& attention = config.attention();
  switch (LayerKind(config, layer)) {
    case heddle::v1::ATTENTION_KIND_SWA:
      return WindowOf(config).keys + WindowOf(config).sinks;
    case heddle::v1::ATTENTION_KIND_NSA:
      return std::min<int64_t>(LayerCounter::SelectedTokens(attention.nsa()),
                               attention.nsa().window_size());
    case heddle::v1::ATTENTION_KIND_DSA:
      return attention.dsa().topk();
    case heddle::v1::ATTENTION_KIND_GSA:
      return attention.gsa().use_adaptive_k() ? attention.gsa().k_min() : attention.gsa().k_base();
    default:
      return INT64_MAX;
  }
}

int64_t VisibleKeys(const ModelConfig& config, int layer, int64_t position) {
  const int64_t before = position + 1;
  const heddle::v1::AttentionConfig& attention = config.attention();
  switch (LayerKind(config, layer)) {
    case heddle::v1::ATTENTION_KIND_NSA:
      return CompressedKeys(attention.nsa(), before) +
             std::min(before, LayerCounter::SelectedTokens(attention.nsa())) +
             std::min<int64_t>(before, attention.nsa().window_size());
    case heddle::v1::ATTENTION_KIND_GSA:
      return std::min<int64_t>(before, attention.gsa().k_base());
    default:
      return std::min(before, FullyVisible(config, layer));
  }
}

TokenFlops FlopsPerToken(const ModelConfig& config, int64_t sequence_length) {
  const ModelFlops counted = CountModel(config, sequence_length, /*dense=*/false, 1.0);
  TokenFlops flops;
  flops.forward_weights = counted.weights;
  flops.forward_core = counted.core_forward;
  flops.training = 3.0 * counted.weights + counted.core_training;
  return flops;
}

CacheFormat CacheFormatAt(const heddle::v1::KvCacheConfig& cache, int64_t length,
                          int element_bytes) {
  CacheFormat format;
  format.element_bytes = element_bytes;
  format.quantized = cache.quantization() != heddle::v1::KvCacheConfig::QUANTIZATION_NONE &&
                     length > cache.threshold();
  return format;
}

namespace {

int64_t Tiles(int64_t width) { return (width + kScaleTile - 1) / kScaleTile; }

// Rows of one layer's cache by what they hold.
class CacheRowBytes {
 public:
  CacheRowBytes(const ModelConfig& config, const CacheFormat& format)
      : config_(config), heads_(HeadsOf(config)), format_(format) {}

  // Key and value of every KV head.
  int64_t KeyValue() const {
    return format_.quantized ? 2 * heads_.kv * (heads_.dim + 4) : Plain();
  }
  // The same where it is never quantized.
  int64_t Plain() const { return 2 * heads_.kv * heads_.dim * format_.element_bytes; }
  int64_t Latent() const {
    const heddle::v1::MlaConfig& mla = config_.attention().mla();
    const int64_t rotary = int64_t{mla.qk_rope_head_dim()} * format_.element_bytes;
    return rotary + (format_.quantized ? mla.kv_lora_rank() + 4 * Tiles(mla.kv_lora_rank())
                                       : int64_t{mla.kv_lora_rank()} * format_.element_bytes);
  }
  int64_t IndexKey(int64_t width) const {
    return format_.quantized_index ? width + 4 * Tiles(width) : width * format_.element_bytes;
  }

 private:
  const ModelConfig& config_;
  const Heads heads_;
  const CacheFormat format_;
};

}  // namespace

int64_t LayerCacheBytes(const ModelConfig& config, int layer, int64_t length,
                        const CacheFormat& format) {
  const CacheRowBytes row(config, format);
  const heddle::v1::AttentionConfig& attention = config.attention();
  const NsaConfig& nsa = attention.nsa();
  switch (LayerKind(config, layer)) {
    case heddle::v1::ATTENTION_KIND_SWA: {
      const Window window = WindowOf(config);
      return row.KeyValue() * window.keys + row.Plain() * window.sinks;
    }
    case heddle::v1::ATTENTION_KIND_NSA: {
      const int64_t ring = nsa.kv() == NsaConfig::KV_SEPARATE ? nsa.window_size() : 0;
      return row.KeyValue() * (length + ring) +
             row.Plain() * (CompressedKeys(nsa, length) + nsa.kernel_size());
    }
    case heddle::v1::ATTENTION_KIND_DSA: {
      const int64_t core = LayerUsesLatent(config, layer) ? row.Latent() : row.KeyValue();
      const int64_t index =
          LayerHasIndexer(config, layer) ? row.IndexKey(attention.dsa().d_indexer()) : 0;
      return length * (core + index);
    }
    case heddle::v1::ATTENTION_KIND_GSA:
      return length * (row.KeyValue() + row.IndexKey(attention.gsa().d_indexer()));
    case heddle::v1::ATTENTION_KIND_MLA:
      return length * row.Latent();
    default:
      return length * row.KeyValue();
  }
}

int64_t CacheBytes(const ModelConfig& config, int64_t length, const CacheFormat& format) {
  int64_t bytes = 0;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    bytes += LayerCacheBytes(config, layer, length, format);
  }
  return bytes;
}

int64_t KvCacheBytes(const ModelConfig& config, int64_t length, int element_bytes) {
  return CacheBytes(config, length, {.element_bytes = element_bytes});
}

double CacheBytesPerToken(const ModelConfig& config, const CacheFormat& format) {
  // Long enough for every tail; a multiple of any stride makes the mean exact.
  const int64_t length = int64_t{65536} * config.attention().nsa().kernel_stride();
  return static_cast<double>(CacheBytes(config, 2 * length, format) -
                             CacheBytes(config, length, format)) /
         static_cast<double>(length);
}

int64_t DecodeBytesRead(const ModelConfig& config, int64_t length, const CacheFormat& format) {
  const CacheRowBytes row(config, format);
  const heddle::v1::AttentionConfig& attention = config.attention();
  int64_t bytes = 0;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    const int64_t core = LayerUsesLatent(config, layer) ? row.Latent() : row.KeyValue();
    const AttentionKind kind = LayerKind(config, layer);
    if (kind == heddle::v1::ATTENTION_KIND_NSA) {
      const int64_t compressed = CompressedKeys(attention.nsa(), length);
      bytes +=
          compressed * row.Plain() + (VisibleKeys(config, layer, length - 1) - compressed) * core;
      continue;
    }
    bytes += VisibleKeys(config, layer, length - 1) * core;
    if (!LayerHasIndexer(config, layer)) continue;
    if (kind == heddle::v1::ATTENTION_KIND_DSA) {
      bytes += length * row.IndexKey(attention.dsa().d_indexer());
    } else if (kind == heddle::v1::ATTENTION_KIND_GSA) {
      bytes += length * row.IndexKey(attention.gsa().d_indexer());
    }
  }
  return bytes;
}

SpeedUp SpeedUpOverDense(const ModelConfig& config, int64_t length, const SpeedUpOptions& options) {
  const ModelFlops own = CountModel(config, length, /*dense=*/false, options.index_cost);
  const ModelFlops dense = CountModel(config, length, /*dense=*/true, 1.0);
  SpeedUp speed;
  speed.length = length;
  speed.core_forward = dense.core_forward / own.core_forward;
  speed.core_training = dense.core_training / own.core_training;
  speed.step_forward = (dense.weights + dense.core_forward) / (own.weights + own.core_forward);
  const double dense_step = 3.0 * dense.weights + dense.core_training;
  speed.step_training = dense_step / (3.0 * own.weights + own.core_training);
  speed.dense_core_share = dense.core_training / dense_step;
  speed.added_share = 3.0 * (own.weights - dense.weights) / dense_step;
  const CacheFormat plain;
  speed.decode_bytes = static_cast<double>(DecodeBytesRead(DenseTwin(config), length, plain)) /
                       static_cast<double>(DecodeBytesRead(config, length, plain));
  return speed;
}

int64_t ActiveParameters(const ModelConfig& config, int64_t parameters) {
  const heddle::v1::MoeConfig& moe = config.moe();
  const int64_t matrices = config.ffn() == ModelConfig::FFN_SWIGLU ? 3 : 2;
  const int64_t expert = matrices * config.d_model() * moe.d_expert();
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    if (LayerHasExperts(config, layer)) parameters -= (moe.n_experts() - moe.top_k()) * expert;
  }
  return parameters;
}

int64_t BreakEvenLength(const ModelConfig& config, int64_t limit) {
  const auto faster = [&](int64_t length) {
    return SpeedUpOverDense(config, length).step_training > 1.0;
  };
  if (!AnySparse(config) || limit < 1 || !faster(limit)) return 0;
  // The dense core grows fastest: once faster, always faster.
  int64_t slow = 0;
  int64_t fast = limit;
  while (fast - slow > 1) {
    const int64_t middle = slow + (fast - slow) / 2;
    (faster(middle) ? fast : slow) = middle;
  }
  return fast;
}

}  // namespace heddle::model
