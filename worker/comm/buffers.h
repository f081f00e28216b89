// Buffers of collectives, for this folder.
#pragma once

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

namespace heddle::comm {

// Kept from one collective to the next: fresh pages would cost as much as the transfer.
class Buffers {
 public:
  std::vector<std::byte> Take(size_t bytes) {
    std::vector<std::byte> buffer;
    if (!spare_.empty()) {
      buffer = std::move(spare_.back());
      spare_.pop_back();
    }
    if (buffer.size() < bytes) {
      buffer.resize(bytes);
    }
    return buffer;
  }
  void Give(std::vector<std::byte> buffer) { spare_.push_back(std::move(buffer)); }
  // Of a collective that failed: the back end may still write to it, for as long as the process
  // lives, which is not long any more.
  static void Bury(std::vector<std::byte> buffer) {
    static std::mutex mutex;
    static auto* const buried = new std::vector<std::vector<std::byte>>;
    const std::lock_guard<std::mutex> lock(mutex);
    buried->push_back(std::move(buffer));
  }

 private:
  std::vector<std::vector<std::byte>> spare_;
};

}  // namespace heddle::comm
