// Row-wise operations of a transformer block, fused so that each tensor is read and written once:
// RMSNorm, LayerNorm, RoPE, SwiGLU, cross-entropy, embedding gradient, conversions. Plain pointers
// and shapes; a call works on rows [row_begin, row_end) on the calling thread, the caller splits
// rows over threads. Results of a row do not depend on the split.
//
// T = element type of the table (f32, bf16 as uint16_t bits, f64). S = type of statistics and sums:
// float for f32 and bf16, double for f64. Source: attention-and-moe.md sections 1.1, 2, 3.
#pragma once

#include <cstdint>

namespace heddle::kernels::pointwise {

struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// y = x * gain / sqrt(mean(x^2) + eps); rstd is kept for the backward.
struct RmsNormForward {
  int64_t width = 0;
  double eps = 0;
  const void* x = nullptr;     // [rows, width] T
  const void* gain = nullptr;  // [width] T
  void* y = nullptr;           // [rows, width] T
  void* rstd = nullptr;        // [rows] S
};

// dx = residual + d(rmsnorm)/dx . dy; dgain += the sum over the rows of this call, in row order.
struct RmsNormBackward {
  int64_t width = 0;
  const void* x = nullptr;         // [rows, width] T
  const void* gain = nullptr;      // [width] T
  const void* rstd = nullptr;      // [rows] S
  const void* dy = nullptr;        // [rows, width] T
  const void* residual = nullptr;  // [rows, width] T, nullable
  void* dx = nullptr;              // [rows, width] T, may alias dy or residual
  void* dgain = nullptr;           // [width] S, added to
};

// y = (x - mean) * rstd * gain + bias, rstd = 1 / sqrt(variance + eps); mean and rstd are kept for
// the backward. Population variance.
struct LayerNormForward {
  int64_t width = 0;
  double eps = 0;
  const void* x = nullptr;     // [rows, width] T
  const void* gain = nullptr;  // [width] T
  const void* bias = nullptr;  // [width] T
  void* y = nullptr;           // [rows, width] T
  void* mean = nullptr;        // [rows] S
  void* rstd = nullptr;        // [rows] S
};

// dx = residual + d(layernorm)/dx . dy; dgain, dbias += the sums over the rows of this call, in row
// order.
struct LayerNormBackward {
  int64_t width = 0;
  const void* x = nullptr;         // [rows, width] T
  const void* gain = nullptr;      // [width] T
  const void* mean = nullptr;      // [rows] S
  const void* rstd = nullptr;      // [rows] S
  const void* dy = nullptr;        // [rows, width] T
  const void* residual = nullptr;  // [rows, width] T, nullable
  void* dx = nullptr;              // [rows, width] T, may alias dy or residual
  void* dgain = nullptr;           // [width] S, added to
  void* dbias = nullptr;           // [width] S, added to
};

// Rotates `heads` heads of a row; `inverse` rotates back (the backward). In place when to == from.
struct Rope {
  int64_t heads = 0;
  int64_t head_dim = 0;  // even
  bool interleaved = false;
  bool inverse = false;
  const int32_t* positions = nullptr;  // [rows]
  const void* cosine = nullptr;        // [positions, head_dim / 2] S
  const void* sine = nullptr;          // [positions, head_dim / 2] S
  const void* from = nullptr;  // T, element (row, head, i) at row*from_row + head*from_head + i
  int64_t from_row = 0;
  int64_t from_head = 0;
  void* to = nullptr;  // T
  int64_t to_row = 0;
  int64_t to_head = 0;
};

// out = silu(gate) * up with gate_up = [gate | up] in each row.
struct SwigluForward {
  int64_t width = 0;              // d_ffn
  const void* gate_up = nullptr;  // [rows, 2 width] T
  void* out = nullptr;            // [rows, width] T
};

// gate_up becomes its gradient; out_gradient becomes the forward's output again, because the weight
// gradient of the down projection needs it and recomputing it here is free.
struct SwigluBackward {
  int64_t width = 0;
  void* gate_up = nullptr;       // [rows, 2 width] T
  void* out_gradient = nullptr;  // [rows, width] T
};

// loss[row] = -ln softmax(logits)[label], 0 where label < 0. With `gradient` the logits become
// (softmax - one_hot) * scale, 0 where label < 0.
struct CrossEntropy {
  int64_t vocabulary = 0;
  void* logits = nullptr;           // [rows, vocabulary] T
  const int32_t* labels = nullptr;  // [rows], < 0 = ignored
  double* loss = nullptr;           // [rows]
  bool gradient = false;
  double scale = 1.0;
};

// table_gradient[ids[row]] += gradient[row], rows in ascending order. Here the range of the call is
// a range of *columns*, so that threads never share an element.
struct EmbeddingBackward {
  int64_t rows = 0;
  int64_t width = 0;
  const int32_t* ids = nullptr;    // [rows]
  const void* gradient = nullptr;  // [rows, width] T
  void* table_gradient = nullptr;  // [vocabulary, width] S
};

// to += from, elements of the range.
struct Accumulate {
  const void* from = nullptr;  // T
  void* to = nullptr;          // S
};

// to = from rounded to nearest even; f32 to bf16 (table bf16), a copy in the other tables.
struct Convert {
  const void* from = nullptr;  // S
  void* to = nullptr;          // T
};

struct Table {
  void (*rms_norm_forward)(const RmsNormForward&, RowRange);
  void (*rms_norm_backward)(const RmsNormBackward&, RowRange);
  void (*rope)(const Rope&, RowRange);
  void (*swiglu_forward)(const SwigluForward&, RowRange);
  void (*swiglu_backward)(const SwigluBackward&, RowRange);
  void (*cross_entropy)(const CrossEntropy&, RowRange);
  void (*embedding_backward)(const EmbeddingBackward&, RowRange columns);
  void (*accumulate)(const Accumulate&, RowRange elements);
  void (*convert)(const Convert&, RowRange elements);
  void (*layer_norm_forward)(const LayerNormForward&, RowRange);
  void (*layer_norm_backward)(const LayerNormBackward&, RowRange);
};

enum class Element { kFloat32, kBFloat16, kFloat64 };

// The table of the selected instruction set; f64 is always the scalar reference.
const Table& Kernels(Element element);

// Every table that this machine can run, for tests. f64 has one.
struct NamedTable {
  const char* name;
  const Table* table;
};
int AvailableTables(Element element, NamedTable out[4]);

}  // namespace heddle::kernels::pointwise
