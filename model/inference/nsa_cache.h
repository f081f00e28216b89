// The decode cache of an NSA layer (attention-and-moe.md 5.5): keys and values of all tokens,
// compressed keys and values, the raw rows of the last incomplete window, and with separate
// projections a ring of the window branch. A window of l raw rows becomes one compressed row when
// its last token arrives, once, every r tokens; the token that completes it sees it.
#pragma once

#include <cstdint>
#include <optional>

#include "model/attention/nsa_layer.h"
#include "model/inference/decode_attention.h"

namespace heddle::inference {

class NsaCache : public SequenceCache {
 public:
  // Borrows `weights`, which compress, and `pool`, whose position is as before after each call.
  NsaCache(const attention::NsaWeights* weights, at::ScalarType type,
           const CacheQuantization& quantization, layers::BufferPool* pool);

  void Reserve(int64_t length) override;
  void Append(const layers::CacheRows& rows, int64_t begin, int64_t end) override;
  int64_t bytes() const override;
  int64_t allocated_bytes() const override;

  int64_t length() const { return tokens_.length(); }
  // k rotated and v of all tokens: the selected branch; with shared projections the window too.
  const KvCache& tokens() const { return tokens_; }
  // Null with shared projections.
  const KvCache* window() const { return window_.has_value() ? &*window_ : nullptr; }
  // Compressed rows, never quantised; kc rotated.
  int64_t windows() const { return windows_; }
  const RowStore& compressed_keys() const { return compressed_keys_; }
  const RowStore& compressed_values() const { return compressed_values_; }
  // Windows compressed since the cache was made, each time they were (N10).
  int64_t emissions() const { return emissions_; }

 private:
  // Compresses the windows that these tokens, a whole prompt, complete.
  void EmitPrompt(const at::Tensor& raw_k, const at::Tensor& raw_v);
  void EmitToken(const at::Tensor& raw_k, const at::Tensor& raw_v);
  void Emit(const attention::CompressionWindows& windows, const at::Tensor& raw_k,
            const at::Tensor& raw_v);

  const attention::NsaWeights* weights_;
  layers::BufferPool* pool_;
  KvCache tokens_;
  std::optional<KvCache> window_;
  RowStore compressed_keys_;
  RowStore compressed_values_;
  RowStore raw_keys_;  // l rows, never quantised
  RowStore raw_values_;
  int64_t raw_rows_ = 0;  // of them in use
  int64_t windows_ = 0;
  int64_t emissions_ = 0;
};

}  // namespace heddle::inference
