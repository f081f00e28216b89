// Indexers of DSA and GSA: scores of every visible key, exact top-k selection, score statistics for
// adaptive k, and the KL loss that trains them. A thread holds a fixed number of candidates a row,
// or a few rows of scores (KL over all keys): never L x L.
// Sources: attention-and-moe.md sections 1 (tie-break), 6.1-6.3, 7.1-7.3.
//
//   I[t,s] = sum_j w[t,j] act(score_scale qI[t,j].kI[s] + head_bias[j]),  first[t] <= s <= t
//
// N packed rows, HI indexer heads, dI width. Keys and queries are the same rows. T is float or
// double. Every score comes from one instruction sequence per (row, key): prefill, decode,
// recomputation and any batch give the same bits.
#pragma once

#include <cstdint>

namespace heddle::kernels::indexer {

enum class Activation { kRelu, kSigmoid };
enum class TieBreak { kOldest, kNewest };

template <typename T>
struct Scores {
  int64_t heads = 0;  // HI
  int64_t width = 0;  // dI
  Activation activation = Activation::kRelu;
  double score_scale = 1;          // GSA: 1 / sqrt(dI); DSA: 1 (its scaling is in w)
  const T* q = nullptr;            // [N, HI, dI] contiguous
  const T* k = nullptr;            // [N, dI] contiguous
  const T* w = nullptr;            // [N, HI] contiguous, signed (DSA) or in (0, 1) (GSA)
  const T* head_bias = nullptr;    // [HI] or null
  const int32_t* first = nullptr;  // [N] first row of the document: first visible key
  // Row of k that is row t's own key; keys after it are not visible. Null: last[t] = t. Decode
  // gives one query row per sequence against a longer cache.
  const int32_t* last = nullptr;  // [N]
};

// Over the visible scores of a row.
template <typename T>
struct Statistics {
  Scores<T> scores;
  T* mean = nullptr;      // [N], each may be null
  T* variance = nullptr;  // [N] population variance of the visible scores
  T* maximum = nullptr;   // [N]
  T* entropy = nullptr;   // [N] of softmax over the visible scores, natural log
};

// Row t takes its count[t] = offsets[t+1] - offsets[t] best keys, written in ascending order.
// REQUIRES: count[t] <= visible keys. NaN ranks below every number; +0 and -0 are equal.
template <typename T>
struct Select {
  Scores<T> scores;
  TieBreak tie_break = TieBreak::kOldest;
  const int64_t* offsets = nullptr;  // [N + 1]
  int32_t* selected = nullptr;       // [offsets[N]] rows of k
};

// KL(p || softmax(I / temperature)) per row, p[s] = mean over H heads of the attention
// probabilities exp(scale q.k - lse). Keys: the selected ones, or all visible (selected null).
// p is a constant: gradients go to the indexer only. dL/dI = row_weight (softmax - p) /
// temperature.
template <typename T>
struct Kl {
  Scores<T> scores;
  const int64_t* offsets = nullptr;  // null: all visible keys (stage 1)
  const int32_t* selected = nullptr;
  double temperature = 1;
  // Attention whose probabilities are the target.
  int64_t attention_heads = 0;  // H
  int64_t kv_heads = 0;         // J
  int64_t key_dim = 0;          // Dk
  double attention_scale = 0;
  const T* attention_q = nullptr;  // [N, H, Dk]
  const T* attention_k = nullptr;  // [N, J, Dk]
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  const T* lse = nullptr;  // [N, H] over the same keys
  // Outputs.
  T* loss = nullptr;        // [N] KL per row, not weighted
  T* lse_scores = nullptr;  // [N] of I / temperature: written by rows, read by keys
  // Selected keys only: dL/dI of every pair, written by rows, read by keys. Null: keys compute it
  // again. All visible keys: not used, it would be L x L.
  T* dscores = nullptr;  // [offsets[N]]
  // The backward; all null: loss only.
  double row_weight = 0;
  T* dq = nullptr;          // [N, HI, dI] overwritten
  T* dw = nullptr;          // [N, HI] overwritten
  T* dk = nullptr;          // [N, dI] overwritten
  T* dhead_bias = nullptr;  // [N, HI] per row (the caller sums rows in order), or null
};

struct Rows {
  int64_t begin = 0;
  int64_t end = 0;
};
// Keys [keys.begin, keys.end), seen by rows [rows.begin, rows.end) of the same document. Rows are
// added in ascending order.
struct KeyTask {
  Rows keys;
  Rows rows;
};

template <typename T>
struct Table {
  // scores of row t to out[0 .. last - first], for tests, decoding and plots.
  void (*row_scores)(const Scores<T>&, int64_t row, T* out);
  void (*statistics)(const Statistics<T>&, Rows);
  void (*select)(const Select<T>&, Rows);
  void (*kl_rows)(const Kl<T>&, Rows);     // loss, lse_scores, dq, dw, dhead_bias
  void (*kl_keys)(const Kl<T>&, KeyTask);  // dk; after kl_rows of its rows
};

const Table<float>& FloatKernels();
const Table<double>& DoubleKernels();

}  // namespace heddle::kernels::indexer
