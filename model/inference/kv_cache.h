// Keys and values of one layer and one sequence as attention reads them: rotated, gated where the
// kind gates.
//
// Dense: row of position s is s. Window: rows 0 .. A-1 are the pinned first A positions, row
// A + (s - A) mod W holds position s >= A. A position that is both sink and inside the window lives
// once, pinned. The rows in use are always the first rows(), so attention needs no index and no
// mask: after position t was stored they are exactly the keys that t sees.
#pragma once

#include <cstdint>

#include "model/inference/row_store.h"

namespace heddle::inference {

// What memory.kv_cache says.
struct CacheQuantization {
  Quantization quantization = Quantization::kNone;
  // Rows stay in the compute type until the sequence has more tokens than this, then all of them
  // are quantised once (attention-and-moe.md section 10).
  int64_t threshold = 512;
  bool Due(int64_t length) const {
    return quantization != Quantization::kNone && length > threshold;
  }
};

struct KvCacheShape {
  int64_t kv_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t window = 0;  // 0: every position stays
  int64_t sinks = 0;   // never quantised
};

class KvCache {
 public:
  KvCache(const KvCacheShape& shape, at::ScalarType type, const CacheQuantization& quantization);

  // Room for `length` positions, not one more.
  void Reserve(int64_t length);
  // Stores positions length(), length() + 1, ... of [n, J, Dk] and [n, J, Dv] tensors of the
  // compute type.
  void Append(const at::Tensor& k_NJD, const at::Tensor& v_NJE);

  const KvCacheShape& shape() const { return shape_; }
  int64_t length() const { return length_; }
  // Rows in use.
  int64_t rows() const;
  const RowStore& keys() const { return keys_; }
  const RowStore& values() const { return values_; }
  bool quantized() const { return keys_.quantized(); }
  // Bytes that this length needs: all positions, or the window and its sinks.
  int64_t bytes() const;
  int64_t allocated_bytes() const { return keys_.allocated_bytes() + values_.allocated_bytes(); }

 private:
  int64_t RowOf(int64_t position) const;

  KvCacheShape shape_;
  CacheQuantization quantization_;
  RowStore keys_;
  RowStore values_;
  int64_t length_ = 0;
};

}  // namespace heddle::inference
