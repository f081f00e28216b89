#include "model/attention/set_attention.h"

#include <utility>
#include <vector>

#include "kernels/attention/params.h"
#include "model/attention/flash.h"
#include "model/attention/sparse_attention.h"

namespace heddle::attention {
namespace {

struct Ways {
  KeyDocuments tiled;
  KeyDocuments gathered;
};

// Tiles of a document without keys would be none at all, and nobody would write its output.
bool RunsAsTiles(const KeySets& sets, const KeyDocuments::Rows& rows) {
  if (rows.queries.length == 0 || rows.keys.length == 0) return false;
  const int64_t pairs =
      sets.pairs(rows.queries.first_row, rows.queries.first_row + rows.queries.length);
  const auto tiles = static_cast<double>(MaskedFlash::TilePairs(sets, rows));
  return tiles <= kernels::attention::GatheredPairCost() * static_cast<double>(pairs);
}

Ways WaysOf(const KeySets& sets, const KeyDocuments& documents, const at::Tensor& q,
            const at::Tensor& v) {
  Ways ways;
  const bool possible = Flash::Supports(q) && v.scalar_type() == q.scalar_type() &&
                        v.size(2) == q.size(2) && kernels::attention::GatheredPairCost() > 0;
  for (const KeyDocuments::Rows& rows : documents.rows) {
    const bool tiled = possible && RunsAsTiles(sets, rows);
    (tiled ? ways.tiled : ways.gathered).rows.push_back(rows);
  }
  return ways;
}

}  // namespace

KeyDocuments TiledDocuments(const KeySets& sets, const KeyDocuments& documents, const at::Tensor& q,
                            const at::Tensor& v) {
  return WaysOf(sets, documents, q, v).tiled;
}

// What is gathered comes first: it may write other rows too.
void SetAttention(double scale, const KeySets& sets, const KeyDocuments& documents,
                  const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& out, const at::Tensor& lse) {
  Ways ways = WaysOf(sets, documents, q, v);
  if (!ways.gathered.rows.empty()) {
    SparseAttention(scale, sets, q, k, v, out, lse, &ways.gathered);
  }
  if (!ways.tiled.rows.empty()) {
    MaskedFlash(scale, &sets, std::move(ways.tiled.rows)).Forward(q, k, v, out, lse);
  }
}

void SetAttentionBackward(double scale, const KeySets& sets, const KeyDocuments& documents,
                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dout,
                          const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  Ways ways = WaysOf(sets, documents, q, v);
  if (!ways.gathered.rows.empty()) {
    SparseAttentionBackward(scale, sets, ways.gathered, q, k, v, out, lse, dout, dq, dk, dv);
  }
  if (!ways.tiled.rows.empty()) {
    MaskedFlash(scale, &sets, std::move(ways.tiled.rows))
        .Backward(q, k, v, out, lse, dout, dq, dk, dv);
  }
}

}  // namespace heddle::attention
