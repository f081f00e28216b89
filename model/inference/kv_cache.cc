#include "model/inference/kv_cache.h"

#include <algorithm>

#include "base/status/status.h"

namespace heddle::inference {

KvCache::KvCache(const KvCacheShape& shape, at::ScalarType type,
                 const CacheQuantization& quantization)
    : shape_(shape),
      quantization_(quantization),
      keys_({shape.kv_heads, shape.key_dim}, type),
      values_({shape.kv_heads, shape.value_dim}, type) {
  Reserve(0);
}

int64_t KvCache::RowOf(int64_t position) const {
  if (shape_.window == 0 || position < shape_.sinks) return position;
  return shape_.sinks + (position - shape_.sinks) % shape_.window;
}

int64_t KvCache::rows() const {
  return shape_.window == 0 ? length_ : std::min(length_, shape_.window + shape_.sinks);
}

int64_t KvCache::bytes() const {
  const int64_t held = shape_.window == 0 ? length_ : shape_.window + shape_.sinks;
  return keys_.BytesOf(held) + values_.BytesOf(held);
}

void KvCache::Reserve(int64_t length) {
  const int64_t rows = shape_.window == 0 ? length : shape_.window + shape_.sinks;
  keys_.Reserve(rows);
  values_.Reserve(rows);
}

void KvCache::Append(const at::Tensor& k, const at::Tensor& v) {
  const int64_t count = k.size(0);
  HEDDLE_CHECK(v.size(0) == count);
  if (!quantized() && quantization_.Due(length_ + count)) {
    const int64_t sinks = shape_.window == 0 ? 0 : shape_.sinks;
    keys_.Quantize(quantization_.quantization, sinks, rows());
    values_.Quantize(quantization_.quantization, sinks, rows());
  }
  // A window keeps the last W positions only.
  const int64_t first_kept = shape_.window == 0 ? 0 : length_ + count - shape_.window;
  int64_t i = 0;
  while (i < count) {
    const int64_t position = length_ + i;
    if (position >= shape_.sinks && position < first_kept) {
      i = std::min(count, first_kept - length_);
      continue;
    }
    // Positions that go to neighbouring rows are copied together.
    const int64_t row = RowOf(position);
    int64_t run = 1;
    while (i + run < count && RowOf(position + run) == row + run) ++run;
    keys_.Write(row, k.narrow(0, i, run));
    values_.Write(row, v.narrow(0, i, run));
    i += run;
  }
  length_ += count;
}

}  // namespace heddle::inference
