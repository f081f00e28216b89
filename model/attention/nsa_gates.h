// How NSA's branches become one output: o[n,h] = sum_b sigmoid(logits[n,h,b]) branch_b[n,h],
// forward and backward. Source: attention-and-moe.md section 5.1 (combine).
//
// N rows, H heads, D width, branches in the order cmp, slc, win. T is the compute type, S the
// statistics type; sums run in S.
#pragma once

#include <array>

#include <ATen/core/Tensor.h>

namespace heddle::attention {

inline constexpr int64_t kNsaBranches = 3;
using BranchOutputs = std::array<at::Tensor, kNsaBranches>;  // [N, H, D] T, contiguous

// out [N, H D] T. logits [N, 3 H] T, laid out (head, branch).
void CombineBranches(const at::Tensor& logits_NG, const BranchOutputs& branches,
                     const at::Tensor& out_NC);

// dlogits [N, 3 H] T = dL/dlogits.
void GateGradients(const at::Tensor& logits_NG, const BranchOutputs& branches,
                   const at::Tensor& dout_NC, const at::Tensor& dlogits_NG);

// dbranch [N, H, D] T = gate of the branch times dout.
void BranchGradient(const at::Tensor& logits_NG, int64_t branch, const at::Tensor& dout_NC,
                    const at::Tensor& dbranch_NHD);

}  // namespace heddle::attention
