// Bodies of sparse attention, compiled once per instruction set; generic.cc also for double. The
// algorithm is drawn in README.md. A tile is the next kTile keys of the row's set, wherever they
// lie: neither the row range nor other documents change it. Every score is one chain of products in
// order of the width and one lane sum, whatever block it is computed in, so both passes of the
// backward see the bits of the forward.
// Memory map: 64 rows of K or V of width 128 are 32 KiB and pass through L1 once per group; scores
// of 16 heads x 64 keys are 4 KiB on the stack; out, dq, dk, dv are accumulated in place.
// Included by generic.cc, avx2.cc and avx512.cc only.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/sparse_attention/lanes.h"
#include "kernels/sparse_attention/params.h"

namespace heddle::kernels::sparse_attention {
namespace {  // NOLINT: ISA file (architecture.md T12)

constexpr int64_t kTile = 64;       // keys per step of the online softmax
constexpr int64_t kHeadChunk = 16;  // query heads whose scores are held at once
// Rows whose tiles are taken in turn, and (row, query head) whose statistics are held at once.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kStates = 512;
// Registers of a block of products: heads x keys, heads x vectors.
constexpr int kHeadBlock = kAccumulators == 16 ? 4 : 2;
constexpr int kVectorBlock = kHeadBlock;
static_assert(kTile % 16 == 0 && kHeadChunk % kHeadBlock == 0);

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- Keys of a row -----------------------------------------------------------------------------

// The next keys of a row: at most kTile, the last one repeated up to kTile, so that blocks of keys
// need no tail.
struct Tile {
  int64_t row = 0;
  int64_t count = 0;
  int32_t keys[kTile];
};

// Walks the set of (row, key head), restricted to keys [low, high), in tiles.
class KeyWalk {
 public:
  KeyWalk() = default;
  KeyWalk(const KeySets& sets, int64_t row, int64_t kv_head, int64_t low, int64_t high)
      : low_(low), limit_(Min(high, sets.end[row])), width_(sets.width) {
    const int64_t at = row * sets.set_heads + (sets.set_heads == 1 ? 0 : kv_head);
    span_ = sets.first + sets.offsets[at];
    last_ = sets.first + sets.offsets[at + 1];
    if (low <= 0) return;
    // The first span that ends after `low`.
    int64_t count = last_ - span_;
    while (count > 0) {
      const int64_t half = count / 2;
      if (span_[half] + width_ <= low) {
        span_ += half + 1;
        count -= half + 1;
      } else {
        count = half;
      }
    }
  }

  // False at the end.
  bool Next(Tile* tile) {
    int64_t count = 0;
    if (width_ == 1) {
      while (count < kTile && span_ != last_ && *span_ < limit_) tile->keys[count++] = *span_++;
    } else {
      count = NextOfSpans(tile->keys);
    }
    tile->count = count;
    if (count == 0) return false;
    for (int64_t i = count; i < kTile; ++i) tile->keys[i] = tile->keys[count - 1];
    return true;
  }

 private:
  int64_t NextOfSpans(int32_t* keys) {
    int64_t count = 0;
    while (count < kTile) {
      if (key_ >= stop_) {
        if (span_ == last_ || *span_ >= limit_) break;
        key_ = Max(*span_, low_);
        stop_ = Min(*span_ + width_, limit_);
        ++span_;
      }
      const int64_t take = Min(stop_ - key_, kTile - count);
      for (int64_t i = 0; i < take; ++i) keys[count + i] = static_cast<int32_t>(key_ + i);
      key_ += take;
      count += take;
    }
    return count;
  }

  const int32_t* span_ = nullptr;
  const int32_t* last_ = nullptr;
  int64_t low_ = 0;
  int64_t limit_ = 0;
  int64_t width_ = 0;
  int64_t key_ = 0;  // [key_, stop_): rest of the span before span_
  int64_t stop_ = 0;
};

// Calls body(tile, the tile after it) for all tiles that next(Tile*) yields, so that the body can
// fetch ahead. The last tile is its own successor.
template <typename Next, typename Body>
inline void ForTiles(const Next& next, const Body& body) {
  Tile tiles[2];
  int now = 0;
  bool some = next(&tiles[now]);
  while (some) {
    const bool more = next(&tiles[1 - now]);
    body(tiles[now], more ? tiles[1 - now] : tiles[now]);
    now = 1 - now;
    some = more;
  }
}

// Starts to bring a row into the second-level cache.
template <typename T>
inline void Fetch(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d, 0, 2);
}

// Rows of one key head.
template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t stride = 0;
  int64_t width = 0;
  T* row(int32_t i) const { return data + i * stride; }
};
template <typename T>
Matrix<const T> KeysOf(const Problem<T>& p, int64_t j) {
  return {p.k + j * p.key_dim, p.k_stride, p.key_dim};
}
template <typename T>
Matrix<const T> ValuesOf(const Problem<T>& p, int64_t j) {
  return {p.v + j * p.value_dim, p.v_stride, p.value_dim};
}

// ---- Products ----------------------------------------------------------------------------------

// Covers the heads with blocks: blocks<kH>(h).
template <typename Blocks>
inline void ForHeads(int64_t heads, const Blocks& blocks) {
  int64_t h = 0;
  if constexpr (kHeadBlock == 4) {
    for (; h + 4 <= heads; h += 4) blocks.template operator()<4>(h);
  }
  for (; h + 2 <= heads; h += 2) blocks.template operator()<2>(h);
  if (h < heads) blocks.template operator()<1>(h);
}

// to[h kTile + i] = a[h].b[keys[i]] for kH heads and keys [0, count), kK at a time. Fetches rows of
// the keys `ahead` (nullable).
template <typename T, int kH>
inline void DotBlocks(const T* a, const Matrix<const T>& b, const int32_t* keys, int64_t count,
                      const int32_t* ahead, T* to) {
  using V = VectorOf<T>;
  constexpr int kK = kAccumulators / kH;
  constexpr int64_t kStep = kLanesOf<T>;
  const int64_t whole = b.width / kStep * kStep;
  for (int64_t i = 0; i < count; i += kK) {
    const T* rows[kK];
    V sums[kAccumulators];
#pragma GCC unroll 16
    for (int k = 0; k < kK; ++k) rows[k] = b.row(keys[i + k]);
    if (ahead != nullptr) {
      for (int k = 0; k < kK; ++k) Fetch(b.row(ahead[i + k]), b.width);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kAccumulators; ++n) sums[n] = V{};
    const auto add = [&](const auto& load, int64_t d) {
      V y[kK];
#pragma GCC unroll 16
      for (int k = 0; k < kK; ++k) y[k] = load(rows[k] + d);
#pragma GCC unroll 16
      for (int h = 0; h < kH; ++h) {
        const V x = load(a + h * b.width + d);
#pragma GCC unroll 16
        for (int k = 0; k < kK; ++k) sums[h * kK + k] += x * y[k];
      }
    };
    for (int64_t d = 0; d < whole; d += kStep) {
      add([](const T* from) { return Load(from); }, d);
    }
    if (whole < b.width) {
      add([&](const T* from) { return LoadTail(from, b.width - whole); }, whole);
    }
    T lanes[kAccumulators];
    LaneSums(sums, lanes);
    for (int h = 0; h < kH; ++h) std::memcpy(to + h * kTile + i, lanes + h * kK, kK * sizeof(T));
  }
}

// The same for any number of heads: to[h kTile + i] = a[h].b[tile.keys[i]]. Rows of `a` are
// contiguous. Sixteen keys at a time stay in L1 for all heads.
template <typename T>
void Dots(int64_t heads, const T* a, const Matrix<const T>& b, const Tile& tile, const Tile& ahead,
          T* to) {
  for (int64_t i = 0; i < tile.count; i += 16) {
    const int64_t n = Min(16, tile.count - i);
    ForHeads(heads, [&]<int kH>(int64_t h) {
      DotBlocks<T, kH>(a + h * b.width, b, tile.keys + i, n, h == 0 ? ahead.keys + i : nullptr,
                       to + h * kTile + i);
    });
  }
}

// What a sum over keys needs: to[h] = to[h] factor[h] + sum_i weights[h kTile + i] b[key i].
template <typename T>
struct Weighted {
  int64_t heads = 0;
  Matrix<const T> b;
  const Tile& tile;
  const Tile* ahead = nullptr;  // rows of its keys are fetched; nullable
  const T* weights = nullptr;
  const T* factor = nullptr;  // [heads]
  T* to = nullptr;            // [heads, b.width] contiguous
};

// Elements [d, d + kV vectors) of heads [h, h + kH); `tail` < one vector with kV = 1, or 0.
template <typename T, int kH, int kV>
inline void WeightedBlock(const Weighted<T>& w, int64_t h, int64_t d, int64_t tail) {
  using V = VectorOf<T>;
  constexpr int64_t kStep = kLanesOf<T>;
  const auto load = [&](const T* from) { return tail > 0 ? LoadTail(from, tail) : Load(from); };
  T* to = w.to + h * w.b.width + d;
  const T* weights = w.weights + h * kTile;
  V sums[kH * kV];
#pragma GCC unroll 16
  for (int n = 0; n < kH * kV; ++n) {
    sums[n] = load(to + n / kV * w.b.width + n % kV * kStep) * w.factor[h + n / kV];
  }
  const bool fetches = w.ahead != nullptr && h == 0;
  for (int64_t i = 0; i < w.tile.count; ++i) {
    const T* row = w.b.row(w.tile.keys[i]) + d;
    if (fetches) Fetch(w.b.row(w.ahead->keys[i]) + d, kV * kStep);
    V y[kV];
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) y[v] = load(row + v * kStep);
#pragma GCC unroll 16
    for (int n = 0; n < kH * kV; ++n) sums[n] += y[n % kV] * weights[n / kV * kTile + i];
  }
#pragma GCC unroll 16
  for (int n = 0; n < kH * kV; ++n) {
    T* at = to + n / kV * w.b.width + n % kV * kStep;
    if (tail > 0) {
      StoreTail(sums[n], at, tail);
    } else {
      Store(sums[n], at);
    }
  }
}

// What a sum over heads needs: to[key i] += sum_h weights[h kTile + i] a[h], heads ascending.
template <typename T>
struct Outer {
  int64_t heads = 0;
  const T* a = nullptr;  // [heads, to.width] contiguous
  const Tile& tile;
  const T* weights = nullptr;
  Matrix<T> to;
};

template <typename T, int kH, int kV>
inline void OuterBlock(const Outer<T>& o, int64_t h, int64_t d, int64_t tail) {
  using V = VectorOf<T>;
  constexpr int64_t kStep = kLanesOf<T>;
  const auto load = [&](const T* from) { return tail > 0 ? LoadTail(from, tail) : Load(from); };
  const T* a = o.a + h * o.to.width + d;
  const T* weights = o.weights + h * kTile;
  V x[kH * kV];
#pragma GCC unroll 16
  for (int n = 0; n < kH * kV; ++n) x[n] = load(a + n / kV * o.to.width + n % kV * kStep);
  for (int64_t i = 0; i < o.tile.count; ++i) {
    T* row = o.to.row(o.tile.keys[i]) + d;
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) {
      V sum = load(row + v * kStep);
#pragma GCC unroll 16
      for (int n = 0; n < kH; ++n) sum += x[n * kV + v] * weights[n * kTile + i];
      if (tail > 0) {
        StoreTail(sum, row + v * kStep, tail);
      } else {
        Store(sum, row + v * kStep);
      }
    }
  }
}

// Covers heads x width with blocks: run<kH, kV>(h, d, tail). A slice of the width is done for all
// heads before the next, so that it stays in L1.
template <typename T, typename Run>
inline void ForBlocks(int64_t heads, int64_t width, const Run& run) {
  constexpr int64_t kStep = kLanesOf<T>;
  int64_t d = 0;
  for (; d + kVectorBlock * kStep <= width; d += kVectorBlock * kStep) {
    ForHeads(heads, [&]<int kH>(int64_t h) { run.template operator()<kH, kVectorBlock>(h, d, 0); });
  }
  for (; d < width; d += kStep) {
    const int64_t tail = width - d < kStep ? width - d : 0;
    ForHeads(heads, [&]<int kH>(int64_t h) { run.template operator()<kH, 1>(h, d, tail); });
  }
}

template <typename T>
void AddWeighted(const Weighted<T>& w) {
  ForBlocks<T>(w.heads, w.b.width, [&]<int kH, int kV>(int64_t h, int64_t d, int64_t tail) {
    tail > 0 ? WeightedBlock<T, kH, 1>(w, h, d, tail) : WeightedBlock<T, kH, kV>(w, h, d, 0);
  });
}
template <typename T>
void AddOuter(const Outer<T>& o) {
  ForBlocks<T>(o.heads, o.to.width, [&]<int kH, int kV>(int64_t h, int64_t d, int64_t tail) {
    tail > 0 ? OuterBlock<T, kH, 1>(o, h, d, tail) : OuterBlock<T, kH, kV>(o, h, d, 0);
  });
}

// ---- Softmax -----------------------------------------------------------------------------------

// Scores of one head and tile become probabilities relative to the new maximum.
template <typename T>
inline void SoftmaxTile(T* scores, int64_t count, T scale, T* maximum, T* sum, T* correction) {
  using V = VectorOf<T>;
  constexpr int64_t kStep = kLanesOf<T>;
  const int64_t padded = RoundUp(count, kStep);
  for (int64_t i = count; i < padded; ++i) scores[i] = kLowest<T>;
  V best = Splat(*maximum);
  for (int64_t i = 0; i < padded; i += kStep) {
    const V score = Load(scores + i) * scale;
    best = Larger(score, best);
    Store(score, scores + i);
  }
  const T peak = LaneMax(best);
  V total{};
  for (int64_t i = 0; i < padded; i += kStep) {
    const V probability = Exp(Load(scores + i) - peak);
    total += probability;
    Store(probability, scores + i);
  }
  *correction = Exp(Splat(*maximum - peak))[0];
  *sum = *sum * *correction + LaneSum(total);
  *maximum = peak;
}

// Scores become P = exp(scale s - lse), d_probability becomes dS = scale P (dP - delta).
template <typename T>
inline void GradientTile(T* scores, T* d_probability, int64_t count, T scale, T lse, T delta) {
  using V = VectorOf<T>;
  constexpr int64_t kStep = kLanesOf<T>;
  const int64_t padded = RoundUp(count, kStep);
  for (int64_t i = count; i < padded; ++i) scores[i] = d_probability[i] = 0;
  for (int64_t i = 0; i < padded; i += kStep) {
    const V probability = Exp(Load(scores + i) * scale - lse);
    const V d_score = probability * (Load(d_probability + i) - delta) * scale;
    Store(probability, scores + i);
    Store(d_score, d_probability + i);
  }
}

template <typename T>
inline void ScaleRow(T* row, int64_t width, T factor) {
  constexpr int64_t kStep = kLanesOf<T>;
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) Store(Load(row + d) * factor, row + d);
  if (d < width) StoreTail(LoadTail(row + d, width - d) * factor, row + d, width - d);
}
template <typename T>
inline T Dot(const T* a, const T* b, int64_t width) {
  constexpr int64_t kStep = kLanesOf<T>;
  VectorOf<T> sum{};
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) sum += Load(a + d) * Load(b + d);
  if (d < width) sum += LoadTail(a + d, width - d) * LoadTail(b + d, width - d);
  return LaneSum(sum);
}

// ---- Rows --------------------------------------------------------------------------------------

// Some query heads of one key head.
struct Heads {
  int64_t kv_head = 0;
  int64_t first = 0;
  int64_t count = 0;
};

// The tiles of up to kRowBlock rows in turn: the first of every row, then the second of every row.
// Tiles of neighbouring rows lie close to each other (in windows and prefixes they are the same
// keys), so that K and V come from near caches. A row sees its own tiles in order all the same.
class RowBlock {
 public:
  template <typename T>
  RowBlock(const Problem<T>& p, Rows rows, int64_t kv_head)
      : first_(rows.begin), count_(rows.end - rows.begin) {
    for (int64_t i = 0; i < count_; ++i) {
      walks_[i] = KeyWalk(p.sets, first_ + i, kv_head, 0, std::numeric_limits<int64_t>::max());
    }
  }

  // False when no row has keys left.
  bool Next(Tile* tile) {
    for (int64_t tries = 0; tries < count_; ++tries) {
      const int64_t i = turn_;
      turn_ = turn_ + 1 < count_ ? turn_ + 1 : 0;
      tile->row = first_ + i;
      if (walks_[i].Next(tile)) return true;
    }
    return false;
  }

 private:
  int64_t first_;
  int64_t count_;
  int64_t turn_ = 0;
  KeyWalk walks_[kRowBlock];
};

// Calls body(rows, heads) so that rows x heads.count <= kStates.
template <typename T, typename Body>
inline void ForBlocksOfRows(const Problem<T>& p, Rows rows, const Body& body) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t step = Max(1, Min(kRowBlock, kStates / group));
  for (int64_t j = 0; j < p.kv_heads; ++j) {
    for (int64_t row = rows.begin; row < rows.end; row += step) {
      for (int64_t h = 0; h < group; h += kStates) {
        body(Rows{row, Min(rows.end, row + step)},
             Heads{j, j * group + h, Min(kStates, group - h)});
      }
    }
  }
}

template <typename T>
void ForwardBlock(const Forward<T>& f, Rows rows, Heads heads) {
  const Problem<T>& p = f.problem;
  T maximum[kStates];
  T sum[kStates];
  T correction[kHeadChunk];
  T scores[kHeadChunk * kTile];
  const auto out_of = [&](int64_t row) {
    return f.out + (row * p.heads + heads.first) * p.value_dim;
  };
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    std::memset(out_of(row), 0, static_cast<size_t>(heads.count * p.value_dim) * sizeof(T));
  }
  for (int64_t i = 0; i < (rows.end - rows.begin) * heads.count; ++i) {
    maximum[i] = kLowest<T>;
    sum[i] = 0;
  }
  RowBlock block(p, rows, heads.kv_head);
  const auto add_tile = [&](const Tile& tile, const Tile& ahead) {
    const T* q = p.q + tile.row * p.q_stride + heads.first * p.key_dim;
    const int64_t state = (tile.row - rows.begin) * heads.count;
    for (int64_t h = 0; h < heads.count; h += kHeadChunk) {
      const int64_t n = Min(kHeadChunk, heads.count - h);
      Dots(n, q + h * p.key_dim, KeysOf(p, heads.kv_head), tile, ahead, scores);
      for (int64_t i = 0; i < n; ++i) {
        SoftmaxTile(scores + i * kTile, tile.count, static_cast<T>(p.scale),
                    maximum + state + h + i, sum + state + h + i, correction + i);
      }
      AddWeighted<T>({n, ValuesOf(p, heads.kv_head), tile, &ahead, scores, correction,
                      out_of(tile.row) + h * p.value_dim});
    }
  };
  ForTiles([&](Tile* tile) { return block.Next(tile); }, add_tile);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const int64_t state = (row - rows.begin) * heads.count + h;
      // The largest probability is 1, so the sum of a set that has keys is at least 1, or NaN.
      const bool empty = sum[state] == 0;
      f.lse[row * p.heads + heads.first + h] =
          empty ? kLowest<T> : maximum[state] + std::log(sum[state]);
      if (!empty) ScaleRow(out_of(row) + h * p.value_dim, p.value_dim, 1 / sum[state]);
    }
  }
}

template <typename T>
void ForwardRun(const Forward<T>& f, Rows rows) {
  ForBlocksOfRows(f.problem, rows,
                  [&](Rows block, const Heads& heads) { ForwardBlock(f, block, heads); });
}

// P and dS of one tile and up to kHeadChunk heads from query head `first` on.
template <typename T>
struct Gradients {
  T probability[kHeadChunk * kTile];
  T d_scores[kHeadChunk * kTile];

  void Compute(const Backward<T>& b, int64_t j, int64_t first, int64_t heads, const Tile& tile,
               const Tile& ahead) {
    const Problem<T>& p = b.problem;
    const int64_t at = tile.row * p.heads + first;
    Dots(heads, p.q + tile.row * p.q_stride + first * p.key_dim, KeysOf(p, j), tile, ahead,
         probability);
    Dots(heads, b.dout + at * p.value_dim, ValuesOf(p, j), tile, ahead, d_scores);
    for (int64_t h = 0; h < heads; ++h) {
      GradientTile(probability + h * kTile, d_scores + h * kTile, tile.count,
                   static_cast<T>(p.scale), b.lse[at + h], b.delta[at + h]);
    }
  }
};

template <typename T>
void BackwardQueriesBlock(const Backward<T>& b, Rows rows, Heads heads) {
  const Problem<T>& p = b.problem;
  T ones[kHeadChunk];
  Gradients<T> gradients;
  for (T& one : ones) one = 1;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t at = row * p.heads + heads.first;
    std::memset(b.dq + at * p.key_dim, 0, static_cast<size_t>(heads.count * p.key_dim) * sizeof(T));
    for (int64_t h = at; h < at + heads.count; ++h) {
      b.delta[h] = Dot(b.dout + h * p.value_dim, b.out + h * p.value_dim, p.value_dim);
    }
  }
  RowBlock block(p, rows, heads.kv_head);
  const auto add_tile = [&](const Tile& tile, const Tile& ahead) {
    for (int64_t h = heads.first; h < heads.first + heads.count; h += kHeadChunk) {
      const int64_t n = Min(kHeadChunk, heads.first + heads.count - h);
      gradients.Compute(b, heads.kv_head, h, n, tile, ahead);
      AddWeighted<T>({n, KeysOf(p, heads.kv_head), tile, nullptr, gradients.d_scores, ones,
                      b.dq + (tile.row * p.heads + h) * p.key_dim});
    }
  };
  ForTiles([&](Tile* tile) { return block.Next(tile); }, add_tile);
}

template <typename T>
void BackwardQueriesRun(const Backward<T>& b, Rows rows) {
  ForBlocksOfRows(b.problem, rows,
                  [&](Rows block, const Heads& heads) { BackwardQueriesBlock(b, block, heads); });
}

template <typename T>
void BackwardKeysRun(const Backward<T>& b, KeyTask task) {
  const Problem<T>& p = b.problem;
  const int64_t j = task.kv_head;
  const int64_t group = p.heads / p.kv_heads;
  const Matrix<T> dk{b.dk + j * p.key_dim, p.kv_heads * p.key_dim, p.key_dim};
  const Matrix<T> dv{b.dv + j * p.value_dim, p.kv_heads * p.value_dim, p.value_dim};
  for (int64_t key = task.keys.begin; key < task.keys.end; ++key) {
    std::memset(dk.data + key * dk.stride, 0, static_cast<size_t>(dk.width) * sizeof(T));
    std::memset(dv.data + key * dv.stride, 0, static_cast<size_t>(dv.width) * sizeof(T));
  }
  int64_t row = task.rows.begin - 1;
  KeyWalk walk;
  const auto next = [&](Tile* tile) {
    while (!walk.Next(tile)) {
      if (++row >= task.rows.end) return false;
      if (p.sets.end[row] > task.keys.begin) {
        walk = KeyWalk(p.sets, row, j, task.keys.begin, task.keys.end);
      }
    }
    tile->row = row;
    Fetch(p.q + row * p.q_stride + j * group * p.key_dim, group * p.key_dim);
    Fetch(b.dout + (row * p.heads + j * group) * p.value_dim, group * p.value_dim);
    return true;
  };
  Gradients<T> gradients;
  ForTiles(next, [&](const Tile& tile, const Tile& ahead) {
    for (int64_t h = j * group; h < (j + 1) * group; h += kHeadChunk) {
      const int64_t n = Min(kHeadChunk, (j + 1) * group - h);
      gradients.Compute(b, j, h, n, tile, ahead);
      const T* g = b.dout + (tile.row * p.heads + h) * p.value_dim;
      const T* q = p.q + tile.row * p.q_stride + h * p.key_dim;
      AddOuter<T>({n, g, tile, gradients.probability, dv});
      AddOuter<T>({n, q, tile, gradients.d_scores, dk});
    }
  });
}

template <typename T>
constexpr Table<T> MakeTable() {
  return Table<T>{ForwardRun<T>, BackwardQueriesRun<T>, BackwardKeysRun<T>};
}

}  // namespace
}  // namespace heddle::kernels::sparse_attention
