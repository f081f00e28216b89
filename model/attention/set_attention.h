// Attention over key sets by the way that costs less, per document: gathered (sparse_attention.h),
// or as masked dense tiles (MaskedFlash in flash.h). Both see exactly the sets; they differ by
// rounding. The choice is of the document's sets, the types and widths and the instruction set
// alone: neither threads nor other documents change a result. Source: attention-and-moe.md 16.2.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/attention/key_sets.h"

namespace heddle::attention {

// As SparseAttention. `documents` cover all rows.
void SetAttention(double scale, const KeySets& sets, const KeyDocuments& documents,
                  const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJE,
                  const at::Tensor& out_NHE, const at::Tensor& lse_NH);

// As SparseAttentionBackward, dq, dk and dv of T or all of S; after SetAttention of the same sets,
// documents and widths.
void SetAttentionBackward(double scale, const KeySets& sets, const KeyDocuments& documents,
                          const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJE,
                          const at::Tensor& out_NHE, const at::Tensor& lse_NH,
                          const at::Tensor& dout_NHE, const at::Tensor& dq_NHD,
                          const at::Tensor& dk_MJD, const at::Tensor& dv_MJE);

// The documents whose attention runs as tiles. For tests and benchmarks.
KeyDocuments TiledDocuments(const KeySets& sets, const KeyDocuments& documents,
                            const at::Tensor& q_NHD, const at::Tensor& v_MJE);

}  // namespace heddle::attention
