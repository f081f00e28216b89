#include "model/attention/conversion.h"

#include "base/status/status.h"

namespace heddle::attention {
namespace {

bool DenseRows(const at::Tensor& t) {
  int64_t expected = 1;
  for (int64_t dim = t.dim() - 1; dim > 0; --dim) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return t.dim() != 1 || t.is_contiguous();
}

}  // namespace

at::Tensor Converted(const at::Tensor& t, at::ScalarType type, layers::BufferPool* pool) {
  if (!t.defined() || (t.scalar_type() == type && DenseRows(t))) return t;
  HEDDLE_CHECK(t.dim() >= 1 && t.dim() <= 3, "rank is ", t.dim());
  at::Tensor copy = t.dim() == 1   ? pool->Take({t.size(0)}, type)
                    : t.dim() == 2 ? pool->Take({t.size(0), t.size(1)}, type)
                                   : pool->Take({t.size(0), t.size(1), t.size(2)}, type);
  copy.copy_(t);
  return copy;
}

}  // namespace heddle::attention
