// The memory of resident blocks, under a bound that counts every byte the process really has: each
// block is a mapping of its own, so that memory of one size goes back to the system before memory
// of another size is taken, and nothing fragments.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "base/numa/numa.h"

namespace heddle::offload {

// Not thread-safe.
class BlockMemory {
 public:
  // Of these memory nodes (base/numa), or without any as the system likes.
  explicit BlockMemory(int64_t budget_bytes, std::vector<int> nodes = {})
      : budget_bytes_(budget_bytes), binding_(std::move(nodes)) {}
  ~BlockMemory();
  BlockMemory(const BlockMemory&) = delete;
  BlockMemory& operator=(const BlockMemory&) = delete;

  // `bytes` of memory from a page's begin (2 MiB for blocks of that size, with huge pages where the
  // system has them), with any contents; nullptr if they do not fit, or, with Fits(bytes), if the
  // system refuses (errno). REQUIRES: bytes > 0, whole pages.
  std::byte* Take(int64_t bytes);
  // REQUIRES: from Take(bytes).
  void Give(std::byte* data, int64_t bytes);

  bool Fits(int64_t bytes) const { return used_bytes_ + bytes <= budget_bytes_; }
  int64_t used_bytes() const { return used_bytes_; }
  // Used, and kept for the next Take; never above the budget.
  int64_t mapped_bytes() const { return mapped_bytes_; }
  int64_t peak_mapped_bytes() const { return peak_mapped_bytes_; }

 private:
  void Trim(int64_t bytes);

  const int64_t budget_bytes_;
  numa::Binding binding_;
  int64_t used_bytes_ = 0;
  int64_t mapped_bytes_ = 0;
  int64_t peak_mapped_bytes_ = 0;
  std::map<int64_t, std::vector<std::byte*>> free_;  // by size
};

}  // namespace heddle::offload
