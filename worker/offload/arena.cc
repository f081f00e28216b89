#include "worker/offload/arena.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "base/numa/numa.h"
#include "base/units/units.h"

namespace heddle::offload {

StatusOr<std::unique_ptr<Arena>> Arena::Create(const BlockTable& table,
                                               const std::vector<int>& nodes) {
  std::vector<int64_t> offsets;
  int64_t bytes = 0;
  for (uint32_t block = 0; block < table.size(); ++block) {
    offsets.push_back(bytes);
    bytes += table.MemoryBytes(block);
  }
  void* const base = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return Annotate(FromErrno("mmap"), Str("expert arena of ", ApproximateBytes(bytes),
                                           " in host memory: set memory.expert_offloading.spill_dir"
                                           " to keep experts on a disk"));
  }
  numa::Binding(nodes).Bind({static_cast<std::byte*>(base), static_cast<size_t>(bytes)});
  // A kernel without huge pages says EINVAL: small ones work too.
  madvise(base, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return std::unique_ptr<Arena>(
      new Arena(static_cast<std::byte*>(base), table, std::move(offsets), bytes));
}

Arena::~Arena() { munmap(base_, static_cast<size_t>(bytes_)); }

void Arena::Begin(const Transfer& transfer) {
  std::byte* const home = base_ + offsets_[transfer.block];
  const auto bytes = static_cast<size_t>(table_.Bytes(transfer.block));
  if (transfer.write) {
    std::memcpy(home, transfer.data, bytes);
  } else {
    std::memcpy(transfer.data, home, bytes);
  }
  ends_.push_back({transfer, OkStatus()});
}

void Arena::Wait(std::vector<TransferEnd>& ends) {
  if (ends_.empty()) {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return woken_; });
    woken_ = false;
  }
  for (TransferEnd& end : ends_) ends.push_back(std::move(end));
  ends_.clear();
}

void Arena::Wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  wake_.notify_one();
}

std::string Arena::Describe() const { return Str("host arena of ", ApproximateBytes(bytes_)); }

}  // namespace heddle::offload
