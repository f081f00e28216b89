// Row-wise operations of a transformer block, fused so that each tensor is read and written once:
// norms, RoPE, activations, router and combination of experts, cross-entropy, embedding gradient,
// conversions. Plain pointers and shapes; a call works on rows [begin, end) on the calling thread,
// the caller splits rows over threads. Results of a row do not depend on the split.
//
// T = element type of the table (f32, bf16 as uint16_t bits, f64). S = type of statistics and sums:
// float for f32 and bf16, double for f64. Source: attention-and-moe.md sections 1.1, 2, 3, 9.
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

// y = (x - mean) rstd gain + bias, rstd = 1 / sqrt(variance + eps), variance over the width without
// Bessel's correction. rstd is kept for the backward, which computes the mean again.
struct LayerNormForward {
  int64_t width = 0;
  double eps = 0;
  const void* x = nullptr;     // [rows, width] T
  const void* gain = nullptr;  // [width] T
  const void* bias = nullptr;  // [width] T
  void* y = nullptr;           // [rows, width] T
  void* rstd = nullptr;        // [rows] S
};

// dx = residual + d(layernorm)/dx . dy; dgain and dbias += the sums over the rows of this call.
struct LayerNormBackward {
  int64_t width = 0;
  const void* x = nullptr;         // [rows, width] T
  const void* gain = nullptr;      // [width] T
  const void* rstd = nullptr;      // [rows] S
  const void* dy = nullptr;        // [rows, width] T
  const void* residual = nullptr;  // [rows, width] T, nullable
  void* dx = nullptr;              // [rows, width] T, may alias dy or residual
  void* dgain = nullptr;           // [width] S, added to
  void* dbias = nullptr;           // [width] S, added to
};

// DyT: y = gain tanh(alpha x) + bias.
struct DytForward {
  int64_t width = 0;
  const void* x = nullptr;      // [rows, width] T
  const void* alpha = nullptr;  // [1] T
  const void* gain = nullptr;   // [width] T
  const void* bias = nullptr;   // [width] T
  void* y = nullptr;            // [rows, width] T
};

struct DytBackward {
  int64_t width = 0;
  const void* x = nullptr;         // [rows, width] T
  const void* alpha = nullptr;     // [1] T
  const void* gain = nullptr;      // [width] T
  const void* dy = nullptr;        // [rows, width] T
  const void* residual = nullptr;  // [rows, width] T, nullable
  void* dx = nullptr;              // [rows, width] T, may alias dy or residual
  void* dalpha = nullptr;          // [1] S, added to
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
//
// With row weights w (the gates of a mixture of experts, where the layer's output is w f(x)),
// out_gradient comes in without w: row_dot becomes sum_i out_gradient[i] out[i], which is dL/dw
// because the down projection is linear, gate_up becomes w times its gradient and out_gradient w
// times the forward's output.
struct SwigluBackward {
  int64_t width = 0;
  void* gate_up = nullptr;           // [rows, 2 width] T
  void* out_gradient = nullptr;      // [rows, width] T
  const void* row_weight = nullptr;  // [rows] S, nullable
  void* row_dot = nullptr;           // [rows] S, with row_weight
};

// out = f(x): silu(x) = x sigmoid(x), or gelu(x) = x Phi(x) with the exact error function.
struct ActivationForward {
  int64_t width = 0;
  const void* x = nullptr;  // [rows, width] T
  void* out = nullptr;      // [rows, width] T
};

// As SwigluBackward: x becomes its gradient, out_gradient the forward's output; row weights alike.
struct ActivationBackward {
  int64_t width = 0;
  void* x = nullptr;                 // [rows, width] T
  void* out_gradient = nullptr;      // [rows, width] T
  const void* row_weight = nullptr;  // [rows] S, nullable
  void* row_dot = nullptr;           // [rows] S, with row_weight
};

// logits = x W^T in S. One order of additions for every (row, expert), whatever else is in the
// batch: the choice of experts hangs on it.
struct RouterLogits {
  int64_t width = 0;
  int64_t experts = 0;
  const void* x = nullptr;       // [rows, width] T
  const void* weight = nullptr;  // [experts, width] T
  void* logits = nullptr;        // [rows, experts] S
};

// dweight += dlogits^T x over all rows in ascending order. The range of the call is a range of
// *columns*, so that threads never share an element.
struct RouterWeightGradient {
  int64_t rows = 0;
  int64_t width = 0;
  int64_t experts = 0;
  const void* dlogits = nullptr;  // [rows, experts] S
  const void* x = nullptr;        // [rows, width] T
  void* dweight = nullptr;        // [experts, width] S
};

// out[t] = residual[t] + shared[t] + sum_j weights[t, j] parts[slots[t, j]]
//          + sum_e dlogits[t, e] router[e],
// sums in ascending order of j and e in S, rounded once. out may be residual or shared.
struct CombineRows {
  int64_t width = 0;
  int64_t per_row = 0;             // slots of a row
  const void* parts = nullptr;     // [slots, width] T
  const int32_t* slots = nullptr;  // [rows, per_row], -1 = none
  const void* weights = nullptr;   // [rows, per_row] S, null: 1
  const void* residual = nullptr;  // [rows, width] T, nullable
  const void* shared = nullptr;    // [rows, width] T, nullable
  int64_t experts = 0;             // 0: no router term
  const void* dlogits = nullptr;   // [rows, experts] S
  const void* router = nullptr;    // [experts, width] T
  void* out = nullptr;             // [rows, width] T
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
  // [vocabulary] of the calling thread, overwritten: the exponentials of a row are computed once.
  float* exponentials = nullptr;
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
  void (*layer_norm_forward)(const LayerNormForward&, RowRange);
  void (*layer_norm_backward)(const LayerNormBackward&, RowRange);
  void (*dyt_forward)(const DytForward&, RowRange);
  void (*dyt_backward)(const DytBackward&, RowRange);
  void (*rope)(const Rope&, RowRange);
  void (*swiglu_forward)(const SwigluForward&, RowRange);
  void (*swiglu_backward)(const SwigluBackward&, RowRange);
  void (*gelu_forward)(const ActivationForward&, RowRange);
  void (*gelu_backward)(const ActivationBackward&, RowRange);
  void (*silu_forward)(const ActivationForward&, RowRange);
  void (*silu_backward)(const ActivationBackward&, RowRange);
  void (*router_logits)(const RouterLogits&, RowRange);
  void (*router_weight_gradient)(const RouterWeightGradient&, RowRange columns);
  void (*combine_rows)(const CombineRows&, RowRange);
  void (*cross_entropy)(const CrossEntropy&, RowRange);
  void (*embedding_backward)(const EmbeddingBackward&, RowRange columns);
  void (*accumulate)(const Accumulate&, RowRange elements);
  void (*convert)(const Convert&, RowRange elements);
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
