// Softmax attention where each row sees an explicit set of keys: the core of NSA's three branches,
// DSA, GSA and MLA, and of a window with sinks. Forward, and a backward in two passes that needs no
// inverse map and no atomics. Sources: attention-and-moe.md sections 1 (masked softmax, flash
// backward), 4, 5.1, 6.2, 8.
//
// N rows of queries, M rows of keys, H query heads, J key heads (J divides H, query head h uses key
// head h J / H), Dk, Dv widths. T is float or double; statistics have the same type.
#pragma once

#include <cstdint>

namespace heddle::kernels::sparse_attention {

// The keys of (row t, set head g) are the union of spans [first[i], min(first[i] + width, end[t]))
// for i in [offsets[t G + g], offsets[t G + g + 1]), with G = set_heads. Spans ascend and do not
// overlap. width 1: token sets. width B: blocks. width INT32_MAX: prefixes and whole documents.
// An empty set gives output 0 and lse -inf.
struct KeySets {
  int64_t set_heads = 1;             // 1: one set for all heads; J: one per key head
  const int64_t* offsets = nullptr;  // [N G + 1]
  const int32_t* first = nullptr;    // [offsets[N G]], in [0, M)
  const int32_t* end = nullptr;      // [N], in [0, M]
  int32_t width = 1;
};

// The first dimension may be strided (elements); the last two are contiguous.
template <typename T>
struct Problem {
  int64_t heads = 0;      // H
  int64_t kv_heads = 0;   // J
  int64_t key_dim = 0;    // Dk
  int64_t value_dim = 0;  // Dv
  double scale = 0;
  KeySets sets;
  const T* q = nullptr;  // [N, H, Dk]
  const T* k = nullptr;  // [M, J, Dk]
  const T* v = nullptr;  // [M, J, Dv]
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
};

template <typename T>
struct Forward {
  Problem<T> problem;
  T* out = nullptr;  // [N, H, Dv] contiguous
  T* lse = nullptr;  // [N, H] natural log
};

template <typename T>
struct Backward {
  Problem<T> problem;
  const T* out = nullptr;   // [N, H, Dv] of the forward
  const T* lse = nullptr;   // [N, H] of the forward
  const T* dout = nullptr;  // [N, H, Dv]
  T* delta = nullptr;       // [N, H]: written by the pass over queries, read by the pass over keys
  T* dq = nullptr;          // [N, H, Dk] overwritten, contiguous
  T* dk = nullptr;          // [M, J, Dk] overwritten, contiguous
  T* dv = nullptr;          // [M, J, Dv] overwritten, contiguous
};

struct Rows {
  int64_t begin = 0;
  int64_t end = 0;
};

// A task of the pass over keys: keys [keys.begin, keys.end) of one key head, attended to by rows
// [rows.begin, rows.end). Every row that may see one of these keys must lie in `rows`; each (key,
// key head) belongs to exactly one task. Rows are added in ascending order, so the result depends
// on neither threads nor the cut into tasks.
struct KeyTask {
  int64_t kv_head = 0;
  Rows keys;
  Rows rows;
};

// Results of a row do not depend on the range it is computed in.
template <typename T>
struct Table {
  void (*forward)(const Forward<T>&, Rows);
  void (*backward_queries)(const Backward<T>&, Rows);  // dq, delta
  void (*backward_keys)(const Backward<T>&, KeyTask);  // dk, dv; after backward_queries of its rows
};

// float: by instruction set. double: one portable version, the reference precision.
const Table<float>& FloatKernels();
const Table<double>& DoubleKernels();

// Every float table that this machine can run, for tests.
struct NamedTable {
  const char* name;
  const Table<float>* table;
};
int AvailableFloatTables(NamedTable out[4]);

}  // namespace heddle::kernels::sparse_attention
