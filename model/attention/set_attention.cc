#include "model/attention/set_attention.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/attention/params.h"
#include "model/attention/flash.h"
#include "model/attention/sparse_attention.h"

namespace heddle::attention {
namespace {

using kernels::attention::kQueries;

struct Ways {
  KeyDocuments tiled;
  KeyDocuments gathered;
  bool all_keys_tiled = true;  // every key is one of the tiled documents'
};

// Rows of a document that run as tiles if it is long enough: a tile sees some `row` keys of which
// `usual` would be gathered, each at `cost`.
int64_t FirstRows(int64_t usual, double cost) {
  constexpr int64_t kAll = int64_t{1} << 40;  // longer than any document
  if (cost == 0) return 0;
  if (usual >= kAll) return kAll;
  return static_cast<int64_t>(cost * static_cast<double>(usual)) / kQueries * kQueries;
}

// Keys that rows [0, count) of a document see.
int64_t VisibleKeys(const KeySets& sets, const KeyDocuments::Rows& document, int64_t count) {
  int64_t end = document.keys.first_row;
  for (int64_t row = document.queries.first_row; row < document.queries.first_row + count; ++row) {
    end = std::max<int64_t>(end, sets.end[static_cast<size_t>(row)]);
  }
  return end - document.keys.first_row;
}

Ways WaysOf(const KeySets& sets, const KeyDocuments& documents, int64_t first_rows) {
  Ways ways;
  for (const KeyDocuments::Rows& document : documents.rows) {
    const auto& [queries, keys] = document;
    int64_t count = std::min<int64_t>(queries.length, first_rows);
    const int64_t visible = VisibleKeys(sets, document, count);
    if (visible == 0) count = 0;
    const auto tiled = static_cast<int32_t>(count);
    if (tiled > 0) {
      ways.tiled.rows.push_back(
          {{queries.first_row, tiled}, {keys.first_row, static_cast<int32_t>(visible)}});
    }
    ways.all_keys_tiled = ways.all_keys_tiled && count > 0 && visible == keys.length;
    // A document without queries too: its keys' gradients are 0.
    if (tiled < queries.length || queries.length == 0) {
      ways.gathered.rows.push_back({{queries.first_row + tiled, queries.length - tiled}, keys});
    }
  }
  return ways;
}

kernels::attention::PairCost CostOf(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (!Flash::Supports(q) || v.size(2) != q.size(2)) return {};
  return kernels::attention::GatheredPairCost(q.size(1) / k.size(1));
}

}  // namespace

KeyDocuments TiledRows(const KeySets& sets, const KeyDocuments& documents, const at::Tensor& q,
                       const at::Tensor& k, const at::Tensor& v) {
  return WaysOf(sets, documents, FirstRows(sets.usual, CostOf(q, k, v).forward)).tiled;
}

// What is gathered comes first: it may write other rows too.
void SetAttention(double scale, const KeySets& sets, const KeyDocuments& documents,
                  const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& out, const at::Tensor& lse) {
  CheckAttention(sets, q, k, v, out, lse);
  Ways ways = WaysOf(sets, documents, FirstRows(sets.usual, CostOf(q, k, v).forward));
  if (!ways.gathered.rows.empty()) {
    SparseAttention(scale, sets, q, k, v, out, lse, &ways.gathered);
  }
  if (!ways.tiled.rows.empty()) {
    MaskedFlash(scale, &sets, std::move(ways.tiled.rows)).Forward(q, k, v, out, lse);
  }
}

// Keys that rows of both ways see get the sum of two gradients, rounded once.
void SetAttentionBackward(double scale, const KeySets& sets, const KeyDocuments& documents,
                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dout,
                          const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  CheckAttention(sets, q, k, v, out, lse);
  CheckGradients(q, k, v, out, dout, dq, dk, dv);
  Ways ways = WaysOf(sets, documents, FirstRows(sets.usual, CostOf(q, k, v).backward));
  if (ways.tiled.rows.empty()) {
    SparseAttentionBackward(scale, sets, documents, q, k, v, out, lse, dout, dq, dk, dv);
    return;
  }
  const MaskedFlash tiles(scale, &sets, std::move(ways.tiled.rows));
  if (ways.gathered.rows.empty() && ways.all_keys_tiled) {
    tiles.Backward(q, k, v, out, lse, dout, dq, dk, dv);
    return;
  }
  const auto zeros = [](const at::Tensor& like) { return at::zeros(like.sizes(), at::kFloat); };
  at::Tensor dk_sum = zeros(dk);
  at::Tensor dv_sum = zeros(dv);
  if (!ways.gathered.rows.empty()) {
    SparseAttentionBackward(scale, sets, ways.gathered, q, k, v, out, lse, dout, dq, dk_sum,
                            dv_sum);
  }
  const at::Tensor dk_tiles = zeros(dk);
  const at::Tensor dv_tiles = zeros(dv);
  tiles.Backward(q, k, v, out, lse, dout, dq, dk_tiles, dv_tiles);
  dk.copy_(dk_sum.add_(dk_tiles));
  dv.copy_(dv_sum.add_(dv_tiles));
}

}  // namespace heddle::attention
