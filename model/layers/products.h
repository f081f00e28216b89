// Matrix products of the compute type. LibTorch multiplies bf16 fast only where the processor has
// AVX-512 at least; elsewhere its loops are a hundred times slower than fp32's. There, operands are
// widened and the result is rounded once: equal up to the order of the sums.
//
// T bf16, fp32 or fp64. May be called from any thread.
#pragma once

#include <ATen/core/Tensor.h>

namespace heddle::layers {

// Whether bf16 products run in fp32 on this machine, or because HEDDLE_ISA says so. Constant.
bool WidensBf16();
// `t` in fp32 if it is bf16 and WidensBf16(), else itself.
at::Tensor Widened(const at::Tensor& t);

// out [M, N] = a [M, K] b [K, N]; any may be strided or transposed.
void Product(const at::Tensor& a_MK, const at::Tensor& b_KN, const at::Tensor& out_MN);
// out = base + a b; `base` [M, N] or [N], may be `out`.
void ProductAdd(const at::Tensor& base_MN, const at::Tensor& a_MK, const at::Tensor& b_KN,
                const at::Tensor& out_MN);

}  // namespace heddle::layers
