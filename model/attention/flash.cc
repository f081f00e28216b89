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
// and V and fp32 dK, dV of one document and head.
#include "model/attention/flash.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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
struct HeadRows {
  uint16_t* data;
  int64_t stride;  // elements
};
HeadRows HeadOf(const at::Tensor& t, int64_t head) {
  return {static_cast<uint16_t*>(t.data_ptr()) + head * t.stride(1), t.stride(0)};
}

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

}  // namespace

struct Flash::Unit {
  Document document;
  int64_t kv_head = 0;
};

namespace {

// What is the same for all units of a call.
struct Shared {
  float scale;
  float scale_log2;
  model::Window window;
  int64_t width;
  int64_t group;  // query heads per key head
  int64_t rows;   // N
};

constexpr double kLog2E = 1.4426950408889634;

Shared SharedOf(double scale, model::Window window, const at::Tensor& q, const at::Tensor& k,
                int64_t rows) {
  return {static_cast<float>(scale),
          static_cast<float>(scale * kLog2E),
          window,
          q.size(2),
          q.size(1) / k.size(1),
          rows};
}

// Keys of a block: short documents take one block of their own size.
int64_t BlockKeys(int64_t length) { return std::min(kKeys, RoundUp(length, 32)); }

// Visits the key blocks that queries [a, a + 64) see: body(first key, mask).
template <typename Body>
void ForKeyBlocks(const Shared& s, int64_t length, int64_t a, const Body& body) {
  const int64_t last_query = std::min(a + kQueries, length) - 1;
  const int64_t keys = BlockKeys(length);
  for (int64_t k0 = 0; k0 <= last_query; k0 += keys) {
    const int64_t k1 = k0 + keys;
    const bool windowed = s.window.keys > 0;
    if (windowed && k1 - 1 < a - s.window.keys + 1 && k0 >= s.window.sinks) continue;
    ka::TileMask mask;
    mask.first_query = a;
    mask.first_key = k0;
    mask.length = length;
    mask.window = s.window.keys;
    mask.sinks = s.window.sinks;
    const bool inside = !windowed || a + kQueries - 1 - k0 < s.window.keys || k1 <= s.window.sinks;
    mask.partial = !(k1 - 1 <= a && k1 <= length && inside);
    body(k0, mask);
  }
}

void ForwardTile(const Shared& s, const ka::Table& kernels, int64_t length, int64_t padded,
                 int64_t a, Scratch* t) {
  const int64_t keys = BlockKeys(length);
  std::fill_n(t->maximum, kQueries, -std::numeric_limits<float>::infinity());
  std::fill_n(t->sum, kQueries, 0.0f);
  bool first = true;
  ForKeyBlocks(s, length, a, [&](int64_t k0, const ka::TileMask& mask) {
    Product(keys, kQueries, s.width, t->k.data() + k0 * s.width, s.width, t->q_columns.data(),
            t->scores.data(), kQueries, false);
    kernels.forward_tile({keys, s.scale_log2, mask, t->scores.data(), t->maximum, t->sum,
                          t->correction, t->probability.data()});
    if (!first) kernels.rescale({s.width, t->correction, t->accumulated.data()});
    Product(s.width, kQueries, keys, t->v_transposed.data() + k0, padded, t->probability.data(),
            t->accumulated.data(), kQueries, !first);
    first = false;
  });
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

std::vector<std::vector<Flash::Unit>> Flash::Bins(int64_t kv_heads) const {
  std::vector<Unit> units;
  for (const Document& document : documents_) {
    for (int64_t j = 0; j < kv_heads; ++j) units.push_back({document, j});
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
    return a.document.length > b.document.length;
  });
  const size_t count = static_cast<size_t>(std::max(1, at::get_num_threads()));
  std::vector<std::vector<Unit>> bins(count);
  std::vector<double> load(count, 0.0);
  for (const Unit& unit : units) {
    const size_t lightest =
        static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    const double length = unit.document.length;
    load[lightest] += length * (length + 4.0 * kKeys);
    bins[lightest].push_back(unit);
  }
  return bins;
}

void Flash::Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& out, Saved* saved) const {
  const Shared s = SharedOf(scale_, window_, q, k, rows_);
  const ka::Table& kernels = ka::Kernels();
  const at::Tensor lse = at::empty({q.size(1), rows_}, at::kFloat);
  float* lse_data = lse.data_ptr<float>();
  const auto bins = Bins(k.size(1));
  const auto run = [&](const Unit& unit, Scratch* t) {
    const int64_t first_row = unit.document.first_row;
    const int64_t length = unit.document.length;
    const int64_t padded = RoundUp(length, BlockKeys(length));
    t->Reserve(padded, s.width, /*backward=*/false);
    CopyRows(HeadOf(k, unit.kv_head), first_row, length, padded, s.width, t->k.data());
    CopyRows(HeadOf(v, unit.kv_head), first_row, length, padded, s.width, t->v.data());
    kernels.transpose({padded, s.width, t->v.data(), t->v_transposed.data()});
    for (int64_t h = unit.kv_head * s.group; h < (unit.kv_head + 1) * s.group; ++h) {
      for (int64_t a = 0; a < length; a += kQueries) {
        const int64_t queries = std::min(kQueries, length - a);
        CopyRows(HeadOf(q, h), first_row + a, queries, kQueries, s.width, t->q.data());
        kernels.pack_transposed({s.width, t->q.data(), t->q_columns.data()});
        ForwardTile(s, kernels, length, padded, a, t);
        for (int64_t i = 0; i < queries; ++i) {
          lse_data[h * s.rows + first_row + a + i] =
              t->maximum[i] / static_cast<float>(kLog2E) + std::log(t->sum[i]);
        }
        for (float& sum : t->sum) sum = 1.0f / sum;
        const HeadRows to = HeadOf(out, h);
        kernels.transpose_out({s.width, queries, t->accumulated.data(), t->sum,
                               to.data + (first_row + a) * to.stride, to.stride});
      }
    }
  };
  at::parallel_for(0, static_cast<int64_t>(bins.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    kernels.begin();
    for (int64_t bin = begin; bin < end; ++bin) {
      for (const Unit& unit : bins[static_cast<size_t>(bin)]) run(unit, &scratch);
    }
    kernels.end();
  });
  if (saved != nullptr) saved->tensors.push_back(lse);
}

namespace {

// Adds one query tile to dK, dV of the unit and leaves dQ^T in `accumulated`.
void BackwardTile(const Shared& s, const ka::Table& kernels, int64_t length, int64_t padded,
                  int64_t a, Scratch* t) {
  const int64_t keys = BlockKeys(length);
  bool first = true;
  ForKeyBlocks(s, length, a, [&](int64_t k0, const ka::TileMask& mask) {
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
}

void StoreRows(const std::vector<float>& from, const HeadRows& to, int64_t first, int64_t count,
               int64_t width) {
  const pw::Table& kernels = pw::Kernels(pw::Element::kBFloat16);
  for (int64_t i = 0; i < count; ++i) {
    kernels.convert({from.data() + i * width, to.data + (first + i) * to.stride}, {0, width});
  }
}

}  // namespace

void Flash::Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                     const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) const {
  HEDDLE_CHECK(saved.tensors.size() == 1);
  const Shared s = SharedOf(scale_, window_, q, k, rows_);
  const ka::Table& kernels = ka::Kernels();
  const float* lse = saved.tensors.front().data_ptr<float>();
  const auto bins = Bins(k.size(1));
  static constexpr float kOnes[kQueries] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                            1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                            1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                            1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const auto load_tile = [&](int64_t h, int64_t row, int64_t queries, Scratch* t) {
    const HeadRows g = HeadOf(dout, h);
    const HeadRows o = HeadOf(out, h);
    CopyRows(HeadOf(q, h), row, queries, kQueries, s.width, t->q.data());
    CopyRows(g, row, queries, kQueries, s.width, t->g.data());
    kernels.pack_transposed({s.width, t->q.data(), t->q_columns.data()});
    kernels.pack_transposed({s.width, t->g.data(), t->g_columns.data()});
    kernels.pack_pairs({kQueries, s.width, t->q.data(), t->q_pairs.data()});
    kernels.pack_pairs({kQueries, s.width, t->g.data(), t->g_pairs.data()});
    std::fill_n(t->delta, kQueries, 0.0f);
    // Absent queries: P = 2^(s - inf) = 0. In base 2, as the tiles want it.
    std::fill_n(t->lse, kQueries, std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < queries; ++i) {
      t->lse[i] = lse[h * s.rows + row + i] * static_cast<float>(kLog2E);
    }
    kernels.row_dots({queries, s.width, g.data + row * g.stride, g.stride, o.data + row * o.stride,
                      o.stride, t->delta});
  };
  const auto run = [&](const Unit& unit, Scratch* t) {
    const int64_t first_row = unit.document.first_row;
    const int64_t length = unit.document.length;
    const int64_t padded = RoundUp(length, BlockKeys(length));
    t->Reserve(padded, s.width, /*backward=*/true);
    CopyRows(HeadOf(k, unit.kv_head), first_row, length, padded, s.width, t->k.data());
    CopyRows(HeadOf(v, unit.kv_head), first_row, length, padded, s.width, t->v.data());
    kernels.transpose({padded, s.width, t->k.data(), t->k_transposed.data()});
    for (int64_t h = unit.kv_head * s.group; h < (unit.kv_head + 1) * s.group; ++h) {
      for (int64_t a = 0; a < length; a += kQueries) {
        const int64_t queries = std::min(kQueries, length - a);
        load_tile(h, first_row + a, queries, t);
        BackwardTile(s, kernels, length, padded, a, t);
        const HeadRows to = HeadOf(dq, h);
        kernels.transpose_out({s.width, queries, t->accumulated.data(), kOnes,
                               to.data + (first_row + a) * to.stride, to.stride});
      }
    }
    StoreRows(t->dk, HeadOf(dk, unit.kv_head), first_row, length, s.width);
    StoreRows(t->dv, HeadOf(dv, unit.kv_head), first_row, length, s.width);
  };
  at::parallel_for(0, static_cast<int64_t>(bins.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    kernels.begin();
    for (int64_t bin = begin; bin < end; ++bin) {
      for (const Unit& unit : bins[static_cast<size_t>(bin)]) run(unit, &scratch);
    }
    kernels.end();
  });
}

}  // namespace heddle::attention
