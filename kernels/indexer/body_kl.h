// KL(p || softmax(I / temperature)) and its gradients.
//
// Rows pass, per group of rows (all visible keys: rows of a document share packed tiles; selected
// keys: one row, its keys gathered):
//   A  for key tiles: I / temperature and p (body_target.h) into row buffers
//   B  per row: lse, loss, dI = weight (softmax - p) / temperature in place of p
//   C  for key tiles: z again, dw, dhead_bias by lanes of keys, dq by a product over keys
// Keys pass, per task: the keys' gradients stay in scratch while rows come in ascending order.
// Memory: two rows of scores for each row of a group, the group shrinks as rows grow.
// Included by the bodies of ISA files only.
#pragma once

#include "kernels/indexer/body_scores.h"
#include "kernels/indexer/body_target.h"

namespace heddle::kernels::indexer {
namespace {  // NOLINT: ISA file (architecture.md T12)

constexpr int64_t kKlRows = 16;             // rows of a group, at most
constexpr int64_t kKlElements = 1LL << 18;  // of a group's row buffer, if one row is not longer
constexpr int64_t kKeyPassRows = 8;         // rows whose dots are made together

// ---- Keys of a row ------------------------------------------------------------------------------

// Null: all visible.
template <typename T>
inline const int32_t* ListOf(const Kl<T>& p, int64_t row) {
  return p.offsets != nullptr ? p.selected + p.offsets[row] : nullptr;
}
template <typename T>
inline int64_t KeysOf(const Kl<T>& p, int64_t row) {
  return p.offsets != nullptr ? p.offsets[row + 1] - p.offsets[row] : VisibleKeys(p.scores, row);
}
template <typename T>
inline bool HasBackward(const Kl<T>& p) {
  return p.dq != nullptr;
}

// ---- Rows pass: A -------------------------------------------------------------------------------

template <typename T>
struct KlScratch {
  KlScratch(const Kl<T>& p, int64_t rows, int64_t keys)
      : width(RoundUp(p.scores.width, kTile)),
        row_size(RoundUp(keys, kTile)),
        index_tile(TileSize(p.scores.width)),
        index_dots(p.offsets != nullptr ? p.scores.heads * row_size : DotsSize(p.scores.heads)),
        attention(p.offsets != nullptr ? 0 : p.kv_heads * TileSize(p.key_dim)),
        attention_dots(TargetDotsSize(p.attention_heads / p.kv_heads)),
        scores(rows * row_size),
        target(rows * row_size),
        key_rows(kTile * width),
        coefficients(p.scores.heads * kTile),
        dq(rows * p.scores.heads * width),
        dw(rows * p.scores.heads * kWidth<T>),
        dbias(rows * p.scores.heads * kWidth<T>) {}
  int64_t width;     // dI, padded
  int64_t row_size;  // keys, padded
  Buffer<T> index_tile;
  Buffer<T> index_dots;  // of a product; selected keys: of the whole row, [tiles, HI, kTile]
  Buffer<T> attention;
  Buffer<T> attention_dots;
  Buffer<T> scores;  // [rows, row_size] I / temperature
  Buffer<T> target;  // [rows, row_size] p, then dI
  Buffer<T> key_rows;
  Buffer<T> coefficients;  // [HI, kTile]
  Buffer<T> dq;            // [rows, HI, width]
  Buffer<T> dw;            // [rows, HI, lanes]
  Buffer<T> dbias;
};

// scores [kTile] become I / temperature.
template <typename T>
inline void TemperedScores(const Kl<T>& p, int64_t row, const T* dots, T* scores) {
  CombineHeads(p.scores, row, dots, scores);
  const T inverse = static_cast<T>(1 / p.temperature);
  for (int64_t x = 0; x < kTile; ++x) scores[x] *= inverse;
}

template <typename T>
void FillRows(const Kl<T>& p, const Group& group, const KlScratch<T>& s) {
  const Scores<T>& index = p.scores;
  const KeyRows<T> keys{index.k, index.width, nullptr, group.first};
  for (int64_t at = 0; at < group.keys; at += kTile) {
    const int64_t count = Min(group.keys - at, kTile);
    PackTile(keys, at, count, index.width, s.index_tile.get());
    PackAttentionTiles(p, group.first, at, count, s.attention.get());
    ForDotRows(index, group, at, [&](Rows rows) {
      const int64_t many = rows.end - rows.begin;
      const int64_t to = (rows.begin - group.rows.begin) * s.row_size + at;
      IndexDots(index, rows.begin, many, s.index_tile.get(), s.index_dots.get());
      for (int64_t r = 0; r < many; ++r) {
        TemperedScores(p, rows.begin + r, s.index_dots.get() + r * index.heads * kTile,
                       s.scores.get() + to + r * s.row_size);
      }
      TargetTile(p, rows.begin, many, s.attention.get(), s.attention_dots.get(),
                 s.target.get() + to, s.row_size);
    });
  }
}

// Selected keys: one row, whose dots are kept for C.
template <typename T>
void FillSelectedRow(const Kl<T>& p, int64_t row, int64_t count, const KlScratch<T>& s) {
  const Scores<T>& index = p.scores;
  const int32_t* list = ListOf(p, row);
  const KeyRows<T> keys{index.k, index.width, list, 0};
  for (int64_t at = 0; at < count; at += kTile) {
    const int64_t present = Min(count - at, kTile);
    T* dots = s.index_dots.get() + at * index.heads;
    PackTile(keys, at, present, index.width, s.index_tile.get());
    IndexDots(index, row, 1, s.index_tile.get(), dots);
    TemperedScores(p, row, dots, s.scores.get() + at);
    GatheredTarget(p, row, list + at, count - at, s.target.get() + at);
  }
}

// ---- Rows pass: B -------------------------------------------------------------------------------

template <typename T>
inline T LogSumExp(const T* x, int64_t count) {
  Value<T> best = Value<T>{} - std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    const Value<T> v = LoadLanes(x + i);
    best = (LanesBelow<T>(count - i) & (v > best)) ? v : best;
  }
  const T maximum = MaxLanes<T>(best);
  Value<T> sum{};
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    const Value<T> e = ExpLanes(LoadLanes(x + i) - maximum);
    sum += LanesBelow<T>(count - i) ? e : Value<T>{};
  }
  return maximum + LogOf(SumLanes<T>(sum));
}

// sum p (ln p - (x - lse)); p = 0 adds 0.
template <typename T>
inline T Divergence(const T* x, const T* p, T lse, int64_t count) {
  Value<T> sum{};
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    const Value<T> target = LoadLanes(p + i);
    const Value<T> term = target * (LogLanes(target) - (LoadLanes(x + i) - lse));
    const Orders<T> counts = LanesBelow<T>(count - i) & ~(target < std::numeric_limits<T>::min());
    sum += counts ? term : Value<T>{};
  }
  return SumLanes<T>(sum);
}

// target [padded] becomes dI; absent keys get 0.
template <typename T>
inline void ScoreGradients(const T* x, T lse, T weight, int64_t count, int64_t padded, T* target) {
  for (int64_t i = 0; i < padded; i += kWidth<T>) {
    const Value<T> d = (ExpLanes(LoadLanes(x + i) - lse) - LoadLanes(target + i)) * weight;
    StoreLanes(LanesBelow<T>(count - i) ? d : Value<T>{}, target + i);
  }
}

template <typename T>
inline T GradientWeight(const Kl<T>& p) {
  return static_cast<T>(p.row_weight / p.temperature);
}

template <typename T>
void FinishRow(const Kl<T>& p, int64_t row, const T* scores, T* target) {
  const int64_t count = KeysOf(p, row);
  const int64_t padded = RoundUp(count, kTile);
  const T lse = LogSumExp(scores, count);
  if (p.lse_scores != nullptr) p.lse_scores[row] = lse;
  // One visible key: both distributions are the same, whatever was rounded on the way.
  p.loss[row] = count <= 1 ? T{} : Divergence(scores, target, lse, count);
  if (!HasBackward(p)) return;
  if (count <= 1) {
    Zero(target, padded);
  } else {
    ScoreGradients(scores, lse, GradientWeight(p), count, padded, target);
  }
  if (p.offsets == nullptr || p.dscores == nullptr) return;
  std::memcpy(p.dscores + p.offsets[row], target, static_cast<size_t>(count) * sizeof(T));
}

// ---- Rows pass: C, and the keys pass ------------------------------------------------------------

// Through the activation, for one row and one tile of which `seen` keys count:
// coefficients [HI, kTile] = dL/d(dots); dw and dbias [HI, lanes] (both or none) are added to.
template <typename T>
__attribute__((noinline)) void Coefficients(const Scores<T>& p, int64_t row, const T* dots,
                                            const T* dscores, int64_t seen, T* coefficients, T* dw,
                                            T* dbias) {
  for (int64_t j = 0; j < p.heads; ++j) {
    const T w = p.w[row * p.heads + j];
    for (int64_t x = 0; x < kTile; x += kWidth<T>) {
      const Orders<T> counts = LanesBelow<T>(seen - x);
      const Value<T> z = Argument(p, j, dots + j * kTile + x);
      const Value<T> value = Activate<T>(p.activation, z);
      const Value<T> slope = p.activation == Activation::kSigmoid
                                 ? value * (T{1} - value)
                                 : (value == Value<T>{} ? Value<T>{} : Value<T>{} + T{1});
      const Value<T> d = LoadLanes(dscores + x);
      const Value<T> dz = counts ? d * w * slope : Value<T>{};
      StoreLanes(dz * static_cast<T>(p.score_scale), coefficients + j * kTile + x);
      if (dw == nullptr) continue;
      T* to_w = dw + j * kWidth<T>;
      T* to_bias = dbias + j * kWidth<T>;
      StoreLanes(LoadLanes(to_w) + (counts ? d * value : Value<T>{}), to_w);
      StoreLanes(LoadLanes(to_bias) + dz, to_bias);
    }
  }
}

// Adds what rows of the group take from a tile of keys whose dots [rows, HI, kTile] are given.
template <typename T>
void AddTileGradients(const Kl<T>& p, const Group& group, Rows rows, int64_t at, const T* dots,
                      const KlScratch<T>& s) {
  const int64_t heads = p.scores.heads;
  Product<T> product;
  product.a = s.coefficients.get();
  product.a_stride = kTile;
  product.b = s.key_rows.get();
  product.b_stride = product.columns = product.c_stride = s.width;
  product.add = true;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t seen = Min(KeysOf(p, row) - at, kTile);
    if (seen <= 0) continue;
    const int64_t r = row - group.rows.begin;
    Coefficients(p.scores, row, dots + (row - rows.begin) * heads * kTile,
                 s.target.get() + r * s.row_size + at, seen, s.coefficients.get(),
                 s.dw.get() + r * heads * kWidth<T>, s.dbias.get() + r * heads * kWidth<T>);
    product.depth = seen;
    product.c = s.dq.get() + r * heads * s.width;
    Multiply(product, heads);
  }
}

template <typename T>
void AddRowGradients(const Kl<T>& p, const Group& group, const KlScratch<T>& s) {
  const Scores<T>& index = p.scores;
  const int32_t* list = ListOf(p, group.rows.begin);
  const KeyRows<T> keys{index.k, index.width, list, group.first};
  Zero(s.key_rows.get(), kTile * s.width);
  for (int64_t at = 0; at < group.keys; at += kTile) {
    const int64_t count = Min(group.keys - at, kTile);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(s.key_rows.get() + i * s.width, keys.Row(at + i),
                  static_cast<size_t>(index.width) * sizeof(T));
    }
    if (list != nullptr) {
      AddTileGradients<T>(p, group, group.rows, at, s.index_dots.get() + at * index.heads, s);
      continue;
    }
    PackTile(keys, at, count, index.width, s.index_tile.get());
    ForDotRows(index, group, at, [&](Rows rows) {
      IndexDots(index, rows.begin, rows.end - rows.begin, s.index_tile.get(), s.index_dots.get());
      AddTileGradients<T>(p, group, rows, at, s.index_dots.get(), s);
    });
  }
}

template <typename T>
void StoreRowGradients(const Kl<T>& p, const Group& group, const KlScratch<T>& s) {
  const Scores<T>& index = p.scores;
  const int64_t heads = (group.rows.end - group.rows.begin) * index.heads;
  const int64_t to = group.rows.begin * index.heads;
  for (int64_t i = 0; i < heads; ++i) {
    std::memcpy(p.dq + (to + i) * index.width, s.dq.get() + i * s.width,
                static_cast<size_t>(index.width) * sizeof(T));
    p.dw[to + i] = SumLanes<T>(LoadLanes(s.dw.get() + i * kWidth<T>));
    if (p.dhead_bias == nullptr) continue;
    p.dhead_bias[to + i] = SumLanes<T>(LoadLanes(s.dbias.get() + i * kWidth<T>));
  }
}

template <typename T>
void KlGroup(const Kl<T>& p, const Group& group, const KlScratch<T>& s) {
  if (p.offsets != nullptr) {
    FillSelectedRow(p, group.rows.begin, group.keys, s);
  } else {
    FillRows(p, group, s);
  }
  const int64_t rows = group.rows.end - group.rows.begin;
  for (int64_t r = 0; r < rows; ++r) {
    FinishRow(p, group.rows.begin + r, s.scores.get() + r * s.row_size,
              s.target.get() + r * s.row_size);
  }
  if (!HasBackward(p)) return;
  const int64_t heads = rows * p.scores.heads;
  Zero(s.dq.get(), heads * s.width);
  Zero(s.dw.get(), heads * kWidth<T>);
  Zero(s.dbias.get(), heads * kWidth<T>);
  AddRowGradients(p, group, s);
  StoreRowGradients(p, group, s);
}

template <typename T>
void KlRowsRun(const Kl<T>& p, Rows rows) {
  int64_t most_keys = 1;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    most_keys = Max(most_keys, KeysOf(p, row));
  }
  const bool selected = p.offsets != nullptr;
  const int64_t most_rows =
      selected ? 1 : Max(Min(kKlElements / most_keys, Min(kKlRows, rows.end - rows.begin)), 1);
  const KlScratch<T> scratch(p, most_rows, most_keys);
  ForGroups(p.scores, rows, most_rows, [&](const Group& group) {
    Group keys = group;
    if (selected) {
      keys.first = 0;
      keys.keys = KeysOf(p, group.rows.begin);
    }
    KlGroup(p, keys, scratch);
  });
}

// ---- Keys pass ----------------------------------------------------------------------------------

template <typename T>
struct KeyScratch {
  KeyScratch(const Kl<T>& p, int64_t keys)
      : width(RoundUp(p.scores.width, kTile)),
        index_tile(TileSize(p.scores.width)),
        index_dots(kKeyPassRows * p.scores.heads * kTile),
        attention(p.offsets != nullptr ? 0 : p.kv_heads * TileSize(p.key_dim)),
        attention_dots(TargetDotsSize(p.attention_heads / p.kv_heads)),
        coefficients(p.scores.heads * kTile),
        by_key(kTile * p.scores.heads),
        q(p.scores.heads * width),
        dk(keys * width) {
    Zero(q.get(), p.scores.heads * width);
    Zero(dk.get(), keys * width);
  }
  int64_t width;
  Buffer<T> index_tile;
  Buffer<T> index_dots;  // [kKeyPassRows, HI, kTile]
  Buffer<T> attention;
  Buffer<T> attention_dots;
  Buffer<T> coefficients;
  Buffer<T> by_key;  // [kTile, HI]
  Buffer<T> q;       // [HI, width]
  Buffer<T> dk;      // [keys, width]
  alignas(64) T scores[kTile];
  alignas(64) T target[kKeyPassRows * kTile];
};

// dI of one row over a tile, made again from its scores' dots and its target.
template <typename T>
void RepeatScoreGradients(const Kl<T>& p, int64_t row, const T* dots, int64_t seen, T* scores,
                          T* target) {
  TemperedScores(p, row, dots, scores);
  ScoreGradients(scores, p.lse_scores[row], GradientWeight(p), seen, kTile, target);
}

// dk of keys key(0), key(1), .. += what one row sends to the first `seen` keys of the tile.
template <typename T, typename Key>
inline void AddKeyGradients(const Kl<T>& p, int64_t row, const T* dots, const T* dscores,
                            int64_t seen, const KeyScratch<T>& s, const Key& key) {
  const int64_t heads = p.scores.heads;
  T* coefficients = s.coefficients.get();
  T* by_key = s.by_key.get();
  Coefficients<T>(p.scores, row, dots, dscores, seen, coefficients, nullptr, nullptr);
  for (int64_t j = 0; j < heads; ++j) {
    for (int64_t i = 0; i < seen; ++i) by_key[i * heads + j] = coefficients[j * kTile + i];
    std::memcpy(s.q.get() + j * s.width, p.scores.q + (row * heads + j) * p.scores.width,
                static_cast<size_t>(p.scores.width) * sizeof(T));
  }
  Product<T> product;
  product.depth = heads;
  product.b = s.q.get();
  product.b_stride = product.columns = s.width;
  product.add = true;
  for (int64_t i = 0; i < seen; ++i) {
    MultiplyRows<T, 1>(product, by_key + i * heads, s.dk.get() + key(i) * s.width);
  }
}

// All visible keys: tiles of the task's keys, blocks of rows.
template <typename T>
void DenseKeys(const Kl<T>& p, const KeyTask& task, KeyScratch<T>* s) {
  const Scores<T>& index = p.scores;
  const KeyRows<T> keys{index.k, index.width, nullptr, task.keys.begin};
  const int64_t count = task.keys.end - task.keys.begin;
  for (int64_t at = 0; at < count; at += kTile) {
    const int64_t present = Min(count - at, kTile);
    PackTile(keys, at, present, index.width, s->index_tile.get());
    PackAttentionTiles(p, task.keys.begin, at, present, s->attention.get());
    const auto seen_by = [&](int64_t row) {
      const int64_t visible = VisibleKeys(index, row);
      return visible <= 1 ? 0 : Min(index.first[row] + visible - task.keys.begin - at, present);
    };
    for (int64_t row = task.rows.begin; row < task.rows.end; row += kKeyPassRows) {
      const int64_t rows = Min(kKeyPassRows, task.rows.end - row);
      if (seen_by(row + rows - 1) <= 0 && index.last == nullptr) continue;
      IndexDots(index, row, rows, s->index_tile.get(), s->index_dots.get());
      TargetTile(p, row, rows, s->attention.get(), s->attention_dots.get(), s->target, kTile);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen = seen_by(row + r);
        if (seen <= 0) continue;
        const T* dots = s->index_dots.get() + r * index.heads * kTile;
        T* target = s->target + r * kTile;
        RepeatScoreGradients(p, row + r, dots, seen, s->scores, target);
        AddKeyGradients(p, row + r, dots, target, seen, *s, [&](int64_t i) { return at + i; });
      }
    }
  }
}

// First position of the ascending list[0 .. count) with a value of at least `key`.
inline int64_t LowerBound(const int32_t* list, int64_t count, int64_t key) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (list[low + half] < key) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// Selected keys: of each row, the part of its list that lies in the task.
template <typename T>
void SelectedKeys(const Kl<T>& p, const KeyTask& task, KeyScratch<T>* s) {
  const Scores<T>& index = p.scores;
  for (int64_t row = task.rows.begin; row < task.rows.end; ++row) {
    const int64_t all = KeysOf(p, row);
    if (all <= 1) continue;
    const int32_t* list = ListOf(p, row);
    const int64_t end = LowerBound(list, all, task.keys.end);
    const KeyRows<T> keys{index.k, index.width, list, 0};
    for (int64_t at = LowerBound(list, end, task.keys.begin); at < end; at += kTile) {
      const int64_t seen = Min(end - at, kTile);
      PackTile(keys, at, seen, index.width, s->index_tile.get());
      IndexDots(index, row, 1, s->index_tile.get(), s->index_dots.get());
      if (p.dscores != nullptr) {
        std::memcpy(s->target, p.dscores + p.offsets[row] + at,
                    static_cast<size_t>(seen) * sizeof(T));
      } else {
        GatheredTarget(p, row, list + at, end - at, s->target);
        RepeatScoreGradients(p, row, s->index_dots.get(), seen, s->scores, s->target);
      }
      AddKeyGradients<T>(p, row, s->index_dots.get(), s->target, seen, *s,
                         [&](int64_t i) { return list[at + i] - task.keys.begin; });
    }
  }
}

template <typename T>
void KlKeysRun(const Kl<T>& p, KeyTask task) {
  KeyScratch<T> scratch(p, task.keys.end - task.keys.begin);
  if (p.offsets != nullptr) {
    SelectedKeys(p, task, &scratch);
  } else {
    DenseKeys(p, task, &scratch);
  }
  for (int64_t key = task.keys.begin; key < task.keys.end; ++key) {
    std::memcpy(p.dk + key * p.scores.width,
                scratch.dk.get() + (key - task.keys.begin) * scratch.width,
                static_cast<size_t>(p.scores.width) * sizeof(T));
  }
}

}  // namespace
}  // namespace heddle::kernels::indexer
