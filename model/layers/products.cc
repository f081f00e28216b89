#include "model/layers/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "kernels/common/isa.h"

namespace heddle::layers {

bool WidensBf16() {
  static const bool widens = kernels::SelectedIsa() < kernels::Isa::kAvx512;
  return widens;
}

at::Tensor Widened(const at::Tensor& t) {
  return t.scalar_type() == at::kBFloat16 && WidensBf16() ? t.to(at::kFloat) : t;
}

void Product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  at::Tensor to = out;
  if (a.scalar_type() == at::kBFloat16 && WidensBf16()) {
    to.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
  } else {
    at::mm_out(to, a, b);
  }
}

void ProductAdd(const at::Tensor& base, const at::Tensor& a, const at::Tensor& b,
                const at::Tensor& out) {
  at::Tensor to = out;
  if (a.scalar_type() == at::kBFloat16 && WidensBf16()) {
    to.copy_(at::addmm(base.to(at::kFloat), a.to(at::kFloat), b.to(at::kFloat)));
  } else {
    at::addmm_out(to, base, a, b);
  }
}

}  // namespace heddle::layers
