// Bytes that the process holds from malloc and its relatives: std::vector, operator new, the
// kernels' scratch and LibTorch's CPU tensors alike. The executable's own malloc family counts and
// passes on to glibc, so that a peak is exact, unlike the pages of VmHWM.
#pragma once

#include <cstdint>

namespace heddle::model_test {

// Highest number of bytes held since construction, above what was held then. One at a time.
class AllocationMeter {
 public:
  AllocationMeter();
  int64_t peak() const;

 private:
  int64_t start_;
};

}  // namespace heddle::model_test
