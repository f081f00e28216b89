// Algorithm, per (document, key head), with all tensors of the head copied once into padded
// scratch:
//
//   forward, for each query head of the group and each tile of 64 queries:
//     for each visible block of kKeys keys:
//       S^T = K Q^T;  P^T, running max and sum;  O^T = O^T corr + V^T P^T
//     out = (O^T / sum)^T, lse = max + ln sum
//   backward, same loops:
//       S^T = K Q^T;  dP^T = V dO^T;  P^T = exp(S^T - lse);  dS^T = P^T (dP^T - delta)
//       dV += P^T dO;  dK += dS^T Q;  dQ^T += K^T dS^T
//
// Products have bf16 operands, fp32 accumulators and the second operand in pairs of rows:
// `pair_product` of kernels/attention. Scratch per thread: four copies of K
// and V and fp32 dK, dV of one document and head. With key sets the query tiles are the outer loop:
// the mask of a tile serves all heads of the group.
#include "model/attention/flash.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "kernels/attention/params.h"
#include "kernels/pointwise/params.h"

namespace heddle::attention {
namespace {

namespace ka = kernels::attention;
namespace pw = kernels::pointwise;

constexpr int64_t kQueries = ka::kQueries;
constexpr int64_t kKeys = 128;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// C[M, N] (+)= A[M, K] B, all of one block of N = 64 or 32 columns.
void Product(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
             float* c, int64_t ldc, bool add) {
  ka::Kernels().pair_product({m, n, k, a, lda, b, c, ldc, add});
}

// C[M, width] += A[M, 64] B with B packed by PackPairs of 64 rows.
void AddWide(int64_t m, int64_t width, const uint16_t* a, const uint16_t* b, float* c) {
  for (int64_t first = 0; first < width; first += 64) {
    const int64_t block = std::min<int64_t>(64, width - first);
    Product(m, block, kQueries, a, kQueries, b + first * kQueries, c + first, width, true);
  }
}

// One head of a [N, heads, D] tensor.
template <typename T>
struct HeadRowsOf {
  T* data;
  int64_t stride;  // elements
};
template <typename T = uint16_t>
HeadRowsOf<T> HeadOf(const at::Tensor& t, int64_t head) {
  return {static_cast<T*>(t.data_ptr()) + head * t.stride(1), t.stride(0)};
}
using HeadRows = HeadRowsOf<uint16_t>;

void CopyRows(const HeadRows& rows, int64_t first, int64_t count, int64_t padded, int64_t width,
              uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * width, rows.data + (first + i) * rows.stride,
                static_cast<size_t>(width) * sizeof(uint16_t));
  }
  std::memset(to + count * width, 0,
              static_cast<size_t>((padded - count) * width) * sizeof(uint16_t));
}

// What one thread needs for a unit.
struct Scratch {
  std::vector<uint16_t> k, v, k_transposed, v_transposed;  // [padded, D] and [D, padded]
  std::vector<float> dk, dv;                               // [padded, D]
  std::vector<uint16_t> q, g, q_pairs, g_pairs, q_columns, g_columns;  // 64 x D each
  std::vector<float> scores, d_probability;                            // [kKeys, 64]
  std::vector<uint16_t> probability, d_scores, d_scores_pairs;
  std::vector<float> accumulated;  // [D, 64]
  alignas(64) float maximum[kQueries], sum[kQueries], correction[kQueries];
  alignas(64) float lse[kQueries], delta[kQueries];

  void Reserve(int64_t padded, int64_t width, bool backward) {
    const size_t rows = static_cast<size_t>(padded * width);
    const size_t tile = static_cast<size_t>(kKeys * kQueries);
    const size_t block = static_cast<size_t>(kQueries * width);
    k.resize(rows);
    v.resize(rows);
    k_transposed.resize(rows);
    v_transposed.resize(rows);
    for (auto* buffer : {&q, &g, &q_pairs, &g_pairs, &q_columns, &g_columns}) buffer->resize(block);
    scores.resize(tile);
    probability.resize(tile);
    accumulated.resize(block);
    if (!backward) return;
    d_probability.resize(tile);
    d_scores.resize(tile);
    d_scores_pairs.resize(tile);
    dk.assign(rows, 0.0f);
    dv.assign(rows, 0.0f);
  }
};

// A document and key head.
struct Unit {
  MaskedFlash::Rows rows;
  int64_t kv_head = 0;
};

// Where lse of (row, head) lies.
struct LseView {
  float* data;
  int64_t row_stride;
  int64_t head_stride;
  float& at(int64_t row, int64_t head) const { return data[row * row_stride + head * head_stride]; }
};

// What is the same for all units of a call.
struct Shared {
  float scale;
  float scale_log2;
  int64_t width;
  int64_t group;  // query heads per key head
};

constexpr double kLog2E = 1.4426950408889634;

Shared SharedOf(double scale, const at::Tensor& q, const at::Tensor& k) {
  return {static_cast<float>(scale), static_cast<float>(scale * kLog2E), q.size(2),
          q.size(1) / k.size(1)};
}

// Keys of a block: short documents take one block of their own size.
int64_t BlockKeys(int64_t length) { return std::min(kKeys, RoundUp(length, 32)); }

// Keys by position: causal, within a window if there is one.
struct WindowKeys {
  static constexpr bool kTilesFirst = false;
  model::Window window;
  int64_t length = 0;

  int64_t block() const { return BlockKeys(length); }
  void Begin(int64_t /*a*/) {}
  // Visits the key blocks that queries [a, a + 64) see: body(first key, mask).
  template <typename Body>
  void ForBlocks(int64_t a, const Body& body) const {
    const int64_t last_query = std::min(a + kQueries, length) - 1;
    const int64_t keys = BlockKeys(length);
    for (int64_t k0 = 0; k0 <= last_query; k0 += keys) {
      const int64_t k1 = k0 + keys;
      const bool windowed = window.keys > 0;
      if (windowed && k1 - 1 < a - window.keys + 1 && k0 >= window.sinks) continue;
      ka::TileMask mask;
      mask.first_query = a;
      mask.first_key = k0;
      mask.length = length;
      mask.window = window.keys;
      mask.sinks = window.sinks;
      const bool inside = !windowed || a + kQueries - 1 - k0 < window.keys || k1 <= window.sinks;
      mask.partial = !(k1 - 1 <= a && k1 <= length && inside);
      body(k0, mask);
    }
  }
};

// Calls body(first key, end, column) for the spans of queries [a, a + 64) of one set head; keys and
// columns count from the document's and the tile's first.
template <typename Body>
void ForSpans(const KeySets& sets, int64_t set_head, const MaskedFlash::Rows& rows, int64_t a,
              const Body& body) {
  const int64_t last = std::min<int64_t>(rows.queries.length, a + kQueries);
  for (int64_t t = a; t < last; ++t) {
    const int64_t row = rows.queries.first_row + t;
    const auto at = static_cast<size_t>(row * sets.set_heads + set_head);
    const int64_t end = sets.end[static_cast<size_t>(row)];
    for (int64_t i = sets.offsets[at]; i < sets.offsets[at + 1]; ++i) {
      const int64_t first = sets.first[static_cast<size_t>(i)];
      body(first - rows.keys.first_row, std::min(first + sets.width, end) - rows.keys.first_row,
           t - a);
    }
  }
}

// Keys by set.
class SetKeys {
 public:
  static constexpr bool kTilesFirst = true;
  SetKeys(const KeySets& sets, const Unit& unit)
      : sets_(sets),
        rows_(unit.rows),
        set_head_(sets.set_heads == 1 ? 0 : unit.kv_head),
        words_(static_cast<size_t>(RoundUp(rows_.keys.length, kKeys))) {}

  // One size for documents of all lengths: a row's bits do not depend on later ones.
  int64_t block() const { return kKeys; }
  void Begin(int64_t a) {
    std::fill(words_.begin(), words_.end(), uint64_t{0});
    ForSpans(sets_, set_head_, rows_, a, [&](int64_t first, int64_t end, int64_t column) {
      for (int64_t s = first; s < end; ++s) {
        words_[static_cast<size_t>(s)] |= uint64_t{1} << column;
      }
    });
  }
  template <typename Body>
  void ForBlocks(int64_t /*a*/, const Body& body) const {
    for (int64_t k0 = 0; k0 < static_cast<int64_t>(words_.size()); k0 += kKeys) {
      const uint64_t* words = words_.data() + k0;
      uint64_t some = 0;
      uint64_t all = ~uint64_t{0};
      for (int64_t s = 0; s < kKeys; ++s) {
        some |= words[s];
        all &= words[s];
      }
      if (some == 0) continue;
      ka::TileMask mask;
      mask.partial = ~all != 0;
      mask.words = words;
      body(k0, mask);
    }
  }

 private:
  const KeySets& sets_;
  const MaskedFlash::Rows rows_;
  const int64_t set_head_;
  std::vector<uint64_t> words_;  // by key of the document, padded: bit c is query a + c
};

// Calls body(query head, first query) for the tiles of a unit.
template <typename Keys, typename Body>
void ForTiles(const Shared& s, const Unit& unit, Keys* keys, const Body& body) {
  const int64_t first = unit.kv_head * s.group;
  const int64_t length = unit.rows.queries.length;
  if constexpr (Keys::kTilesFirst) {
    for (int64_t a = 0; a < length; a += kQueries) {
      keys->Begin(a);
      for (int64_t h = first; h < first + s.group; ++h) body(h, a);
    }
  } else {
    for (int64_t h = first; h < first + s.group; ++h) {
      for (int64_t a = 0; a < length; a += kQueries) body(h, a);
    }
  }
}

template <typename Keys>
void ForwardTile(const Shared& s, const ka::Table& kernels, const Keys& visible, int64_t keys,
                 int64_t padded, int64_t a, Scratch* t) {
  std::fill_n(t->maximum, kQueries, -std::numeric_limits<float>::infinity());
  std::fill_n(t->sum, kQueries, 0.0f);
  bool first = true;
  visible.ForBlocks(a, [&](int64_t k0, const ka::TileMask& mask) {
    Product(keys, kQueries, s.width, t->k.data() + k0 * s.width, s.width, t->q_columns.data(),
            t->scores.data(), kQueries, false);
    kernels.forward_tile({keys, s.scale_log2, mask, t->scores.data(), t->maximum, t->sum,
                          t->correction, t->probability.data()});
    if (!first) kernels.rescale({s.width, t->correction, t->accumulated.data()});
    Product(s.width, kQueries, keys, t->v_transposed.data() + k0, padded, t->probability.data(),
            t->accumulated.data(), kQueries, !first);
    first = false;
  });
  if (first) std::fill(t->accumulated.begin(), t->accumulated.end(), 0.0f);
}

// The unit's keys and values into the scratch; rows they take there, whole blocks.
int64_t LoadKeys(const Shared& s, const Unit& unit, int64_t block, const at::Tensor& k,
                 const at::Tensor& v, bool backward, Scratch* t) {
  const Document& own = unit.rows.keys;
  const int64_t padded = RoundUp(own.length, block);
  t->Reserve(padded, s.width, backward);
  CopyRows(HeadOf(k, unit.kv_head), own.first_row, own.length, padded, s.width, t->k.data());
  CopyRows(HeadOf(v, unit.kv_head), own.first_row, own.length, padded, s.width, t->v.data());
  return padded;
}

struct ForwardTensors {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& out;
};

template <typename Keys>
void ForwardUnit(const Shared& s, const Unit& unit, Keys* visible, const ForwardTensors& x,
                 const LseView& lse, Scratch* t) {
  const ka::Table& kernels = ka::Kernels();
  const Document& queries = unit.rows.queries;
  const int64_t keys = visible->block();
  const int64_t padded = LoadKeys(s, unit, keys, x.k, x.v, /*backward=*/false, t);
  kernels.transpose({padded, s.width, t->v.data(), t->v_transposed.data()});
  ForTiles(s, unit, visible, [&](int64_t h, int64_t a) {
    const int64_t count = std::min<int64_t>(kQueries, queries.length - a);
    const int64_t row = queries.first_row + a;
    CopyRows(HeadOf(x.q, h), row, count, kQueries, s.width, t->q.data());
    kernels.pack_transposed({s.width, t->q.data(), t->q_columns.data()});
    ForwardTile(s, kernels, *visible, keys, padded, a, t);
    for (int64_t i = 0; i < count; ++i) {
      lse.at(row + i, h) = t->maximum[i] / static_cast<float>(kLog2E) + std::log(t->sum[i]);
    }
    // Not `sum > 0`: a NaN must spread.
    for (float& sum : t->sum) sum = sum == 0 ? 0.0f : 1.0f / sum;
    const HeadRows to = HeadOf(x.out, h);
    kernels.transpose_out(
        {s.width, count, t->accumulated.data(), t->sum, to.data + row * to.stride, to.stride});
  });
}

// Adds one query tile to dK, dV of the unit and leaves dQ^T in `accumulated`.
template <typename Keys>
void BackwardTile(const Shared& s, const ka::Table& kernels, const Keys& visible, int64_t keys,
                  int64_t padded, int64_t a, Scratch* t) {
  bool first = true;
  visible.ForBlocks(a, [&](int64_t k0, const ka::TileMask& mask) {
    const int64_t at = k0 * s.width;
    Product(keys, kQueries, s.width, t->k.data() + at, s.width, t->q_columns.data(),
            t->scores.data(), kQueries, false);
    Product(keys, kQueries, s.width, t->v.data() + at, s.width, t->g_columns.data(),
            t->d_probability.data(), kQueries, false);
    kernels.backward_tile({keys, s.scale, s.scale_log2, mask, t->scores.data(),
                           t->d_probability.data(), t->lse, t->delta, t->probability.data(),
                           t->d_scores.data(), t->d_scores_pairs.data()});
    AddWide(keys, s.width, t->probability.data(), t->g_pairs.data(), t->dv.data() + at);
    AddWide(keys, s.width, t->d_scores.data(), t->q_pairs.data(), t->dk.data() + at);
    Product(s.width, kQueries, keys, t->k_transposed.data() + k0, padded, t->d_scores_pairs.data(),
            t->accumulated.data(), kQueries, !first);
    first = false;
  });
  if (first) std::fill(t->accumulated.begin(), t->accumulated.end(), 0.0f);
}

// Rows of a head of a result, from fp32 rows.
void StoreRows(const std::vector<float>& from, const at::Tensor& result, int64_t head,
               const Document& rows, int64_t width) {
  const pw::Table& kernels = pw::Kernels(pw::Element::kBFloat16);
  for (int64_t i = 0; i < rows.length; ++i) {
    const float* row = from.data() + i * width;
    if (result.scalar_type() == at::kFloat) {
      const auto to = HeadOf<float>(result, head);
      std::copy_n(row, width, to.data + (rows.first_row + i) * to.stride);
    } else {
      const HeadRows to = HeadOf(result, head);
      kernels.convert({row, to.data + (rows.first_row + i) * to.stride}, {0, width});
    }
  }
}

// The same from columns: `count` of the 64 of accumulated[width, 64].
void StoreColumns(const std::vector<float>& accumulated, const at::Tensor& result, int64_t head,
                  int64_t first_row, int64_t count, int64_t width) {
  if (result.scalar_type() == at::kFloat) {
    const auto to = HeadOf<float>(result, head);
    for (int64_t q = 0; q < count; ++q) {
      float* row = to.data + (first_row + q) * to.stride;
      for (int64_t d = 0; d < width; ++d) {
        row[d] = accumulated[static_cast<size_t>(d * kQueries + q)];
      }
    }
    return;
  }
  float ones[kQueries];
  std::fill_n(ones, kQueries, 1.0f);
  const HeadRows to = HeadOf(result, head);
  ka::Kernels().transpose_out(
      {width, count, accumulated.data(), ones, to.data + first_row * to.stride, to.stride});
}

struct BackwardTensors {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& out;
  const at::Tensor& dout;
  const at::Tensor& dq;
  const at::Tensor& dk;
  const at::Tensor& dv;
};

// The operands of a tile of queries for the products, its lse and delta.
void LoadTile(const Shared& s, const BackwardTensors& x, const LseView& lse, int64_t h, int64_t row,
              int64_t count, Scratch* t) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const ka::Table& kernels = ka::Kernels();
  const HeadRows g = HeadOf(x.dout, h);
  const HeadRows o = HeadOf(x.out, h);
  CopyRows(HeadOf(x.q, h), row, count, kQueries, s.width, t->q.data());
  CopyRows(g, row, count, kQueries, s.width, t->g.data());
  kernels.pack_transposed({s.width, t->q.data(), t->q_columns.data()});
  kernels.pack_transposed({s.width, t->g.data(), t->g_columns.data()});
  kernels.pack_pairs({kQueries, s.width, t->q.data(), t->q_pairs.data()});
  kernels.pack_pairs({kQueries, s.width, t->g.data(), t->g_pairs.data()});
  std::fill_n(t->delta, kQueries, 0.0f);
  // Queries that are absent or see nothing: P = 2^(s - inf) = 0. In base 2, as the tiles want it.
  std::fill_n(t->lse, kQueries, kInfinity);
  for (int64_t i = 0; i < count; ++i) {
    const float natural = lse.at(row + i, h);
    if (natural != -kInfinity) t->lse[i] = natural * static_cast<float>(kLog2E);
  }
  kernels.row_dots({count, s.width, g.data + row * g.stride, g.stride, o.data + row * o.stride,
                    o.stride, t->delta});
}

template <typename Keys>
void BackwardUnit(const Shared& s, const Unit& unit, Keys* visible, const BackwardTensors& x,
                  const LseView& lse, Scratch* t) {
  const ka::Table& kernels = ka::Kernels();
  const Document& queries = unit.rows.queries;
  const Document& own = unit.rows.keys;
  const int64_t keys = visible->block();
  const int64_t padded = LoadKeys(s, unit, keys, x.k, x.v, /*backward=*/true, t);
  kernels.transpose({padded, s.width, t->k.data(), t->k_transposed.data()});
  ForTiles(s, unit, visible, [&](int64_t h, int64_t a) {
    const int64_t count = std::min<int64_t>(kQueries, queries.length - a);
    const int64_t row = queries.first_row + a;
    LoadTile(s, x, lse, h, row, count, t);
    BackwardTile(s, kernels, *visible, keys, padded, a, t);
    StoreColumns(t->accumulated, x.dq, h, row, count, s.width);
  });
  StoreRows(t->dk, x.dk, unit.kv_head, own, s.width);
  StoreRows(t->dv, x.dv, unit.kv_head, own, s.width);
}

// One (document, key head) per unit, longest first; bins balance them over threads. A unit's result
// does not depend on its bin.
std::vector<std::vector<Unit>> Bins(const std::vector<MaskedFlash::Rows>& documents,
                                    int64_t kv_heads) {
  std::vector<Unit> units;
  for (const MaskedFlash::Rows& rows : documents) {
    for (int64_t j = 0; j < kv_heads; ++j) units.push_back({rows, j});
  }
  const auto cost = [](const Unit& unit) {
    return unit.rows.queries.length * (unit.rows.keys.length + 4.0 * kKeys);
  };
  std::stable_sort(units.begin(), units.end(),
                   [&](const Unit& a, const Unit& b) { return cost(a) > cost(b); });
  const size_t count = static_cast<size_t>(std::max(1, at::get_num_threads()));
  std::vector<std::vector<Unit>> bins(count);
  std::vector<double> load(count, 0.0);
  for (const Unit& unit : units) {
    const size_t lightest =
        static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    load[lightest] += cost(unit);
    bins[lightest].push_back(unit);
  }
  return bins;
}

// Calls body(unit, scratch) on LibTorch's threads.
template <typename Body>
void ForUnits(const std::vector<MaskedFlash::Rows>& documents, int64_t kv_heads, const Body& body) {
  const ka::Table& kernels = ka::Kernels();
  const auto bins = Bins(documents, kv_heads);
  at::parallel_for(0, static_cast<int64_t>(bins.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    kernels.begin();
    for (int64_t bin = begin; bin < end; ++bin) {
      for (const Unit& unit : bins[static_cast<size_t>(bin)]) body(unit, &scratch);
    }
    kernels.end();
  });
}

std::vector<MaskedFlash::Rows> OwnKeys(const std::vector<Document>& documents) {
  std::vector<MaskedFlash::Rows> rows;
  for (const Document& document : documents) rows.push_back({document, document});
  return rows;
}

}  // namespace

Flash::Flash(double scale, model::Window window) : scale_(scale), window_(window) {}

bool Flash::Supports(const at::Tensor& q) {
  return q.scalar_type() == at::kBFloat16 && q.size(2) % 32 == 0 && q.size(2) <= 256;
}

void Flash::Begin(const std::vector<Document>& documents, int64_t rows) {
  documents_ = documents;
  rows_ = rows;
}

void Flash::Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& out, Saved* saved) const {
  const Shared s = SharedOf(scale_, q, k);
  const at::Tensor lse = at::empty({q.size(1), rows_}, at::kFloat);
  const LseView view{lse.data_ptr<float>(), 1, rows_};
  ForUnits(OwnKeys(documents_), k.size(1), [&](const Unit& unit, Scratch* t) {
    WindowKeys keys{window_, unit.rows.keys.length};
    ForwardUnit(s, unit, &keys, {q, k, v, out}, view, t);
  });
  if (saved != nullptr) saved->tensors.push_back(lse);
}

void Flash::Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                     const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) const {
  HEDDLE_CHECK(saved.tensors.size() == 1);
  const Shared s = SharedOf(scale_, q, k);
  const LseView view{saved.tensors.front().data_ptr<float>(), 1, rows_};
  ForUnits(OwnKeys(documents_), k.size(1), [&](const Unit& unit, Scratch* t) {
    WindowKeys keys{window_, unit.rows.keys.length};
    BackwardUnit(s, unit, &keys, {q, k, v, out, dout, dq, dk, dv}, view, t);
  });
}

MaskedFlash::MaskedFlash(double scale, const KeySets* sets, std::vector<Rows> documents)
    : scale_(scale), sets_(sets), documents_(std::move(documents)) {
  for (const auto& [queries, keys] : documents_) {
    const auto begin = static_cast<size_t>(queries.first_row);
    const auto end = begin + static_cast<size_t>(queries.length);
    HEDDLE_CHECK(end <= sets->end.size(), "rows without sets");
    for (size_t row = begin; row < end; ++row) {
      HEDDLE_CHECK(sets->end[row] <= keys.first_row + keys.length, "keys of another document");
    }
    for (auto i = static_cast<size_t>(sets->offsets[begin * static_cast<size_t>(sets->set_heads)]);
         i < static_cast<size_t>(sets->offsets[end * static_cast<size_t>(sets->set_heads)]); ++i) {
      HEDDLE_CHECK(sets->first[i] >= keys.first_row, "keys of another document");
    }
  }
}

void MaskedFlash::Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& out, const at::Tensor& lse) const {
  const Shared s = SharedOf(scale_, q, k);
  const LseView view{lse.data_ptr<float>(), q.size(1), 1};
  ForUnits(documents_, k.size(1), [&](const Unit& unit, Scratch* t) {
    SetKeys keys(*sets_, unit);
    ForwardUnit(s, unit, &keys, {q, k, v, out}, view, t);
  });
}

void MaskedFlash::Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dout,
                           const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) const {
  const Shared s = SharedOf(scale_, q, k);
  const LseView view{lse.data_ptr<float>(), q.size(1), 1};
  ForUnits(documents_, k.size(1), [&](const Unit& unit, Scratch* t) {
    SetKeys keys(*sets_, unit);
    BackwardUnit(s, unit, &keys, {q, k, v, out, dout, dq, dk, dv}, view, t);
  });
}

}  // namespace heddle::attention
