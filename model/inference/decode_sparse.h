// Attention of a decoding batch over rows gathered from caches: only the rows that a query attends
// to are read and widened, each query has its own stretch of them. Same kernel and same arithmetic
// as in training (model/attention/sparse_attention.h).
//
// B queries, one per sequence; M gathered rows of all sequences end to end; H query heads, J key
// heads, D, E widths. Everything is of the statistics type S.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/attention/key_sets.h"
#include "model/inference/kv_cache.h"

namespace heddle::inference {

struct GatheredRows {
  at::Tensor k_MJD;
  at::Tensor v_MJE;
  std::vector<int32_t> first;  // [B + 1] first row of each query, then M
};

// Rows to read of one cache, ascending; null: all that are in use.
struct RowsOf {
  const KvCache* cache = nullptr;
  const std::vector<int32_t>* index = nullptr;
  int64_t count() const {
    return index == nullptr ? cache->rows() : static_cast<int64_t>(index->size());
  }
};
// Tensors from `pool`. `type`: S.
GatheredRows Gather(std::span<const RowsOf> rows, at::ScalarType type, layers::BufferPool* pool);

// Each query sees the whole of its stretch.
attention::KeySets WholeStretches(const GatheredRows& rows);

// out [B, H, E] = softmax attention of q [B, H, D]; a query without keys gives 0. Splits queries
// and key heads over LibTorch's threads; a query's bits depend on nothing but its own rows.
void AttendGathered(double scale, const attention::KeySets& sets, const at::Tensor& q_BHD,
                    const at::Tensor& k_MJD, const at::Tensor& v_MJE, const at::Tensor& out_BHE,
                    const at::Tensor& lse_BH);

// q in S: itself, or a contiguous copy from `pool`.
at::Tensor WidenQuery(const at::Tensor& q_BHD, layers::BufferPool* pool);

}  // namespace heddle::inference
