// The element-wise part of flash attention on bf16, between matrix products that the caller runs.
// Scores are held transposed: rows are keys, columns are kQueries = 64 queries, so that softmax
// statistics are vectors over queries and nothing is reduced across lanes.
//
// Visible: key s of query t iff s <= t, s < length and (window = 0, or t - s < window, or s <
// sinks); or what `words` says. Source: attention-and-moe.md sections 1, 2 and 4.
#pragma once

#include <cstdint>

namespace heddle::kernels::attention {

inline constexpr int64_t kQueries = 64;

// Which pairs of a tile are visible.
struct TileMask {
  bool partial = false;     // false: all are
  int64_t first_query = 0;  // position of column 0
  int64_t first_key = 0;    // position of row 0
  int64_t length = 0;       // of the document
  int64_t window = 0;
  int64_t sinks = 0;
  // [keys] or null. Bit c of a row's word: column c sees its key; the positions do not count then.
  const uint64_t* words = nullptr;
};

// One tile of the forward: running maximum and sum of the queries, probabilities for the product
// with the values, and the factor by which earlier output must be scaled.
struct ForwardTile {
  int64_t keys = 0;      // even
  float scale_log2 = 0;  // scale / ln 2: exponents are base 2
  TileMask mask;
  const float* scores = nullptr;    // [keys, 64] q.k, unscaled
  float* maximum = nullptr;         // [64] in, out; of scores x scale_log2, -inf at first
  float* sum = nullptr;             // [64] in, out
  float* correction = nullptr;      // [64] out
  uint16_t* probability = nullptr;  // [keys / 2, 64, 2] bf16 out: pairs of keys, as a B operand
};

// output[d, q] *= correction[q].
struct Rescale {
  int64_t rows = 0;
  const float* correction = nullptr;  // [64]
  float* output = nullptr;            // [rows, 64]
};

// out[q, d] = accumulated[d, q] * factor[q] for the first `queries` columns, as bf16 rows.
struct TransposeOut {
  int64_t width = 0;
  int64_t queries = 0;
  const float* accumulated = nullptr;  // [width, 64]
  const float* factor = nullptr;       // [64]
  uint16_t* out = nullptr;             // row q at out + q * out_stride
  int64_t out_stride = 0;
};

// One tile of the backward: P = exp(scale s - lse), dS = scale P (dP - delta).
struct BackwardTile {
  int64_t keys = 0;  // even
  float scale = 0;
  float scale_log2 = 0;
  TileMask mask;
  const float* scores = nullptr;         // [keys, 64]
  const float* d_probability = nullptr;  // [keys, 64] dO.v
  const float* lse_log2 = nullptr;       // [64] lse / ln 2
  const float* delta = nullptr;          // [64] dO.o
  uint16_t* probability = nullptr;       // [keys, 64] bf16 out
  uint16_t* d_scores = nullptr;          // [keys, 64] bf16 out
  uint16_t* d_scores_pairs = nullptr;    // [keys / 2, 64, 2] bf16 out
};

// delta[q] = dot of two bf16 rows.
struct RowDots {
  int64_t rows = 0;
  int64_t width = 0;
  const uint16_t* a = nullptr;
  int64_t a_stride = 0;
  const uint16_t* b = nullptr;
  int64_t b_stride = 0;
  float* out = nullptr;  // [rows]
};

// B operands. `rows` of [row, width] bf16 become, per block of 64 (last: 32) columns, pairs of
// rows: [rows / 2, block, 2]; blocks follow each other. width is a multiple of 32, rows even.
struct PackPairs {
  int64_t rows = 0;
  int64_t width = 0;
  const uint16_t* from = nullptr;  // [rows, width] contiguous
  uint16_t* to = nullptr;
};
// [64, width] becomes [width / 2, 64, 2]: the transpose, in pairs of columns.
struct PackTransposed {
  int64_t width = 0;
  const uint16_t* from = nullptr;  // [64, width] contiguous
  uint16_t* to = nullptr;
};
// to[c, r] = from[r, c].
struct Transpose {
  int64_t rows = 0;
  int64_t width = 0;
  const uint16_t* from = nullptr;  // [rows, width] contiguous
  uint16_t* to = nullptr;          // [width, rows]
};

// C = A B, or C += A B: bf16 operands, fp32 sums.
struct PairProduct {
  int64_t rows = 0;
  int64_t columns = 0;          // 32 or 64
  int64_t depth = 0;            // even
  const uint16_t* a = nullptr;  // [rows, depth], row i at a + i * a_stride
  int64_t a_stride = 0;
  const uint16_t* b = nullptr;  // [depth / 2, columns, 2]: pairs of rows
  float* c = nullptr;           // [rows, columns], row i at c + i * c_stride
  int64_t c_stride = 0;
  bool add = false;
};

struct Table {
  // Called by a thread before its first pair_product and after its last: matrix tiles are a state
  // of the thread.
  void (*begin)();
  void (*end)();
  void (*forward_tile)(const ForwardTile&);
  void (*rescale)(const Rescale&);
  void (*transpose_out)(const TransposeOut&);
  void (*backward_tile)(const BackwardTile&);
  void (*row_dots)(const RowDots&);
  void (*pack_pairs)(const PackPairs&);
  void (*pack_transposed)(const PackTransposed&);
  void (*transpose)(const Transpose&);
  void (*pair_product)(const PairProduct&);
};

const Table& Kernels();

// What one pair of a gathered row (kernels/sparse_attention) costs in pairs of dense tiles, with
// `group` query heads per key head; 0 where tiles never pay. Of the instruction set alone.
struct PairCost {
  double forward = 0;
  double backward = 0;
};
PairCost GatheredPairCost(int64_t group);

struct NamedTable {
  const char* name;
  const Table* table;
};
// Every table this machine can run, for tests.
int AvailableTables(NamedTable out[5]);

}  // namespace heddle::kernels::attention
