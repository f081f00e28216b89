// Exact top-k and score statistics over streams of score tiles.
//
// Selection: scores become integers of the same order (Order), a row keeps its candidates in the
// order of their keys, and only scores that reach the row's bar join them. When the buffer is full,
// bisection over the integers finds the k-th best and everything below is dropped; the bar rises to
// it. Ties are cut by position, so the result is the set of the total order for any tile or buffer
// size. Expected work O(visible), memory O(k) a row.
// Included by the bodies of ISA files only.
#pragma once

#include <type_traits>

#include "kernels/indexer/body_scores.h"

namespace heddle::kernels::indexer {
namespace {  // NOLINT: ISA file (architecture.md T12)

// ---- Order --------------------------------------------------------------------------------------

template <typename T>
constexpr Order<T> kLowest = std::numeric_limits<Order<T>>::min();

// a > b exactly if OrderOf(a) > OrderOf(b); +0 and -0 are equal, NaN is kLowest.
template <typename T>
inline Orders<T> OrderOf(Value<T> v) {
  const Orders<T> bits = BitsOf<T>(v + T{});  // -0 + 0 = +0
  constexpr int kSign = 8 * sizeof(T) - 1;
  const Orders<T> order = bits ^ ((bits >> kSign) & std::numeric_limits<Order<T>>::max());
  return v == v ? order : Orders<T>{} + kLowest<T>;
}

// ---- Candidates of a row ------------------------------------------------------------------------

template <typename T>
struct Candidates {
  Order<T>* order = nullptr;  // [capacity + kWidth]
  int32_t* key = nullptr;     // [capacity + kWidth] ascending
  int64_t capacity = 0;
  int64_t count = 0;
  int64_t wanted = 0;
  Order<T> bar = kLowest<T>;  // scores below it are beaten by `wanted` earlier candidates
};

inline int64_t CapacityOf(int64_t wanted) { return RoundUp(wanted + Max(wanted, 256), 16) + 16; }

template <typename T>
inline int64_t CountAtLeast(const Candidates<T>& c, Order<T> pivot) {
  using V = typename Types<T>::NativeOrders;
  V sum{};
  for (int64_t i = 0; i < c.count; i += kNative<T>) sum -= LoadAs<V>(c.order + i) >= pivot;
  int64_t count = 0;
  for (int64_t i = 0; i < kNative<T>; ++i) count += sum[i];
  return count;
}

// Keeps candidates of order > floor, and of those equal to it the `ties` after the first `skip`.
template <typename T>
inline void Compact(Candidates<T>* c, Order<T> floor, int64_t skip, int64_t ties) {
  int64_t to = 0;
  int64_t equal = 0;
  for (int64_t i = 0; i < c->count; ++i) {
    const Order<T> order = c->order[i];
    const bool tie = order == floor;
    const bool keep = order > floor || (tie && equal >= skip && equal < skip + ties);
    equal += tie;
    c->order[to] = order;
    c->key[to] = c->key[i];
    to += keep;
  }
  c->count = to;
}

#ifdef __AVX512F__
// Keeps candidates of order >= floor.
inline void Drop(Candidates<float>* c, int32_t floor) {
  const __m512i limit = _mm512_set1_epi32(floor);
  int64_t to = 0;
  for (int64_t i = 0; i < c->count; i += 16) {
    const __m512i order = _mm512_loadu_si512(c->order + i);
    const __m512i key = _mm512_loadu_si512(c->key + i);
    const __mmask16 tail =
        static_cast<__mmask16>(c->count - i >= 16 ? 0xffffu : (1u << (c->count - i)) - 1u);
    const __mmask16 keep = _mm512_mask_cmpge_epi32_mask(tail, order, limit);
    _mm512_storeu_si512(c->order + to, _mm512_maskz_compress_epi32(keep, order));
    _mm512_storeu_si512(c->key + to, _mm512_maskz_compress_epi32(keep, key));
    to += __builtin_popcount(keep);
  }
  c->count = to;
}
#endif
template <typename T>
inline void Drop(Candidates<T>* c, Order<T> floor) {
  Compact(c, floor, 0, c->count);
}

// Leaves the `wanted` best candidates and raises the bar. REQUIRES: count >= wanted > 0.
template <typename T>
__attribute__((noinline)) void KeepBest(Candidates<T>* c, TieBreak tie_break) {
  using Unsigned = std::make_unsigned_t<Order<T>>;
  Order<T> low = std::numeric_limits<Order<T>>::max();
  Order<T> high = kLowest<T>;
  for (int64_t i = 0; i < c->count; ++i) {
    low = c->order[i] < low ? c->order[i] : low;
    high = c->order[i] > high ? c->order[i] : high;
  }
  high += 1;  // the largest order is that of +inf, so this fits
  // The padding of the last vector is below every pivot of the search.
  for (int64_t i = 0; i < kWidth<T>; ++i) c->order[c->count + i] = kLowest<T>;
  int64_t at_least_low = c->count;
  int64_t at_least_high = 0;
  // Invariant: at_least_low >= wanted > at_least_high.
  while (at_least_low != c->wanted) {
    const Unsigned span = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    if (span <= 1) break;
    const Order<T> middle =
        static_cast<Order<T>>(static_cast<Unsigned>(low) + static_cast<Unsigned>(span / 2));
    const int64_t count = CountAtLeast(*c, middle);
    if (count >= c->wanted) {
      low = middle;
      at_least_low = count;
    } else {
      high = middle;
      at_least_high = count;
    }
  }
  if (at_least_low == c->wanted) {
    Drop(c, low);
  } else {  // low is the wanted-th best and has too many equals
    const int64_t ties = c->wanted - at_least_high;
    const bool newest = tie_break == TieBreak::kNewest;
    Compact(c, low, newest ? at_least_low - c->wanted : 0, ties);
  }
  // Oldest: later equals of the last one lose. After Drop, low may itself lie below the last one.
  c->bar = tie_break == TieBreak::kOldest && at_least_low != c->wanted ? low + 1 : low;
}

#ifdef __AVX512F__
inline void Append(Candidates<float>* c, I16 orders, int64_t key, int64_t lanes) {
  const __m512i order = reinterpret_cast<__m512i>(orders);
  const __mmask16 tail = static_cast<__mmask16>(lanes >= 16 ? 0xffffu : (1u << lanes) - 1u);
  const __mmask16 good = _mm512_mask_cmpge_epi32_mask(tail, order, _mm512_set1_epi32(c->bar));
  if (good == 0) return;
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i keys = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int32_t>(key)));
  _mm512_storeu_si512(c->order + c->count, _mm512_maskz_compress_epi32(good, order));
  _mm512_storeu_si512(c->key + c->count, _mm512_maskz_compress_epi32(good, keys));
  c->count += __builtin_popcount(good);
}
#endif
template <typename T>
inline void Append(Candidates<T>* c, Orders<T> orders, int64_t key, int64_t lanes) {
  Order<T> all[kWidth<T>];
  StoreLanes(orders, all);
  for (int64_t i = 0; i < lanes; ++i) {
    c->order[c->count] = all[i];
    c->key[c->count] = static_cast<int32_t>(key + i);
    c->count += all[i] >= c->bar;
  }
}

// Scores of keys key, key + 1, ..
template <typename T>
inline void Offer(Candidates<T>* c, TieBreak tie_break, int64_t key, const T* scores,
                  int64_t seen) {
  for (int64_t x = 0; x < seen; x += kWidth<T>) {
    if (c->count + kWidth < T >> c->capacity) KeepBest(c, tie_break);
    Append(c, OrderOf<T>(LoadLanes(scores + x)), key + x, Min(seen - x, kWidth<T>));
  }
}

// ---- Selection ----------------------------------------------------------------------------------

template <typename T>
struct SelectScratch {
  SelectScratch(const Scores<T>& p, int64_t rows, int64_t most_wanted)
      : scores(p),
        capacity(CapacityOf(most_wanted)),
        order(rows * (capacity + kWidth<T>)),
        key(rows * (capacity + kWidth<T>)) {}
  ScoreScratch<T> scores;
  int64_t capacity;
  Buffer<Order<T>> order;
  Buffer<int32_t> key;
  Candidates<T> rows[kRowBlock];
};

template <typename T>
void SelectGroup(const Select<T>& p, const Group& group, SelectScratch<T>* scratch) {
  for (int64_t row = group.rows.begin; row < group.rows.end; ++row) {
    const int64_t i = row - group.rows.begin;
    const int64_t at = i * (scratch->capacity + kWidth<T>);
    scratch->rows[i] = Candidates<T>{scratch->order.get() + at, scratch->key.get() + at,
                                     scratch->capacity, 0, p.offsets[row + 1] - p.offsets[row]};
  }
  ForScores(p.scores, group, scratch->scores,
            [&](int64_t row, int64_t at, const T* scores, int64_t seen) {
              Offer(&scratch->rows[row - group.rows.begin], p.tie_break, group.first + at, scores,
                    seen);
            });
  for (int64_t row = group.rows.begin; row < group.rows.end; ++row) {
    Candidates<T>* c = &scratch->rows[row - group.rows.begin];
    KeepBest(c, p.tie_break);
    std::memcpy(p.selected + p.offsets[row], c->key,
                static_cast<size_t>(c->wanted) * sizeof(int32_t));
  }
}

template <typename T>
inline bool TakesAll(const Select<T>& p, int64_t row) {
  const int64_t wanted = p.offsets[row + 1] - p.offsets[row];
  return wanted == 0 || wanted == VisibleKeys(p.scores, row);
}

template <typename T>
void SelectRun(const Select<T>& p, Rows rows) {
  int64_t most_wanted = 0;
  int64_t scored = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t wanted = p.offsets[row + 1] - p.offsets[row];
    if (!TakesAll(p, row)) {
      most_wanted = Max(most_wanted, wanted);
      ++scored;
      continue;
    }
    for (int64_t i = 0; i < wanted; ++i) {
      p.selected[p.offsets[row] + i] = static_cast<int32_t>(p.scores.first[row] + i);
    }
  }
  if (scored == 0) return;
  SelectScratch<T> scratch(p.scores, Min(scored, kRowBlock), most_wanted);
  for (int64_t row = rows.begin; row < rows.end;) {
    int64_t end = row;
    while (end < rows.end && !TakesAll(p, end)) ++end;
    ForGroups(p.scores, Rows{row, end}, kRowBlock,
              [&](const Group& group) { SelectGroup(p, group, &scratch); });
    row = end + 1;
  }
}

// ---- Statistics ---------------------------------------------------------------------------------

constexpr int64_t kChunk = 512;  // scores that are summed up at once

// Running sums in double; exponentials relative to `maximum`.
template <typename T>
struct RowSums {
  double count = 0;
  double mean = 0;
  double squares = 0;  // of differences from the mean
  double maximum = -std::numeric_limits<double>::infinity();
  double exponentials = 0;  // sum e^(x - maximum)
  double weighted = 0;      // sum e^(x - maximum) (x - maximum)
  int64_t held = 0;
  alignas(64) T chunk[kChunk];
};

// Sum of body(x, present) over a chunk, absent lanes 0.
template <typename T, typename Body>
inline double SumOver(const RowSums<T>& s, const Body& body) {
  Value<T> sum{};
  for (int64_t i = 0; i < s.held; i += kWidth<T>) {
    const Orders<T> present = LanesBelow<T>(s.held - i);
    const Value<T> y = body(LoadLanes(s.chunk + i), present);
    sum += present ? y : Value<T>{};
  }
  return static_cast<double>(SumLanes<T>(sum));
}

template <typename T>
__attribute__((noinline)) void Digest(RowSums<T>* s, bool entropy) {
  if (s->held == 0) return;
  const double n = static_cast<double>(s->held);
  const double mean = SumOver(*s, [](Value<T> x, Orders<T>) { return x; }) / n;
  const T center = static_cast<T>(mean);
  const double about_center =
      SumOver(*s, [&](Value<T> x, Orders<T>) { return (x - center) * (x - center); });
  const double off = mean - static_cast<double>(center);
  const double squares = about_center - n * off * off;
  const double total = s->count + n;
  const double step = mean - s->mean;
  s->squares += squares + step * step * s->count * n / total;
  s->mean += step * n / total;
  s->count = total;
  Value<T> best = Value<T>{} - std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < s->held; i += kWidth<T>) {
    const Value<T> x = LoadLanes(s->chunk + i);
    best = (LanesBelow<T>(s->held - i) & (x > best)) ? x : best;
  }
  const double maximum = static_cast<double>(MaxLanes<T>(best));
  if (entropy) {
    const T shift = static_cast<T>(maximum);
    Value<T> products{};
    const double sum = SumOver(*s, [&](Value<T> x, Orders<T> present) {
      const Value<T> e = ExpLanes(x - shift);
      products += present ? e * (x - shift) : Value<T>{};
      return e;
    });
    const double weighted = static_cast<double>(SumLanes<T>(products));
    const double both = maximum > s->maximum ? maximum : s->maximum;
    const double before = s->exponentials > 0 ? s->maximum - both : 0;
    const double now = maximum - both;
    s->weighted = ExpOf(before) * (s->weighted + before * s->exponentials) +
                  ExpOf(now) * (weighted + now * sum);
    s->exponentials = ExpOf(before) * s->exponentials + ExpOf(now) * sum;
  }
  s->maximum = maximum > s->maximum ? maximum : s->maximum;
  s->held = 0;
}

template <typename T>
void StoreSums(const Statistics<T>& p, int64_t row, const RowSums<T>& s) {
  if (p.mean != nullptr) p.mean[row] = static_cast<T>(s.mean);
  if (p.variance != nullptr) {
    p.variance[row] = s.count > 0 ? static_cast<T>(s.squares / s.count) : T{};
  }
  if (p.maximum != nullptr) p.maximum[row] = static_cast<T>(s.maximum);
  if (p.entropy != nullptr) {
    const double e = LogOf(s.exponentials) - s.weighted / s.exponentials;
    p.entropy[row] = s.count > 0 ? static_cast<T>(e) : T{};
  }
}

template <typename T>
void StatisticsRun(const Statistics<T>& p, Rows rows) {
  const ScoreScratch<T> scratch(p.scores);
  const Buffer<RowSums<T>> sums(kRowBlock);
  const bool entropy = p.entropy != nullptr;
  ForGroups(p.scores, rows, kRowBlock, [&](const Group& group) {
    for (int64_t i = 0; i < kRowBlock; ++i) sums.get()[i] = RowSums<T>{};
    ForScores(p.scores, group, scratch, [&](int64_t row, int64_t, const T* scores, int64_t seen) {
      RowSums<T>* s = &sums.get()[row - group.rows.begin];
      std::memcpy(s->chunk + s->held, scores, static_cast<size_t>(kTile) * sizeof(T));
      s->held += seen;
      if (s->held == kChunk) Digest(s, entropy);
    });
    for (int64_t row = group.rows.begin; row < group.rows.end; ++row) {
      RowSums<T>* s = &sums.get()[row - group.rows.begin];
      Digest(s, entropy);
      StoreSums(p, row, *s);
    }
  });
}

}  // namespace
}  // namespace heddle::kernels::indexer
