// Rows of a cache in the compute type, or quantised to 8 bits: what caches of every kind keep their
// keys, values and latents in. Rows are quantised once, when they are written or when the store is
// switched, and read back in the statistics type. Source: attention-and-moe.md section 10.
#pragma once

#include <cstdint>
#include <span>

#include <ATen/core/Tensor.h>

#include "kernels/kv_quant/params.h"

namespace heddle::inference {

enum class Quantization { kNone, kFp8, kInt8 };

struct RowShape {
  int64_t heads = 1;
  int64_t width = 0;
  int64_t group = 0;  // columns that share a scale; 0: a head
  // The last columns of a row that are never quantised (MLA's rotary part); heads is 1 then.
  int64_t exact_columns = 0;
  int64_t columns() const { return heads * width; }
};

class RowStore {
 public:
  // `type`: compute type, bf16, fp32 or fp64.
  RowStore(RowShape shape, at::ScalarType type);

  // Room for `rows`, not one more; Write beyond it doubles. Never shrinks.
  void Reserve(int64_t rows);
  // rows[first + i] = values[i]; values [n, heads, width] of the compute type may be strided in the
  // first dimension.
  void Write(int64_t first, const at::Tensor& values_NHW);

  // Converts the first `used` rows but for the first `exact`, which stay in the compute type for
  // good (sinks), and frees what they took. Later writes are quantised. REQUIRES: not kNone, not
  // quantised yet.
  void Quantize(Quantization quantization, int64_t exact, int64_t used);
  bool quantized() const { return quantization_ != Quantization::kNone; }

  // The first `rows` rows in place. REQUIRES: not quantised.
  at::Tensor View(int64_t rows) const;
  // out[i] = row index[i]. out [n, heads, width] contiguous, of the statistics type.
  void Read(std::span<const int32_t> index, const at::Tensor& out_NHW) const;
  // out[i] = row i.
  void ReadFirst(const at::Tensor& out_NHW) const;

  // Bytes that `rows` rows take, scales included.
  int64_t BytesOf(int64_t rows) const;
  int64_t allocated_bytes() const;

 private:
  kernels::kv_quant::Layout layout() const;
  void Grow(int64_t capacity);
  void WriteCodes(int64_t first, const at::Tensor& values);
  // Rows [from, from + count) to out[to ..].
  void ReadRun(int64_t from, int64_t count, const at::Tensor& out, int64_t to) const;
  void ReadCodes(int64_t from, int64_t count, char* to) const;
  void CheckOut(const at::Tensor& out) const;

  RowShape shape_;
  at::ScalarType type_;
  Quantization quantization_ = Quantization::kNone;
  int64_t capacity_ = 0;
  int64_t exact_ = 0;  // rows below are in values_ although the store is quantised
  at::Tensor values_;  // [capacity, heads, width], quantised: [exact, heads, width]
  at::Tensor codes_;   // [capacity - exact, columns - exact_columns] uint8
  at::Tensor scales_;  // [capacity - exact, groups] fp32
  at::Tensor tails_;   // [capacity - exact, exact_columns] of the compute type
};

}  // namespace heddle::inference
