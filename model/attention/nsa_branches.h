// The three branches of NSA without its weights: who sees which compressed key, block and token,
// the selection, and the attention of each branch. Training and decoding run the same functions;
// only where the rows of a document lie differs. Source: attention-and-moe.md section 5.
//
// N query rows, M compressed rows, H query heads, J key heads, D width. T is the compute type, S
// the statistics type. Keys and queries are rotated.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/block_selection/params.h"
#include "model/attention/key_sets.h"
#include "model/attention/nsa_compression.h"
#include "model/attention/nsa_gates.h"
#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::attention {

struct NsaShape {
  model::Heads heads;
  Compression compression;
  kernels::block_selection::Shape selection;  // sizes, blocks, softmax scale
  int64_t window = 0;                         // W, the query's own key included
  bool separate = false;                      // kv: separate
};
// REQUIRES: PlanModel(config) is OK and its rotary width is the head's.
NsaShape NsaShapeOf(const heddle::v1::ModelConfig& config);

// Where the keys of each query lie. A decoder with one token per sequence gives N sequences.
struct NsaQueries {
  std::vector<int32_t> position;      // [N] t within the document
  std::vector<int32_t> key_first;     // [N] row of the document's first token in k, v (all pairs)
  std::vector<int32_t> window_first;  // [N] row of the document's window 0 in kc, vc
  int64_t count() const { return static_cast<int64_t>(position.size()); }
};
NsaQueries QueriesOf(const layers::Documents& documents, const CompressionWindows& windows);

// The queries with the sets that depend on their positions alone.
struct NsaGeometry {
  NsaQueries queries;
  KeySets compressed;  // the visible prefix of the document's windows
  KeySets window;      // the last W tokens
};
NsaGeometry GeometryOf(const NsaShape& shape, NsaQueries queries);

struct SelectedBlocks {
  KeySets sets;          // width B, one set per key head, spans ascend
  int64_t nan_rows = 0;  // (row, key head) pairs with a NaN among scores that decided
};
// Blocks from the attention over the compressed keys: q [N, H, D] T, kc [M, J, D] T, lse [N, H] S
// of the compressed branch. `scores` [N, J, blocks of the longest] S or undefined. No gradient.
SelectedBlocks SelectBlocks(const NsaShape& shape, const NsaQueries& queries,
                            const at::Tensor& q_NHD, const at::Tensor& kc_MJD,
                            const at::Tensor& lse_NH, layers::BufferPool* scratch,
                            const at::Tensor& scores_NJB = {});

// Keys and values by branch. With shared projections the second and the third pair are the same.
struct NsaKeys {
  at::Tensor kc, vc;              // [M, J, D] compressed, kc rotated
  at::Tensor k, v;                // [.., J, D] of the selected branch
  at::Tensor window_k, window_v;  // [.., J, D]
};

struct NsaAttended {
  BranchOutputs out;                         // [N, H, D] T: cmp, slc, win
  std::array<at::Tensor, kNsaBranches> lse;  // [N, H] S
};
NsaAttended TakeAttended(const NsaShape& shape, int64_t rows, at::ScalarType type,
                         layers::BufferPool* pool);

// The compressed branch, out[0] and lse[0]; what SelectBlocks reads is then there.
void AttendCompressed(const NsaShape& shape, const NsaGeometry& geometry, const at::Tensor& q_NHD,
                      const NsaKeys& keys, const NsaAttended& attended);
// The selected and the window branch. `selected` is made once, by SelectBlocks, and never again.
// Of whole documents by the way that costs less (set_attention.h). The compressed branch has one
// way, since the selection must be that of a decoder to the bit.
void AttendTokens(const NsaShape& shape, const NsaGeometry& geometry, const KeySets& selected,
                  const at::Tensor& q_NHD, const NsaKeys& keys, const NsaAttended& attended);
void AttendTokens(const NsaShape& shape, const NsaGeometry& geometry, const KeySets& selected,
                  const KeyDocuments& documents, const at::Tensor& q_NHD, const NsaKeys& keys,
                  const NsaAttended& attended);

}  // namespace heddle::attention
