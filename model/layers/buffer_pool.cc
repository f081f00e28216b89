#include "model/layers/buffer_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <iterator>
#include <map>
#include <vector>

namespace heddle::layers {

struct BufferPool::Buffers {
  std::vector<at::Tensor> all;
  std::vector<size_t> taken;                // in the order of the takes
  std::multimap<int64_t, size_t> released;  // by size

  // A buffer for `size` bytes: of those that are not in use the smallest that is large enough, and
  // not much larger: that one is for another. Else one that is not much smaller grows, as when a
  // batch is longer than all before; else there is a new one.
  size_t Find(int64_t size) {
    auto found = released.lower_bound(size);
    const bool fits = found != released.end() && found->first <= 2 * size;
    if (!fits && found != released.begin() && std::prev(found)->first >= size / 2) {
      found = std::prev(found);
    } else if (!fits) {
      all.emplace_back();
      return all.size() - 1;
    }
    const size_t index = found->second;
    released.erase(found);
    return index;
  }
};

BufferPool::BufferPool() : buffers_(std::make_unique<Buffers>()) {}
BufferPool::~BufferPool() = default;

at::Tensor BufferPool::Take(std::initializer_list<int64_t> shape, c10::ScalarType type) {
  int64_t size = static_cast<int64_t>(c10::elementSize(type));
  for (const int64_t extent : shape) size *= extent;
  const size_t index = buffers_->Find(size);
  buffers_->taken.push_back(index);
  at::Tensor& buffer = buffers_->all[index];
  if (!buffer.defined() || buffer.numel() < size) {
    buffer = at::Tensor();  // free first: the old one is of no use
    buffer = at::empty({size}, at::kByte);
  }
  return at::from_blob(buffer.data_ptr(), at::IntArrayRef(shape), at::TensorOptions().dtype(type));
}

size_t BufferPool::Mark() const { return buffers_->taken.size(); }

void BufferPool::Release(size_t mark) {
  std::vector<size_t>& taken = buffers_->taken;
  for (; taken.size() > mark; taken.pop_back()) {
    buffers_->released.emplace(buffers_->all[taken.back()].numel(), taken.back());
  }
}

int64_t BufferPool::bytes() const {
  int64_t sum = 0;
  for (const at::Tensor& buffer : buffers_->all) {
    if (buffer.defined()) sum += buffer.numel();
  }
  return sum;
}

}  // namespace heddle::layers
