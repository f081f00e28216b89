// The target of the KL: the mean over heads of the attention's probabilities, exp(scale q.k - lse).
//
// Two ways to the same numbers, to rounding. Keys that many rows share are packed in transposed
// tiles like the indexer's: a lane is a key. Keys that one row selected are read where they lie: a
// lane is a part of the head's width, and sums of (key, head) pairs are folded into one vector.
// Which one is used depends on the kind of key set only.
// Included by the bodies of ISA files only.
#pragma once

#include "kernels/indexer/body_scores.h"

namespace heddle::kernels::indexer {
namespace {  // NOLINT: ISA file (architecture.md T12)

// ---- Packed keys
// -----------------------------------------------------------------------------------

// target [kTile] += exp(scale dots - lse).
template <typename T>
__attribute__((noinline)) void AddProbabilities(const T* dots, T scale, T lse, T* target) {
  for (int64_t x = 0; x < kTile; x += kWidth<T>) {
    const Value<T> p = ExpLanes(LoadLanes(dots + x) * scale - lse);
    StoreLanes(LoadLanes(target + x) + p, target + x);
  }
}

// Packed tiles of every key head, keys [first + at, first + at + count).
template <typename T>
inline void PackAttentionTiles(const Kl<T>& p, int64_t first, int64_t at, int64_t count, T* tiles) {
  for (int64_t j = 0; j < p.kv_heads; ++j) {
    const KeyRows<T> keys{p.attention_k + j * p.key_dim, p.k_stride, nullptr, first};
    PackTile(keys, at, count, p.key_dim, tiles + j * TileSize(p.key_dim));
  }
}
inline int64_t TargetDotsSize(int64_t group) { return Max(group, kDotRows) * kTile; }

// target [rows, target_stride], kTile columns: mean over heads of the probabilities of rows
// [row, row + rows). At most kDotRows rows. Heads are added in ascending order.
template <typename T>
inline void TargetTile(const Kl<T>& p, int64_t row, int64_t rows, const T* tiles, T* dots,
                       T* target, int64_t target_stride) {
  const int64_t group = p.attention_heads / p.kv_heads;
  const T scale = static_cast<T>(p.attention_scale);
  const T* lse = p.lse + row * p.attention_heads;
  Product<T> product;
  product.depth = p.key_dim;
  product.b_stride = product.columns = product.c_stride = kTile;
  product.c = dots;
  for (int64_t r = 0; r < rows; ++r) Zero(target + r * target_stride, kTile);
  for (int64_t j = 0; j < p.kv_heads; ++j) {
    product.b = tiles + j * TileSize(p.key_dim);
    const T* q = p.attention_q + row * p.q_stride + j * group * p.key_dim;
    // Long sides of the product: the heads of one row, or the rows of one head.
    if (rows <= group) {
      product.a_stride = p.key_dim;
      for (int64_t r = 0; r < rows; ++r) {
        product.a = q + r * p.q_stride;
        Multiply(product, group);
        for (int64_t g = 0; g < group; ++g) {
          AddProbabilities(dots + g * kTile, scale, lse[r * p.attention_heads + j * group + g],
                           target + r * target_stride);
        }
      }
    } else {
      product.a_stride = p.q_stride;
      for (int64_t g = 0; g < group; ++g) {
        product.a = q + g * p.key_dim;
        Multiply(product, rows);
        for (int64_t r = 0; r < rows; ++r) {
          AddProbabilities(dots + r * kTile, scale, lse[r * p.attention_heads + j * group + g],
                           target + r * target_stride);
        }
      }
    }
  }
  const T mean = T{1} / static_cast<T>(p.attention_heads);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t x = 0; x < kTile; ++x) target[r * target_stride + x] *= mean;
  }
}

// ---- Keys of one row ----------------------------------------------------------------------------

// Sums of neighbours: those of a, then those of b. V is a vector of T, I one of its indices.
template <typename I, typename V>
inline V Fold(V a, V b) {
  I even;
  I odd;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(a[0])); ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// A step of DotBlock over one vector of the head's width; load(from) gives it.
template <typename T, int kHeads, typename Load>
inline void DotStep(const T* const* keys, const T* q, int64_t width, int64_t d, const Load& load,
                    Native<T>* sum) {
  constexpr int kKeys = kNative<T> / kHeads;
  Native<T> k[kKeys];
  for (int i = 0; i < kKeys; ++i) k[i] = load(keys[i] + d);
  for (int h = 0; h < kHeads; ++h) {
    const Native<T> query = load(q + h * width + d);
    for (int i = 0; i < kKeys; ++i) sum[i * kHeads + h] += k[i] * query;
  }
}

// Lane key * kHeads + head: q[head] . keys[key]. Meanwhile fetches the same part of `next`.
template <typename T, int kHeads>
inline Native<T> DotBlock(const T* const* keys, const T* const* next, const T* q, int64_t width) {
  constexpr int kKeys = kNative<T> / kHeads;
  Native<T> sum[kNative<T>];
  for (Native<T>& zero : sum) zero = Native<T>{};
  int64_t d = 0;
  for (; d + kNative<T> <= width; d += kNative<T>) {
    for (int i = 0; i < kKeys; ++i) __builtin_prefetch(next[i] + d, 0, 2);
    DotStep<T, kHeads>(
        keys, q, width, d, [](const T* from) { return LoadAs<Native<T>>(from); }, sum);
  }
  if (d < width) {
    const size_t bytes = static_cast<size_t>(width - d) * sizeof(T);
    const auto part = [&](const T* from) {
      Native<T> out = {};
      std::memcpy(&out, from, bytes);
      return out;
    };
    DotStep<T, kHeads>(keys, q, width, d, part, sum);
  }
  for (int64_t many = kNative<T> / 2; many > 0; many /= 2) {
    for (int64_t i = 0; i < many; ++i) {
      sum[i] = Fold<typename Types<T>::NativeOrders>(sum[2 * i], sum[2 * i + 1]);
    }
  }
  return sum[0];
}

// Keys of one key head: a tile's, and those that come after it. All are valid.
template <typename T>
struct TileKeys {
  const T* now[kTile];
  const T* next[kTile];
};

// sums [kTile] += probabilities of kHeads heads of one key head.
template <typename T, int kHeads>
inline void AddHeads(const TileKeys<T>& keys, int64_t count, const T* q, int64_t width, T scale,
                     const T* lse, T* sums) {
  alignas(64) T dots[kTile * kHeads];  // [key, head]
  constexpr int64_t kKeys = kNative<T> / kHeads;
  const int64_t padded = RoundUp(count, kWidth<T>);
  for (int64_t i = 0; i < padded; i += kKeys) {
    StoreLanes(DotBlock<T, kHeads>(keys.now + i, keys.next + i, q, width), dots + i * kHeads);
  }
  T by_lane[kWidth<T>];
  for (int64_t i = 0; i < kWidth<T>; ++i) by_lane[i] = lse[i % kHeads];
  const Value<T> shift = LoadLanes(by_lane);
  for (int64_t i = 0; i < padded; i += kWidth<T>) {
    Value<T> e[kHeads];
    for (int64_t v = 0; v < kHeads; ++v) {
      e[v] = ExpLanes(LoadLanes(dots + i * kHeads + v * kWidth<T>) * scale - shift);
    }
    for (int64_t many = kHeads / 2; many > 0; many /= 2) {
      for (int64_t v = 0; v < many; ++v) e[v] = Fold<Orders<T>>(e[2 * v], e[2 * v + 1]);
    }
    StoreLanes(LoadLanes(sums + i) + e[0], sums + i);
  }
}

// target [kTile] of one row for the first kTile of keys list[0 .. count), count > 0.
template <typename T>
__attribute__((noinline)) void GatheredTarget(const Kl<T>& p, int64_t row, const int32_t* list,
                                              int64_t count, T* target) {
  const int64_t group = p.attention_heads / p.kv_heads;
  const T scale = static_cast<T>(p.attention_scale);
  const int64_t present = Min(count, kTile);
  Zero(target, kTile);
  for (int64_t j = 0; j < p.kv_heads; ++j) {
    TileKeys<T> keys;
    const T* base = p.attention_k + j * p.key_dim;
    for (int64_t i = 0; i < kTile; ++i) {
      keys.now[i] = base + list[Min(i, present - 1)] * p.k_stride;
      keys.next[i] = base + list[Min(i + kTile, count - 1)] * p.k_stride;
    }
    const T* q = p.attention_q + row * p.q_stride + j * group * p.key_dim;
    const T* lse = p.lse + row * p.attention_heads + j * group;
    int64_t h = 0;
    if constexpr (kNative<T> >= 4) {
      for (; h + 4 <= group; h += 4) {
        AddHeads<T, 4>(keys, present, q + h * p.key_dim, p.key_dim, scale, lse + h, target);
      }
    }
    for (; h + 2 <= group; h += 2) {
      AddHeads<T, 2>(keys, present, q + h * p.key_dim, p.key_dim, scale, lse + h, target);
    }
    for (; h < group; ++h) {
      AddHeads<T, 1>(keys, present, q + h * p.key_dim, p.key_dim, scale, lse + h, target);
    }
  }
  const T mean = T{1} / static_cast<T>(p.attention_heads);
  for (int64_t x = 0; x < kTile; ++x) target[x] *= mean;
}

}  // namespace
}  // namespace heddle::kernels::indexer
