// The scores of the indexer and what all its bodies are made of: vectors of T, packed key tiles,
// one matrix product.
//
// Keys are taken in tiles of kTile, transposed to [dI, kTile], so that a lane is a key: a score is
// one chain of multiply-adds over d, then one over heads, whatever rows and keys stand next to it.
// Tails are padded with zero keys, never computed by other code. Hence the same bits in every
// batch. Memory map: a tile of 64-wide keys is 8 KiB and stays in L1 while up to kRowBlock rows use
// it. Included by the bodies of ISA files only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernels/common/simd.h"
#include "kernels/indexer/params.h"

namespace heddle::kernels::indexer {
namespace {  // NOLINT: ISA file (architecture.md T12)

constexpr int64_t kTile = 32;      // keys
constexpr int64_t kRowBlock = 32;  // rows of one document that share packed tiles
constexpr int64_t kDotRows = 16;   // rows x heads of a product, if one row has not more heads

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- Vectors of 64 bytes, and the widest of the instruction set ---------------------------------

#if defined(__AVX512F__)
#define HEDDLE_INDEXER_NATIVE 64
#elif defined(__AVX__)
#define HEDDLE_INDEXER_NATIVE 32
#else
#define HEDDLE_INDEXER_NATIVE 16
#endif

template <typename T>
struct Types;
template <>
struct Types<float> {
  using Value = F16;
  using Order = int32_t;
  using Orders = I16;
  using Native = float __attribute__((vector_size(HEDDLE_INDEXER_NATIVE)));
  using NativeOrders = int32_t __attribute__((vector_size(HEDDLE_INDEXER_NATIVE)));
};
template <>
struct Types<double> {
  using Value = double __attribute__((vector_size(64)));
  using Order = int64_t;
  using Orders = int64_t __attribute__((vector_size(64)));
  using Native = double __attribute__((vector_size(HEDDLE_INDEXER_NATIVE)));
  using NativeOrders = int64_t __attribute__((vector_size(HEDDLE_INDEXER_NATIVE)));
};
#undef HEDDLE_INDEXER_NATIVE

template <typename T>
using Value = typename Types<T>::Value;
template <typename T>
using Orders = typename Types<T>::Orders;
template <typename T>
using Order = typename Types<T>::Order;
template <typename T>
constexpr int64_t kWidth = 64 / sizeof(T);
template <typename T>
using Native = typename Types<T>::Native;
template <typename T>
constexpr int64_t kNative = sizeof(Native<T>) / sizeof(T);

template <typename V, typename T>
inline V LoadAs(const T* from) {
  V out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
template <typename T>
inline Value<T> LoadLanes(const T* from) {
  return LoadAs<Value<T>>(from);
}
template <typename V, typename T>
inline void StoreLanes(V value, T* to) {
  std::memcpy(to, &value, sizeof(value));
}
template <typename T>
inline Orders<T> BitsOf(Value<T> v) {
  Orders<T> bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// All bits set in the lanes below `count`.
template <typename T>
inline Orders<T> LanesBelow(int64_t count) {
  Orders<T> index;
  for (int64_t i = 0; i < kWidth<T>; ++i) index[i] = static_cast<Order<T>>(i);
  return index < static_cast<Order<T>>(count);
}

// In one fixed order.
template <typename T>
inline T SumLanes(Value<T> v) {
  T x[kWidth<T>];
  StoreLanes(v, x);
  for (int64_t width = kWidth<T> / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
// NaN is passed over.
template <typename T>
inline T MaxLanes(Value<T> v) {
  T x[kWidth<T>];
  StoreLanes(v, x);
  T best = -std::numeric_limits<T>::infinity();
  for (const T lane : x) best = lane > best ? lane : best;
  return best;
}

inline float ExpOf(float x) { return __builtin_expf(x); }
inline double ExpOf(double x) { return __builtin_exp(x); }
inline float LogOf(float x) { return __builtin_logf(x); }
inline double LogOf(double x) { return __builtin_log(x); }

inline F16 ExpLanes(F16 x) { return Exp(x); }
inline Types<double>::Value ExpLanes(Types<double>::Value x) {
  for (int64_t i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// ln x of normal positive numbers, relative error below 2 ulp. Others give a finite value, NaN NaN.
inline F16 LogLanes(F16 x) {
  const I16 bits = BitsOf<float>(x);
  I16 exponent = (bits >> 23) - 126;
  const I16 mantissa_bits = (bits & 0x007fffff) | 0x3f000000;
  F16 m;
  std::memcpy(&m, &mantissa_bits, sizeof(m));  // [0.5, 1)
  const I16 low = m < 0.70710678f;
  exponent += low;
  m = m - 1.0f + (low ? m : F16{});
  const F16 e = __builtin_convertvector(exponent, F16);
  const F16 z = m * m;
  F16 p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  p = p + e * -2.12194440e-4f - z * 0.5f;
  const F16 y = m + p + e * 0.693359375f;
  return x != x ? x : y;
}
inline Types<double>::Value LogLanes(Types<double>::Value x) {
  for (int64_t i = 0; i < kWidth<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// ---- Scratch ------------------------------------------------------------------------------------

// Owned, aligned to a cache line, not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = static_cast<size_t>(RoundUp(Max(count, 1) * sizeof(T), 64));
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) std::abort();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }

 private:
  T* data_;
};

template <typename T>
inline void Zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
}

// ---- Packed keys --------------------------------------------------------------------------------

// Rows of a [rows, stride] tensor: list[0], list[1], .. or first, first + 1, ..
template <typename T>
struct KeyRows {
  const T* base = nullptr;
  int64_t stride = 0;
  const int32_t* list = nullptr;
  int64_t first = 0;

  const T* Row(int64_t i) const { return base + (list != nullptr ? list[i] : first + i) * stride; }
};

#ifdef __AVX512F__
inline F16 InterleaveLow(F16 a, F16 b) {
  return __builtin_shuffle(a, b, I16{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29});
}
inline F16 InterleaveHigh(F16 a, F16 b) {
  return __builtin_shuffle(a, b, I16{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
}
inline F16 PairsLow(F16 a, F16 b) {
  return __builtin_shuffle(a, b, I16{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
}
inline F16 PairsHigh(F16 a, F16 b) {
  return __builtin_shuffle(a, b, I16{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
}
// Quarters 0 and 2, or 1 and 3, of a, then of b.
inline F16 EvenQuarters(F16 a, F16 b) {
  return __builtin_shuffle(a, b, I16{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
}
inline F16 OddQuarters(F16 a, F16 b) {
  return __builtin_shuffle(a, b, I16{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}

// to[d, lane] = rows[lane][at + d] for d < 16; lanes from `count` and elements from `width` on are
// 0.
inline void TransposeBlock(const float* const* rows, int64_t count, int64_t at, int64_t width,
                           float* to) {
  const __mmask16 part = static_cast<__mmask16>(width >= 16 ? 0xffffu : (1u << width) - 1u);
  F16 r[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = i < count ? reinterpret_cast<F16>(_mm512_maskz_loadu_ps(part, rows[i] + at)) : F16{};
  }
  F16 t[16];  // t[4 g + c], quarter q: column 4 q + c of rows 4 g .. 4 g + 3
  for (int i = 0; i < 16; i += 4) {
    const F16 a = InterleaveLow(r[i], r[i + 1]);
    const F16 b = InterleaveHigh(r[i], r[i + 1]);
    const F16 c = InterleaveLow(r[i + 2], r[i + 3]);
    const F16 d = InterleaveHigh(r[i + 2], r[i + 3]);
    t[i] = PairsLow(a, c);
    t[i + 1] = PairsHigh(a, c);
    t[i + 2] = PairsLow(b, d);
    t[i + 3] = PairsHigh(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const F16 a = EvenQuarters(t[i], t[i + 4]);
    const F16 b = OddQuarters(t[i], t[i + 4]);
    const F16 c = EvenQuarters(t[i + 8], t[i + 12]);
    const F16 d = OddQuarters(t[i + 8], t[i + 12]);
    StoreLanes(EvenQuarters(a, c), to + i * kTile);
    StoreLanes(EvenQuarters(b, d), to + (i + 4) * kTile);
    StoreLanes(OddQuarters(a, c), to + (i + 8) * kTile);
    StoreLanes(OddQuarters(b, d), to + (i + 12) * kTile);
  }
}

// to [RoundUp(width, 16), kTile] = keys [at, at + count) of `keys`, transposed.
inline void PackTile(const KeyRows<float>& keys, int64_t at, int64_t count, int64_t width,
                     float* to) {
  for (int64_t half = 0; half < kTile; half += 16) {
    const int64_t present = Min(Max(count - half, 0), 16);
    const float* rows[16];
    for (int64_t i = 0; i < present; ++i) rows[i] = keys.Row(at + half + i);
    for (int64_t d = 0; d < width; d += 16) {
      TransposeBlock(rows, present, d, width - d, to + d * kTile + half);
    }
  }
}
#endif

template <typename T>
inline void PackTile(const KeyRows<T>& keys, int64_t at, int64_t count, int64_t width, T* to) {
  if (count < kTile) Zero(to, width * kTile);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = keys.Row(at + i);
    for (int64_t d = 0; d < width; ++d) to[d * kTile + i] = row[d];
  }
}

// Elements of a packed tile.
inline int64_t TileSize(int64_t width) { return RoundUp(width, 16) * kTile; }

// ---- The matrix product -------------------------------------------------------------------------

template <typename T>
struct Product {
  int64_t depth = 0;
  const T* a = nullptr;  // [rows, depth]
  int64_t a_stride = 0;
  const T* b = nullptr;  // [depth, columns]
  int64_t b_stride = 0;
  int64_t columns = 0;  // multiple of kTile
  T* c = nullptr;       // [rows, columns]
  int64_t c_stride = 0;
  bool add = false;  // c += a b, else c = a b
};

// An element of c is one chain of multiply-adds in the order of depth, for any number of rows.
template <typename T, int kRows>
inline void MultiplyRows(const Product<T>& p, const T* a, T* c) {
  using V = Native<T>;
  for (int64_t x = 0; x < p.columns; x += 2 * kNative<T>) {
    V sum[kRows][2];
    for (int m = 0; m < kRows; ++m) {
      sum[m][0] = p.add ? LoadAs<V>(c + m * p.c_stride + x) : V{};
      sum[m][1] = p.add ? LoadAs<V>(c + m * p.c_stride + x + kNative<T>) : V{};
    }
    const T* b = p.b + x;
    for (int64_t i = 0; i < p.depth; ++i, b += p.b_stride) {
      const V b0 = LoadAs<V>(b);
      const V b1 = LoadAs<V>(b + kNative<T>);
      for (int m = 0; m < kRows; ++m) {
        const T factor = a[m * p.a_stride + i];
        sum[m][0] += b0 * factor;
        sum[m][1] += b1 * factor;
      }
    }
    for (int m = 0; m < kRows; ++m) {
      StoreLanes(sum[m][0], c + m * p.c_stride + x);
      StoreLanes(sum[m][1], c + m * p.c_stride + x + kNative<T>);
    }
  }
}

template <typename T>
__attribute__((noinline)) void Multiply(const Product<T>& p, int64_t rows) {
  int64_t m = 0;
#ifdef __AVX512F__
  for (; m + 8 <= rows; m += 8) MultiplyRows<T, 8>(p, p.a + m * p.a_stride, p.c + m * p.c_stride);
#endif
  for (; m + 4 <= rows; m += 4) MultiplyRows<T, 4>(p, p.a + m * p.a_stride, p.c + m * p.c_stride);
  for (; m + 2 <= rows; m += 2) MultiplyRows<T, 2>(p, p.a + m * p.a_stride, p.c + m * p.c_stride);
  for (; m < rows; ++m) MultiplyRows<T, 1>(p, p.a + m * p.a_stride, p.c + m * p.c_stride);
}

// ---- Scores -------------------------------------------------------------------------------------

template <typename T>
inline Value<T> Activate(Activation activation, Value<T> z) {
  if (activation == Activation::kSigmoid) return T{1} / (T{1} + ExpLanes(-z));
  return z < T{} ? Value<T>{} : z;  // NaN stays NaN
}

// One head's argument of the activation for the lanes of `dots`.
template <typename T>
inline Value<T> Argument(const Scores<T>& p, int64_t head, const T* dots) {
  const T bias = p.head_bias != nullptr ? p.head_bias[head] : T{};
  return LoadLanes<T>(dots) * static_cast<T>(p.score_scale) + bias;
}

// dots [rows, HI, kTile] of rows [row, row + rows) with a packed tile.
template <typename T>
inline void IndexDots(const Scores<T>& p, int64_t row, int64_t rows, const T* tile, T* dots) {
  Product<T> product;
  product.depth = product.a_stride = p.width;
  product.a = p.q + row * p.heads * p.width;
  product.b = tile;
  product.b_stride = product.columns = product.c_stride = kTile;
  product.c = dots;
  Multiply(product, rows * p.heads);
}

// scores [kTile] of one row from its dots [HI, kTile]. ReLU: lanes as wide as the instruction set
// has them, which changes no bit.
template <typename T>
__attribute__((noinline)) void CombineHeads(const Scores<T>& p, int64_t row, const T* dots,
                                            T* scores) {
  const T* w = p.w + row * p.heads;
  if (p.activation == Activation::kSigmoid) {
    for (int64_t x = 0; x < kTile; x += kWidth<T>) {
      Value<T> sum{};
      for (int64_t j = 0; j < p.heads; ++j) {
        sum += Activate<T>(p.activation, Argument(p, j, dots + j * kTile + x)) * w[j];
      }
      StoreLanes(sum, scores + x);
    }
    return;
  }
  const T scale = static_cast<T>(p.score_scale);
  for (int64_t x = 0; x < kTile; x += kNative<T>) {
    Native<T> sum{};
    for (int64_t j = 0; j < p.heads; ++j) {
      const T bias = p.head_bias != nullptr ? p.head_bias[j] : T{};
      const Native<T> z = LoadAs<Native<T>>(dots + j * kTile + x) * scale + bias;
      sum += (z < T{} ? Native<T>{} : z) * w[j];
    }
    StoreLanes(sum, scores + x);
  }
}

// Keys of k that the row sees: first[row] .. its own.
template <typename T>
inline int64_t VisibleKeys(const Scores<T>& p, int64_t row) {
  const int64_t last = p.last != nullptr ? p.last[row] : row;
  return Max(last - p.first[row] + 1, 0);
}

// Rows of one document, with the number of keys that any of them sees.
struct Group {
  Rows rows;
  int64_t first = 0;
  int64_t keys = 0;
};

// body(group) for rows of one document, at most `most` at a time.
template <typename T, typename Body>
inline void ForGroups(const Scores<T>& p, Rows rows, int64_t most, const Body& body) {
  for (int64_t row = rows.begin; row < rows.end;) {
    Group group{{row, row}, p.first[row], 0};
    while (row < rows.end && row - group.rows.begin < most && p.first[row] == group.first) {
      group.keys = Max(group.keys, VisibleKeys(p, row));
      ++row;
    }
    group.rows.end = row;
    body(group);
  }
}

// Rows of `group` whose dots are made by one product: body(rows), without leading rows that see no
// key from `at` on.
template <typename T, typename Body>
inline void ForDotRows(const Scores<T>& p, const Group& group, int64_t at, const Body& body) {
  const int64_t step = Max(kDotRows / p.heads, 1);
  int64_t row = group.rows.begin;
  while (row < group.rows.end && VisibleKeys(p, row) <= at) ++row;
  for (; row < group.rows.end; row += step) body(Rows{row, Min(row + step, group.rows.end)});
}
inline int64_t DotsSize(int64_t heads) { return Max(kDotRows, heads) * kTile; }

// Scratch of ForScores.
template <typename T>
struct ScoreScratch {
  explicit ScoreScratch(const Scores<T>& p) : tile(TileSize(p.width)), dots(DotsSize(p.heads)) {}
  Buffer<T> tile;
  Buffer<T> dots;
};

// body(row, at, scores, seen) for every row of the group and every tile of keys [at, at + kTile)
// after the document's start, ascending; the first `seen` > 0 of scores [kTile] are visible.
template <typename T, typename Body>
inline void ForScores(const Scores<T>& p, const Group& group, const ScoreScratch<T>& scratch,
                      const Body& body) {
  const KeyRows<T> keys{p.k, p.width, nullptr, group.first};
  alignas(64) T scores[kTile];
  for (int64_t at = 0; at < group.keys; at += kTile) {
    PackTile(keys, at, Min(group.keys - at, kTile), p.width, scratch.tile.get());
    ForDotRows(p, group, at, [&](Rows rows) {
      IndexDots(p, rows.begin, rows.end - rows.begin, scratch.tile.get(), scratch.dots.get());
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t seen = Min(VisibleKeys(p, row) - at, kTile);
        if (seen <= 0) continue;
        CombineHeads(p, row, scratch.dots.get() + (row - rows.begin) * p.heads * kTile, scores);
        body(row, at, static_cast<const T*>(scores), seen);
      }
    });
  }
}

template <typename T>
void RowScoresRun(const Scores<T>& p, int64_t row, T* out) {
  const ScoreScratch<T> scratch(p);
  ForGroups(p, Rows{row, row + 1}, 1, [&](const Group& group) {
    ForScores(p, group, scratch, [&](int64_t, int64_t at, const T* scores, int64_t seen) {
      for (int64_t i = 0; i < seen; ++i) out[at + i] = scores[i];
    });
  });
}

}  // namespace
}  // namespace heddle::kernels::indexer
