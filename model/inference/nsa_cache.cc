#include "model/inference/nsa_cache.h"

#include <algorithm>
#include <vector>

#include "base/status/status.h"

namespace heddle::inference {
namespace {

KvCacheShape TokensShape(const attention::NsaShape& shape) {
  return {shape.heads.kv, shape.heads.dim, shape.heads.dim};
}
KvCacheShape WindowShape(const attention::NsaShape& shape) {
  return {shape.heads.kv, shape.heads.dim, shape.heads.dim, shape.window};
}
RowShape Rows(const attention::NsaShape& shape) { return {shape.heads.kv, shape.heads.dim}; }

}  // namespace

NsaCache::NsaCache(const attention::NsaWeights* weights, at::ScalarType type,
                   const CacheQuantization& quantization, layers::BufferPool* pool)
    : weights_(weights),
      pool_(pool),
      tokens_(TokensShape(weights->shape()), type, quantization),
      compressed_keys_(Rows(weights->shape()), type),
      compressed_values_(Rows(weights->shape()), type),
      raw_keys_(Rows(weights->shape()), type),
      raw_values_(Rows(weights->shape()), type) {
  if (weights->shape().separate) window_.emplace(WindowShape(weights->shape()), type, quantization);
  raw_keys_.Reserve(weights->shape().compression.kernel_size);
  raw_values_.Reserve(weights->shape().compression.kernel_size);
}

void NsaCache::Reserve(int64_t length) {
  tokens_.Reserve(length);
  if (window_.has_value()) window_->Reserve(length);
  const int64_t windows = attention::WindowCount(weights_->shape().compression, length);
  compressed_keys_.Reserve(windows);
  compressed_values_.Reserve(windows);
}

int64_t NsaCache::bytes() const {
  const int64_t raw = weights_->shape().compression.kernel_size;
  return tokens_.bytes() + (window_.has_value() ? window_->bytes() : 0) +
         compressed_keys_.BytesOf(windows_) + compressed_values_.BytesOf(windows_) +
         raw_keys_.BytesOf(raw) + raw_values_.BytesOf(raw);
}

int64_t NsaCache::allocated_bytes() const {
  return tokens_.allocated_bytes() + (window_.has_value() ? window_->allocated_bytes() : 0) +
         compressed_keys_.allocated_bytes() + compressed_values_.allocated_bytes() +
         raw_keys_.allocated_bytes() + raw_values_.allocated_bytes();
}

void NsaCache::Append(const layers::CacheRows& rows, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  const at::Tensor v = rows.v.narrow(0, begin, count);
  const at::Tensor raw_k = rows.raw_k.narrow(0, begin, count);
  // With shared projections the values have no rotation: v is the raw v.
  const at::Tensor raw_v = window_.has_value() ? rows.raw_v.narrow(0, begin, count) : v;
  if (length() == 0) {
    EmitPrompt(raw_k, raw_v);
  } else {
    for (int64_t i = 0; i < count; ++i) EmitToken(raw_k.narrow(0, i, 1), raw_v.narrow(0, i, 1));
  }
  tokens_.Append(rows.k.narrow(0, begin, count), v);
  if (window_.has_value()) {
    window_->Append(rows.window_k.narrow(0, begin, count), rows.window_v.narrow(0, begin, count));
  }
}

void NsaCache::EmitPrompt(const at::Tensor& raw_k, const at::Tensor& raw_v) {
  const attention::Compression& c = weights_->shape().compression;
  const int64_t tokens = raw_k.size(0);
  const std::vector<int32_t> cu = {0, static_cast<int32_t>(tokens)};
  std::vector<int32_t> positions;
  for (int32_t t = 0; t < tokens; ++t) positions.push_back(t);
  const attention::CompressionWindows windows =
      attention::WindowsOf(c, layers::Documents{cu, positions, tokens});
  if (windows.count() > 0) Emit(windows, raw_k, raw_v);
  const int64_t first = windows_ * c.stride;
  raw_rows_ = tokens - first;
  raw_keys_.Write(0, raw_k.narrow(0, first, raw_rows_));
  raw_values_.Write(0, raw_v.narrow(0, first, raw_rows_));
}

void NsaCache::EmitToken(const at::Tensor& raw_k, const at::Tensor& raw_v) {
  const attention::Compression& c = weights_->shape().compression;
  raw_keys_.Write(raw_rows_, raw_k);
  raw_values_.Write(raw_rows_, raw_v);
  ++raw_rows_;
  if (raw_rows_ < c.kernel_size) return;
  Emit(attention::OneWindow(c, windows_), raw_keys_.View(raw_rows_), raw_values_.View(raw_rows_));
  // The next window shares l - r rows with this one.
  raw_rows_ -= c.stride;
  for (RowStore* store : {&raw_keys_, &raw_values_}) {
    const at::Tensor rest = store->View(c.kernel_size).narrow(0, c.stride, raw_rows_).clone();
    store->Write(0, rest);
  }
}

void NsaCache::Emit(const attention::CompressionWindows& windows, const at::Tensor& raw_k,
                    const at::Tensor& raw_v) {
  const size_t mark = pool_->Mark();
  at::Tensor kc;
  at::Tensor vc;
  weights_->CompressRows(windows, raw_k, raw_v, pool_, pool_, &kc, &vc);
  compressed_keys_.Write(windows_, kc);
  compressed_values_.Write(windows_, vc);
  pool_->Release(mark);
  windows_ += windows.count();
  emissions_ += windows.count();
}

}  // namespace heddle::inference
