// One flat tensor per unit, whose memory comes and goes while the tensor and all views of it stay
// (training-runtime.md 5.4). Memory is kept in a small pool: a schedule that visits one unit after
// the other needs two or three buffers, however many units there are.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/status/status.h"
#include "worker/shard/layout.h"

namespace heddle::shard {

// Flat tensors of these lengths without memory; reading or writing one is a null access.
std::vector<at::Tensor> Unplaced(const std::vector<int64_t>& elements, at::ScalarType type);
// The memory of a flat tensor, null for none: views share its storage, so they move with it.
void MoveTo(const at::Tensor& flat, std::byte* memory);

class UnitTensors {
 public:
  // Elements of `type`, world() slices long. No unit has memory yet.
  UnitTensors(const Layout& layout, at::ScalarType type);
  UnitTensors(const UnitTensors&) = delete;
  UnitTensors& operator=(const UnitTensors&) = delete;

  // To make views of. Reading or writing one whose unit has no memory is a null access.
  const std::vector<at::Tensor>& tensors() const { return tensors_; }

  bool Has(int unit) const { return units_[static_cast<size_t>(unit)].memory != nullptr; }
  // 128-byte aligned, the content is what it was in the pool. REQUIRES: !Has(unit).
  // RESOURCE_EXHAUSTED without memory.
  Status Acquire(int unit);
  void Release(int unit);
  // REQUIRES: Has(unit).
  std::byte* data(int unit) const { return units_[static_cast<size_t>(unit)].memory.get(); }
  size_t bytes(int unit) const { return units_[static_cast<size_t>(unit)].bytes; }

  // Of all memory ever held at a time, in use or in the pool: what the schedule costs.
  size_t peak_bytes() const { return total_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  using Memory = std::unique_ptr<std::byte, Free>;
  struct Unit {
    size_t bytes = 0;
    size_t capacity = 0;  // of `memory`
    Memory memory;
  };

  std::vector<Unit> units_;
  std::vector<at::Tensor> tensors_;
  std::multimap<size_t, Memory> spare_;  // by capacity
  size_t total_ = 0;
};

}  // namespace heddle::shard
