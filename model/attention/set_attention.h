// Attention over key sets by the way that costs less: gathered (sparse_attention.h), or as masked
// dense tiles (MaskedFlash in flash.h). Both see exactly the sets; they differ by rounding. Of each
// document the first rows run as tiles, as long as a tile over all visible keys costs less than
// what is gathered later on. How many is of KeySets::usual, the types, widths and groups and the
// instruction set alone: neither threads, nor other documents, nor later rows change a row's bits.
// In tiles a value that is no number also reaches rows of its tile that do not see its key.
// Source: attention-and-moe.md 16.2.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/attention/key_sets.h"

namespace heddle::attention {

// As SparseAttention. `documents` cover all rows.
void SetAttention(double scale, const KeySets& sets, const KeyDocuments& documents,
                  const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJE,
                  const at::Tensor& out_NHE, const at::Tensor& lse_NH);

// As SparseAttentionBackward; dq, dk and dv of T or all of S. `out` and `lse` of either way.
void SetAttentionBackward(double scale, const KeySets& sets, const KeyDocuments& documents,
                          const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJE,
                          const at::Tensor& out_NHE, const at::Tensor& lse_NH,
                          const at::Tensor& dout_NHE, const at::Tensor& dq_NHD,
                          const at::Tensor& dk_MJD, const at::Tensor& dv_MJE);

// Rows of queries, with the keys they see, that run as tiles in a forward. For tests.
KeyDocuments TiledRows(const KeySets& sets, const KeyDocuments& documents, const at::Tensor& q_NHD,
                       const at::Tensor& k_MJD, const at::Tensor& v_MJE);

}  // namespace heddle::attention
