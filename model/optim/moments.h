// The moments of what one rank updates, in the type of the configuration: zero-initialised arrays
// beside the masters. Torch-free. One thread.
#pragma once

#include <cstdint>
#include <vector>

#include "model/optim/optimizer.h"

namespace heddle::optim {

class MomentArrays {
 public:
  // Throws std::bad_alloc.
  void Allocate(const Hyperparameters& hyper, int64_t elements);
  void Zero();

  Moments type() const { return type_; }
  bool has_second() const { return second_; }
  // Elements `offset` on, for the optimizer: sets the spans of `shard` that hold moments to its
  // size.
  void Attach(int64_t offset, Shard* shard);
  // Element `offset` of the first or, if there is one, the second moment, of type().
  void* At(bool second, int64_t offset);

 private:
  Moments type_ = Moments::kFp32;
  bool second_ = false;
  std::vector<float> fp32_[2];
  std::vector<uint16_t> bf16_[2];
};

}  // namespace heddle::optim
