// Tensors that are reused, from one layer and one micro-batch to the next: a Take gets a buffer of
// about its size that is not in use. Saves the page faults of fresh allocations, which cost more
// than the element-wise work on them. Values are those of the last use.
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

  // Contiguous, uninitialised; valid until the position is released below it and another take gets
  // its buffer.
  at::Tensor Take(std::initializer_list<int64_t> shape, c10::ScalarType type);

  // Position to come back to: Release(Mark()) makes later buffers available again.
  size_t Mark() const;
  void Release(size_t mark);
  // Bytes held.
  int64_t bytes() const;

 private:
  struct Buffers;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace heddle::layers
