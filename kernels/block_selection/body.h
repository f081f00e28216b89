// The selection in float, compiled once per instruction set; one (row, key head) at a time. Memory
// map: a tile of keys (16 x D floats) stays in L1 for the heads of the group; one row of
// probabilities, one of scores. Every window takes the same sequence of instructions wherever it
// stands in its tile, so its probability has the same bits in prefill, decode, recomputation and
// any batch. Included by generic.cc, avx2.cc and avx512.cc only.
#pragma once

#include "kernels/block_selection/params.h"
#include "kernels/common/simd.h"

namespace heddle::kernels::block_selection {
namespace {  // NOLINT: ISA file (architecture.md T12)

// --- Sixteen sums at once -----------------------------------------------------------------------

// Lane i of the result is the lane sum of v[i], in the order of Sum(): lanes i and i + 8, then 4, 2
// and 1 apart.
#ifdef __AVX512F__
// Lanes of a and b folded to half as many partial sums, a's first.
inline F16 Fold8(F16 a, F16 b) {
  const I16 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 8);
}
inline F16 Fold4(F16 a, F16 b) {
  const I16 low = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 4);
}
inline F16 Fold2(F16 a, F16 b) {
  const I16 low = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 2);
}
inline F16 Fold1(F16 a, F16 b) {
  const I16 low = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 1);
}
inline F16 SumEach(const F16 v[kLanes]) {
  F16 eight[8];
  for (int i = 0; i < 8; ++i) eight[i] = Fold8(v[2 * i], v[2 * i + 1]);
  F16 four[4];
  for (int i = 0; i < 4; ++i) four[i] = Fold4(eight[2 * i], eight[2 * i + 1]);
  return Fold1(Fold2(four[0], four[1]), Fold2(four[2], four[3]));
}
#else
inline F16 SumEach(const F16 v[kLanes]) {
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = Sum(v[i]);
  return Load(sums);
}
#endif

// --- Probabilities ------------------------------------------------------------------------------
// Tiles of 16 windows; for each head of the group 16 dot products of D / 16 vectors, folded into
// one vector of logits by a tree of shuffles; exp; the sum over heads stays in a register.

// Keys whose sums stay in registers together. Sums of keys are independent: the number changes
// speed, not bits.
#ifdef __AVX512F__
constexpr int64_t kKeysAtOnce = 8;
#else
constexpr int64_t kKeysAtOnce = 4;
#endif

inline void PartialDots(const float* query, const float* const* key, int64_t dim, F16* sums) {
  F16 own[kKeysAtOnce] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const F16 q = Load(query + d);
    for (int64_t i = 0; i < kKeysAtOnce; ++i) own[i] += q * Load(key[i] + d);
  }
  if (d < dim) {
    const F16 q = LoadPart(query + d, dim - d);
    for (int64_t i = 0; i < kKeysAtOnce; ++i) own[i] += q * LoadPart(key[i] + d, dim - d);
  }
  for (int64_t i = 0; i < kKeysAtOnce; ++i) sums[i] = own[i];
}

// Dot products of a query with 16 keys.
inline F16 Logits(const float* query, const float* const key[kLanes], int64_t dim) {
  F16 sums[kLanes];
  for (int64_t i = 0; i < kLanes; i += kKeysAtOnce) PartialDots(query, key + i, dim, sums + i);
  return SumEach(sums);
}

// probability[0 .. windows rounded up to a tile).
inline void WindowProbabilities(const Selection<float>& p, int64_t row, int64_t group,
                                int64_t windows, float* probability) {
  const Shape& s = p.shape;
  const int64_t group_size = s.heads / s.kv_heads;
  const float scale = static_cast<float>(s.scale);
  const float* keys = p.kc + (p.window_first[row] * s.kv_heads + group) * s.dim;
  const float* queries = p.q + row * p.q_stride + group * group_size * s.dim;
  const float* lse = p.lse + row * s.heads + group * group_size;
  for (int64_t tile = 0; tile < windows; tile += kLanes) {
    const float* key[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      // Places beyond the last visible window repeat it; nobody reads their result.
      const int64_t j = tile + i < windows ? tile + i : windows - 1;
      key[i] = keys + j * s.kv_heads * s.dim;
    }
    F16 sum{};
    for (int64_t h = 0; h < group_size; ++h) {
      sum += Exp(Logits(queries + h * s.dim, key, s.dim) * scale - lse[h]);
    }
    Store(sum, probability + tile);
  }
}

// --- Scores -------------------------------------------------------------------------------------
// Probabilities, in the order of windows, go to the one or two blocks that they overlap.

inline void BlockScores(const Shape& s, const float* probability, int64_t windows, int64_t blocks,
                        float* score) {
  for (int64_t i = 0; i < blocks; ++i) score[i] = 0.0f;
  const int64_t width = s.kernel_size / s.stride;  // in strides
  const int64_t block = s.block / s.stride;
  int64_t i = 0;
  int64_t block_end = block;
  for (int64_t j = 0; j < windows; ++j) {
    if (j == block_end) {
      ++i;
      block_end += block;
    }
    const int64_t inside = block_end - j < width ? block_end - j : width;
    score[i] += probability[j] * static_cast<float>(inside);
    if (inside < width) score[i + 1] += probability[j] * static_cast<float>(width - inside);
  }
}

inline bool IsNan(float x) { return x != x; }
// Strictly better: higher, or a number where the other is NaN.
inline bool Better(float a, float b) { return IsNan(b) ? !IsNan(a) : a > b; }

// --- The best blocks ----------------------------------------------------------------------------
// One pass over the blocks that are not forced keeps the best of them in order.

// best_* hold the `room` best of blocks [begin, end), best first, lower block first among equals.
inline void KeepBest(const float* score, int64_t begin, int64_t end, int64_t room,
                     float* best_score, int32_t* best_block) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (count == room && !Better(score[i], best_score[room - 1])) continue;
    int64_t place = count < room ? count++ : room - 1;
    while (place > 0 && Better(score[i], best_score[place - 1])) {
      best_score[place] = best_score[place - 1];
      best_block[place] = best_block[place - 1];
      --place;
    }
    best_score[place] = score[i];
    best_block[place] = static_cast<int32_t>(i);
  }
}

inline void SortAscending(int32_t* values, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const int32_t value = values[i];
    int64_t place = i;
    while (place > 0 && values[place - 1] > value) {
      values[place] = values[place - 1];
      --place;
    }
    values[place] = value;
  }
}

// Writes `count` = ChosenBlocks() blocks, ascending. best_score: scratch for `count` scores.
inline void ChooseBlocks(const Shape& s, const float* score, int64_t candidates, int64_t count,
                         float* best_score, int32_t* chosen) {
  if (count == candidates) {
    for (int64_t i = 0; i < count; ++i) chosen[i] = static_cast<int32_t>(i);
    return;
  }
  // candidates > n >= init + local: the two forced ranges do not meet.
  const int64_t local_begin = candidates - s.local_blocks;
  const int64_t room = count - s.init_blocks - s.local_blocks;
  for (int64_t i = 0; i < s.init_blocks; ++i) chosen[i] = static_cast<int32_t>(i);
  int32_t* free_places = chosen + s.init_blocks;
  if (room > 0) KeepBest(score, s.init_blocks, local_begin, room, best_score, free_places);
  SortAscending(free_places, room);
  for (int64_t i = 0; i < s.local_blocks; ++i) {
    free_places[room + i] = static_cast<int32_t>(local_begin + i);
  }
}

int64_t Select(const Selection<float>& p, Rows rows, float* scratch) {
  const Shape& s = p.shape;
  int64_t nan_rows = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t windows = VisibleWindows(s, p.position[row]);
    const int64_t candidates = p.position[row] / s.block + 1;
    const int64_t count = ChosenBlocks(s, p.position[row]);
    float* probability = scratch;
    float* score = probability + (windows + kLanes - 1) / kLanes * kLanes;
    float* best_score = score + candidates;
    for (int64_t g = 0; g < s.kv_heads; ++g) {
      const int64_t pair = row * s.kv_heads + g;
      // All candidates are chosen: only the scores themselves could be wanted.
      if (count < candidates || p.scores != nullptr) {
        WindowProbabilities(p, row, g, windows, probability);
        BlockScores(s, probability, windows, candidates, score);
        bool has_nan = false;
        for (int64_t i = 0; i < candidates; ++i) has_nan = has_nan || IsNan(score[i]);
        if (has_nan) ++nan_rows;
      }
      ChooseBlocks(s, score, candidates, count, best_score, p.blocks + p.offsets[pair]);
      if (p.scores == nullptr) continue;
      float* out = p.scores + pair * p.score_blocks;
      for (int64_t i = 0; i < p.score_blocks; ++i) out[i] = i < candidates ? score[i] : 0.0f;
    }
  }
  return nan_rows;
}

}  // namespace
}  // namespace heddle::kernels::block_selection
