// Block selection of NSA: scores of the blocks of a document from the attention over its compressed
// keys, and the n best blocks of each (row, key head). No gradient. Source: attention-and-moe.md
// sections 1 (tie-break) and 5.1 (block scores, selection).
//
// N rows of queries, M rows of compressed keys, H query heads, J key heads (J divides H, G = H /
// J), D width. T is float or double.
#pragma once

#include <cstdint>

namespace heddle::kernels::block_selection {

// REQUIRES: r divides l and B, l <= B, topk >= init_blocks + local_blocks.
struct Shape {
  int64_t heads = 0;        // H
  int64_t kv_heads = 0;     // J
  int64_t dim = 0;          // D
  double scale = 0;         // that of the attention which gave lse
  int64_t kernel_size = 0;  // l
  int64_t stride = 0;       // r
  int64_t block = 0;        // B
  int64_t topk = 0;         // n
  int64_t init_blocks = 0;
  int64_t local_blocks = 0;
};

// Internal linkage: files of one instruction set include this (architecture.md T12).
//
// Compressed keys that the row at `position` of its document sees: windows 0 .. count - 1.
static inline int64_t VisibleWindows(const Shape& shape, int64_t position) {
  return position < shape.kernel_size - 1 ? 0
                                          : (position - shape.kernel_size + 1) / shape.stride + 1;
}
// Blocks that are chosen for the row.
static inline int64_t ChosenBlocks(const Shape& shape, int64_t position) {
  const int64_t candidates = position / shape.block + 1;
  return candidates < shape.topk ? candidates : shape.topk;
}

// Of row t and key head g, over the windows j that t sees (t >= j r + l - 1):
//
//   P[j] = sum over the heads h of the group of exp(scale q[t,h].kc[j] - lse[t,h])
//   score[i] = sum_j P[j] a[j,i],  a[j,i] = |[j r, j r + l) intersect [i B, (i+1) B)| / r
//
// Candidates are blocks i <= cur = floor(t / B). Forced ones (i < init_blocks, i > cur -
// local_blocks) come first, then the best scores, the lower block first among equals; NaN ranks
// below every number, +0 equals -0. min(n, cur + 1) blocks are chosen.
template <typename T>
struct Selection {
  Shape shape;
  const T* q = nullptr;  // [N, H, D], first dimension strided by q_stride elements
  int64_t q_stride = 0;
  const T* kc = nullptr;                  // [M, J, D] contiguous
  const T* lse = nullptr;                 // [N, H]
  const int32_t* position = nullptr;      // [N] t
  const int32_t* window_first = nullptr;  // [N] row of kc that holds window 0 of the document
  const int64_t* offsets = nullptr;       // [N J + 1]: ChosenBlocks() of (row, key head) apart
  // Nullable, out. Null: scores are not computed where all candidates are chosen anyway.
  T* scores = nullptr;        // [N, J, score_blocks]; 0 from block cur + 1 on
  int64_t score_blocks = 0;   // > cur of every row
  int32_t* blocks = nullptr;  // [offsets[N J]] out: ascending block numbers within the document
};

struct Rows {
  int64_t begin = 0;
  int64_t end = 0;
};

// Elements of T that a call needs as scratch for rows at positions up to `position`: one row of
// probabilities, one of scores, the running best.
int64_t ScratchElements(const Shape& shape, int64_t position);

// Results of a row do not depend on the range it is computed in, nor on the other documents.
template <typename T>
struct Table {
  // Returns the number of (row, key head) pairs that had a NaN among their scores, where computed.
  int64_t (*select)(const Selection<T>&, Rows, T* scratch);
};

// float: by instruction set. double: one portable version, the reference precision.
const Table<float>& FloatKernels();
const Table<double>& DoubleKernels();

// Every float table that this machine can run, for tests.
struct NamedTable {
  const char* name;
  const Table<float>* table;
};
int AvailableTables(NamedTable out[3]);

}  // namespace heddle::kernels::block_selection
