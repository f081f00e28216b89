// Torch edge of kernels/sparse_attention: checks tensors once, converts bf16 to fp32 around the
// kernel, splits rows and keys over LibTorch's threads. Results do not depend on the number of
// threads (C5) and a document's results not on the batch it is in (C2).
//
// N query rows, M key rows, H, J heads, Dk, Dv widths (may differ). T bf16, fp32 or fp64; S =
// fp32, or fp64 where T is fp64.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/attention/key_sets.h"

namespace heddle::attention {

// out [N, H, Dv] T and lse [N, H] S are overwritten. First dimensions of q, k, v, out may be
// strided. With `only`, rows of other documents mean nothing afterwards.
void SparseAttention(double scale, const KeySets& sets, const at::Tensor& q_NHD,
                     const at::Tensor& k_MJD, const at::Tensor& v_MJE, const at::Tensor& out_NHE,
                     const at::Tensor& lse_NH, const KeyDocuments* only = nullptr);

// REQUIRES of both, and of SetAttention: types, shapes and sets fit together.
void CheckAttention(const KeySets& sets, const at::Tensor& q_NHD, const at::Tensor& k_MJD,
                    const at::Tensor& v_MJE, const at::Tensor& out_NHE, const at::Tensor& lse_NH);
void CheckGradients(const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJE,
                    const at::Tensor& out_NHE, const at::Tensor& dout_NHE, const at::Tensor& dq_NHD,
                    const at::Tensor& dk_MJD, const at::Tensor& dv_MJE);

// dq, dk, dv [.., T or S] are overwritten; they may be strided in the first dimension. Rows outside
// `documents` mean nothing afterwards.
void SparseAttentionBackward(double scale, const KeySets& sets, const KeyDocuments& documents,
                             const at::Tensor& q_NHD, const at::Tensor& k_MJD,
                             const at::Tensor& v_MJE, const at::Tensor& out_NHE,
                             const at::Tensor& lse_NH, const at::Tensor& dout_NHE,
                             const at::Tensor& dq_NHD, const at::Tensor& dk_MJD,
                             const at::Tensor& dv_MJE);

}  // namespace heddle::attention
