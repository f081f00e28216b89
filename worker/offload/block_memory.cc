#include "worker/offload/block_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>

#include "base/status/status.h"
#include "base/units/units.h"
#include "worker/offload/blocks.h"

namespace heddle::offload {
namespace {

constexpr int64_t kHugePageBytes = 2 * kMiB;

void Unmap(std::byte* data, int64_t bytes) {
  if (bytes > 0) HEDDLE_CHECK(munmap(data, static_cast<size_t>(bytes)) == 0);
}

std::byte* Map(int64_t bytes) {
  const bool huge = bytes >= kHugePageBytes;
  const int64_t range = huge ? bytes + kHugePageBytes : bytes;
  void* const base = mmap(nullptr, static_cast<size_t>(range), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* data = static_cast<std::byte*>(base);
  if (huge) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) % kHugePageBytes);
    const int64_t before = past == 0 ? 0 : kHugePageBytes - past;
    Unmap(data, before);
    data += before;
    Unmap(data + bytes, range - before - bytes);
  }
  // Small blocks must not share a huge page, which stays whole when one of them goes. Where the
  // kernel has no huge pages the call fails and nothing is lost.
  madvise(data, static_cast<size_t>(bytes), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return data;
}

}  // namespace

BlockMemory::~BlockMemory() {
  HEDDLE_CHECK(used_bytes_ == 0);
  Trim(budget_bytes_);
}

std::byte* BlockMemory::Take(int64_t bytes) {
  HEDDLE_CHECK(bytes > 0);
  HEDDLE_CHECK(bytes % kPageBytes == 0);
  if (!Fits(bytes)) return nullptr;
  std::byte* data = nullptr;
  if (const auto kept = free_.find(bytes); kept != free_.end()) {
    data = kept->second.back();
    kept->second.pop_back();
    if (kept->second.empty()) free_.erase(kept);
  } else {
    Trim(bytes);
    data = Map(bytes);
    if (data == nullptr) return nullptr;
    binding_.Bind({data, static_cast<size_t>(bytes)});
    mapped_bytes_ += bytes;
    peak_mapped_bytes_ = std::max(peak_mapped_bytes_, mapped_bytes_);
  }
  used_bytes_ += bytes;
  return data;
}

void BlockMemory::Give(std::byte* data, int64_t bytes) {
  used_bytes_ -= bytes;
  free_[bytes].push_back(data);
}

// Unmaps kept memory until `bytes` more may be mapped.
void BlockMemory::Trim(int64_t bytes) {
  while (mapped_bytes_ + bytes > budget_bytes_ && !free_.empty()) {
    const auto largest = std::prev(free_.end());
    Unmap(largest->second.back(), largest->first);
    mapped_bytes_ -= largest->first;
    largest->second.pop_back();
    if (largest->second.empty()) free_.erase(largest);
  }
}

}  // namespace heddle::offload
