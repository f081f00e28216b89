#include "model/moe/expert_products.h"

#include <cstdint>
#include <memory>
#include <new>

#include "base/status/status.h"
#include "kernels/linear/params.h"
#include "model/layers/layers.h"

namespace heddle::moe {
namespace {

namespace linear = kernels::linear;

constexpr size_t kAlignment = 64;

// Memory of this thread, at least `bytes` long; its contents are those of anybody.
void* Workspace(int64_t bytes) {
  struct Free {
    void operator()(std::byte* memory) const {
      ::operator delete(memory, std::align_val_t(kAlignment));
    }
  };
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    memory.reset(static_cast<std::byte*>(
        ::operator new(static_cast<size_t>(bytes), std::align_val_t(kAlignment))));
    size = bytes;
  }
  return memory.get();
}

bool UsesKernels(const at::Tensor& t) {
  return t.scalar_type() == at::kBFloat16 && linear::HasPairProducts();
}

template <typename T>
T* DataOf(const at::Tensor& t) {
  HEDDLE_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1));
  return static_cast<T*>(t.data_ptr());
}

}  // namespace

void ExpertLinear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& y) {
  if (!UsesKernels(x)) return layers::Linear(x, weight, y);
  HEDDLE_CHECK(x.size(1) == weight.size(1) && y.size(1) == weight.size(0));
  HEDDLE_CHECK(x.size(0) == y.size(0));
  const linear::Forward p{x.size(0),        weight.size(1),
                          weight.size(0),   DataOf<const uint16_t>(x),
                          x.stride(0),      DataOf<const uint16_t>(weight),
                          weight.stride(0), DataOf<uint16_t>(y),
                          y.stride(0)};
  linear::Kernels().forward(p, Workspace(linear::WorkspaceBytes(p)));
}

void ExpertInputGradient(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx) {
  if (!UsesKernels(dy)) return layers::LinearInputGradient(dy, weight, dx);
  HEDDLE_CHECK(dy.size(1) == weight.size(0) && dx.size(1) == weight.size(1));
  HEDDLE_CHECK(dy.size(0) == dx.size(0));
  const linear::InputGradient p{dy.size(0),       weight.size(1),
                                weight.size(0),   DataOf<const uint16_t>(dy),
                                dy.stride(0),     DataOf<const uint16_t>(weight),
                                weight.stride(0), DataOf<uint16_t>(dx),
                                dx.stride(0)};
  linear::Kernels().input_gradient(p, Workspace(linear::WorkspaceBytes(p)));
}

void ExpertWeightGradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gradient) {
  if (!UsesKernels(dy)) return layers::LinearWeightGradient(dy, x, gradient);
  HEDDLE_CHECK(gradient.size(0) == dy.size(1) && gradient.size(1) == x.size(1));
  HEDDLE_CHECK(dy.size(0) == x.size(0) && gradient.scalar_type() == at::kFloat);
  const linear::WeightGradient p{dy.size(0),        x.size(1),
                                 dy.size(1),        DataOf<const uint16_t>(dy),
                                 dy.stride(0),      DataOf<const uint16_t>(x),
                                 x.stride(0),       DataOf<float>(gradient),
                                 gradient.stride(0)};
  linear::Kernels().weight_gradient(p, Workspace(linear::WorkspaceBytes(p)));
}

}  // namespace heddle::moe
