// The matrix products of experts, each by the calling thread: many of them run at once, one per
// piece of rows (experts.h). bf16 of a processor that multiplies pairs of bf16 goes through
// kernels/linear, everything else through LibTorch (layers/layers.h).
//
// Matrices with dense rows of any stride, T compute type; gradients of weights have the statistics
// type. May be called from any thread; a thread keeps the memory it works in: at most 8 MiB for
// widths up to 2048.
#pragma once

#include <ATen/core/Tensor.h>

namespace heddle::moe {

// y [R, O] = x [R, I] weight [O, I]^T
void ExpertLinear(const at::Tensor& x_RI, const at::Tensor& weight_OI, const at::Tensor& y_RO);
// dx [R, I] = dy [R, O] weight
void ExpertInputGradient(const at::Tensor& dy_RO, const at::Tensor& weight_OI,
                         const at::Tensor& dx_RI);
// gradient [O, I] += dy^T x. The kernels add in fp32; LibTorch rounds the product first.
void ExpertWeightGradient(const at::Tensor& dy_RO, const at::Tensor& x_RI,
                          const at::Tensor& gradient_OI);

}  // namespace heddle::moe
