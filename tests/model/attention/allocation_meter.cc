#include "tests/model/attention/allocation_meter.h"

#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {
void* __libc_malloc(size_t size);                      // NOLINT: glibc's names
void* __libc_calloc(size_t count, size_t size);        // NOLINT
void* __libc_realloc(void* block, size_t size);        // NOLINT
void* __libc_memalign(size_t alignment, size_t size);  // NOLINT
void __libc_free(void* block);                         // NOLINT
}

namespace {

std::atomic<int64_t> held{0};
std::atomic<int64_t> highest{0};

void* Count(void* block) {
  if (block == nullptr) return nullptr;
  const int64_t now = held += static_cast<int64_t>(malloc_usable_size(block));
  int64_t before = highest.load();
  while (before < now && !highest.compare_exchange_weak(before, now)) {
  }
  return block;
}
void Discount(void* block) {
  if (block != nullptr) held -= static_cast<int64_t>(malloc_usable_size(block));
}

}  // namespace

extern "C" {

void* malloc(size_t size) { return Count(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return Count(__libc_calloc(count, size)); }
void* realloc(void* block, size_t size) {
  Discount(block);
  void* moved = __libc_realloc(block, size);
  if (moved == nullptr && size != 0) {
    Count(block);  // glibc keeps the old block
    return nullptr;
  }
  return Count(moved);
}
void* memalign(size_t alignment, size_t size) { return Count(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = memalign(alignment, size);
  return *block == nullptr ? ENOMEM : 0;
}
void free(void* block) {
  Discount(block);
  __libc_free(block);
}

}  // extern "C"

namespace heddle::model_test {

AllocationMeter::AllocationMeter() : start_(held) { highest = start_; }

int64_t AllocationMeter::peak() const { return highest - start_; }

}  // namespace heddle::model_test
