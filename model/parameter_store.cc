#include "model/parameter_store.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/rng/rng.h"
#include "kernels/pointwise/params.h"

namespace heddle::model {
namespace {

constexpr size_t kBufferAlignment = 128;
constexpr int64_t kParallelElements = 64 * 1024;

}  // namespace

struct ParameterStore::Buffer {
  explicit Buffer(size_t size)
      : bytes((size + kBufferAlignment) / kBufferAlignment * kBufferAlignment),
        data(std::aligned_alloc(kBufferAlignment, bytes)) {
    if (data != nullptr) std::memset(data, 0, bytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  size_t bytes;
  void* data;
};

ParameterStore::ParameterStore(ModelPlan plan, Precision precision)
    : plan_(std::move(plan)), precision_(precision) {}
ParameterStore::~ParameterStore() = default;

StatusOr<std::unique_ptr<ParameterStore>> ParameterStore::Create(ModelPlan plan,
                                                                 Precision precision) {
  const size_t elements = static_cast<size_t>(plan.flat_elements);
  const size_t wide = precision == Precision::kFp64 ? sizeof(double) : sizeof(float);
  const size_t buffer_bytes = static_cast<size_t>(plan.buffer_elements) * sizeof(float);
  std::unique_ptr<ParameterStore> store(new ParameterStore(std::move(plan), precision));
  store->buffers_ = std::make_unique<Buffer>(buffer_bytes);
  store->master_ = std::make_unique<Buffer>(elements * wide);
  store->gradients_ = std::make_unique<Buffer>(elements * wide);
  const bool bf16 = precision == Precision::kBf16;
  if (bf16) store->compute_ = std::make_unique<Buffer>(elements * sizeof(uint16_t));
  if (store->master_->data == nullptr || store->gradients_->data == nullptr ||
      store->buffers_->data == nullptr || (bf16 && store->compute_->data == nullptr)) {
    return ResourceExhausted(Str("parameters: no memory for ", elements, " elements"));
  }
  return store;
}

std::span<float> ParameterStore::master() {
  HEDDLE_CHECK(precision_ != Precision::kFp64);
  return {static_cast<float*>(master_->data), static_cast<size_t>(plan_.flat_elements)};
}
std::span<const float> ParameterStore::master() const {
  HEDDLE_CHECK(precision_ != Precision::kFp64);
  return {static_cast<const float*>(master_->data), static_cast<size_t>(plan_.flat_elements)};
}
std::span<float> ParameterStore::gradients() {
  HEDDLE_CHECK(precision_ != Precision::kFp64);
  return {static_cast<float*>(gradients_->data), static_cast<size_t>(plan_.flat_elements)};
}
std::span<uint16_t> ParameterStore::compute_bf16() {
  if (precision_ != Precision::kBf16) return {};
  return {static_cast<uint16_t*>(compute_->data), static_cast<size_t>(plan_.flat_elements)};
}
std::span<float> ParameterStore::master(const TensorSpec& tensor) {
  HEDDLE_CHECK(tensor.offset + tensor.elements <= plan_.flat_elements);
  return master().subspan(static_cast<size_t>(tensor.offset), static_cast<size_t>(tensor.elements));
}

std::span<float> ParameterStore::buffers() {
  return {static_cast<float*>(buffers_->data), static_cast<size_t>(plan_.buffer_elements)};
}
std::span<const float> ParameterStore::buffers() const {
  return {static_cast<const float*>(buffers_->data), static_cast<size_t>(plan_.buffer_elements)};
}
std::span<float> ParameterStore::buffer(const TensorSpec& buffer) {
  HEDDLE_CHECK(buffer.offset + buffer.elements <= plan_.buffer_elements);
  return buffers().subspan(static_cast<size_t>(buffer.offset),
                           static_cast<size_t>(buffer.elements));
}

void ParameterStore::ZeroGradients() { std::memset(gradients_->data, 0, gradients_->bytes); }

void ParameterStore::RefreshComputeWeights() {
  if (precision_ != Precision::kBf16) return;
  kernels::pointwise::Convert convert;
  convert.from = master_->data;
  convert.to = compute_->data;
  const kernels::pointwise::Table& kernels =
      kernels::pointwise::Kernels(kernels::pointwise::Element::kBFloat16);
  at::parallel_for(0, plan_.flat_elements, kParallelElements, [&](int64_t begin, int64_t end) {
    kernels.convert(convert, {begin, end});
  });
}

void* ParameterStore::compute_data() {
  return precision_ == Precision::kBf16 ? compute_->data : master_->data;
}
void* ParameterStore::gradient_data() { return gradients_->data; }
void* ParameterStore::master_data() { return master_->data; }

namespace {

// Elements [first, first + count) of the tensor.
template <typename T>
void Fill(uint64_t seed, const TensorSpec& tensor, int64_t first, int64_t count, T* values) {
  const Rng rng = Rng(seed, "model.init").Child(tensor.name);
  const int64_t columns = tensor.shape.empty() ? 1 : tensor.shape.back();
  const auto value = [&](int64_t i) {
    const uint64_t position = static_cast<uint64_t>(i);
    switch (tensor.init) {
      case InitKind::kOnes:
        return 1.0;
      case InitKind::kConstant:
        return tensor.init_value;
      case InitKind::kUniform:
        return tensor.init_value * (2.0 * rng.UniformAt(position) - 1.0);
      case InitKind::kDiagonal:
        return i / columns % columns == i % columns ? tensor.init_value : 0.0;
      case InitKind::kNormal:
      case InitKind::kResidualOut:
        break;
    }
    return tensor.init_stddev * rng.NormalAt(position);
  };
  at::parallel_for(0, count, kParallelElements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] = static_cast<T>(value(first + i));
  });
}

}  // namespace

void InitTensor(uint64_t seed, const TensorSpec& tensor, ParameterStore* store) {
  InitRange(seed, tensor, 0, store->master(tensor));
}

void InitRange(uint64_t seed, const TensorSpec& tensor, int64_t first, std::span<float> out) {
  HEDDLE_CHECK(first >= 0 && first + static_cast<int64_t>(out.size()) <= tensor.elements);
  Fill(seed, tensor, first, static_cast<int64_t>(out.size()), out.data());
}

void InitParameters(uint64_t seed, ParameterStore* store) {
  for (const TensorSpec& tensor : store->plan().tensors) {
    if (store->precision() == Precision::kFp64) {
      Fill(seed, tensor, 0, tensor.elements,
           static_cast<double*>(store->master_data()) + tensor.offset);
    } else {
      InitTensor(seed, tensor, store);
    }
  }
  std::fill(store->buffers().begin(), store->buffers().end(), 0.0f);
  store->RefreshComputeWeights();
}

}  // namespace heddle::model
