// Tensors that are reused from one micro-batch to the next: the k-th Take of a pass gets the k-th
// buffer, grown when a batch is larger than all before. Saves the page faults of fresh allocations,
// which cost more than the element-wise work on them. Values are those of the last use.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

namespace at {
class Tensor;
}
namespace c10 {
enum class ScalarType : int8_t;
}

namespace heddle::layers {

class BufferPool {
 public:
  BufferPool();
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  // Contiguous, uninitialised; valid until the position is released below it and taken again.
  at::Tensor Take(std::initializer_list<int64_t> shape, c10::ScalarType type);

  // Position to come back to: Release(Mark()) makes later buffers available again.
  size_t Mark() const { return next_; }
  void Release(size_t mark) { next_ = mark; }
  // Bytes held.
  int64_t bytes() const;

 private:
  struct Buffers;
  std::unique_ptr<Buffers> buffers_;
  size_t next_ = 0;
};

}  // namespace heddle::layers
