#include "model/layers/buffer_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <vector>

namespace heddle::layers {

struct BufferPool::Buffers {
  std::vector<at::Tensor> bytes;
};

BufferPool::BufferPool() : buffers_(std::make_unique<Buffers>()) {}
BufferPool::~BufferPool() = default;

at::Tensor BufferPool::Take(std::initializer_list<int64_t> shape, c10::ScalarType type) {
  int64_t size = static_cast<int64_t>(c10::elementSize(type));
  for (const int64_t extent : shape) size *= extent;
  std::vector<at::Tensor>& buffers = buffers_->bytes;
  if (next_ == buffers.size()) buffers.emplace_back();
  at::Tensor& buffer = buffers[next_++];
  if (!buffer.defined() || buffer.numel() < size) {
    buffer = at::Tensor();  // free first: the old one is of no use
    buffer = at::empty({size}, at::kByte);
  }
  return at::from_blob(buffer.data_ptr(), at::IntArrayRef(shape), at::TensorOptions().dtype(type));
}

int64_t BufferPool::bytes() const {
  int64_t sum = 0;
  for (const at::Tensor& buffer : buffers_->bytes) {
    if (buffer.defined()) sum += buffer.numel();
  }
  return sum;
}

}  // namespace heddle::layers
