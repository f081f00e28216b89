// NSA's compression of keys and values: each window of l rows of a document becomes one row,
// forward and backward, for all three types. Pools run through kernels/compression; `linear`
// gathers windows and multiplies. Source: attention-and-moe.md sections 5.1
// (compression), 5.3, 5.4.
//
// N rows, M windows, J key heads, D width, l rows per window, r rows between windows. T is the
// compute type, S the statistics type (fp32; fp64 where T is fp64). Rows of x may be strided.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/layers/sublayer.h"

namespace heddle::attention {

enum class CompressType { kAveragePool, kWeightedPool, kLinear };

struct Compression {
  CompressType type = CompressType::kWeightedPool;
  int64_t kv_heads = 0;
  int64_t dim = 0;
  int64_t kernel_size = 0;  // l
  int64_t stride = 0;       // r, divides l
};

// n_c(T): full windows of a document of `tokens`.
int64_t WindowCount(const Compression& c, int64_t tokens);

// Where windows lie. Window j of a document covers its tokens j r .. j r + l - 1.
struct CompressionWindows {
  std::vector<int32_t> first;          // [M] row of the first token
  std::vector<int32_t> position;       // [M] j r: position that the compressed key is rotated to
  std::vector<int32_t> holders_begin;  // [N] first window that holds the row ..
  std::vector<int32_t> holders_end;    // [N] .. and one behind the last
  std::vector<int32_t> documents;      // [B + 1] first window of each document, then M
  int64_t count() const { return static_cast<int64_t>(first.size()); }
};
// The windows of packed documents.
CompressionWindows WindowsOf(const Compression& c, const layers::Documents& documents);
// Window `index` of a document alone, its l raw rows being rows 0 .. l - 1: what a decoder emits.
CompressionWindows OneWindow(const Compression& c, int64_t index);

// Of keys or of values; or their gradients, of type S.
struct CompressionWeights {
  at::Tensor weight;  // weightedpool [J, l]; linear [J, l D, D]; avgpool undefined
  at::Tensor pe;      // [J, l, D] keys; undefined: none
};

// out [M, J, D] T; not rotated.
void Compress(const Compression& c, const CompressionWindows& windows,
              const CompressionWeights& weights, const at::Tensor& x_NJD,
              layers::BufferPool* scratch, const at::Tensor& out_MJD);

// dx [N, J, D] S and the gradients are added to. dout [M, J, D] S contiguous, x of the forward.
void CompressBackward(const Compression& c, const CompressionWindows& windows,
                      const CompressionWeights& weights, const at::Tensor& x_NJD,
                      const at::Tensor& dout_MJD, layers::BufferPool* scratch,
                      const at::Tensor& dx_NJD, const CompressionWeights& gradients);

}  // namespace heddle::attention
