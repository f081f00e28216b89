// What the resident set keeps: for every expert of every layer (a slot) its weights, its gradient
// and its optimizer state, each a block of fixed size. Bytes only; what they mean is the model's.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::offload {

// What is kept of a slot: the bf16 or fp32 copy that is computed with, the fp32 sum of gradients,
// and the fp32 master weights with their moments (training-runtime section 12).
enum class Kind : uint8_t { kWeights, kGradient, kState };
inline constexpr size_t kKinds = 3;
std::string_view KindName(Kind kind);

struct Block {
  uint32_t slot = 0;
  Kind kind = Kind::kWeights;
};
// "state of slot 3".
std::string ToText(const Block& block);

// kRead: the bytes stay as they are. kUpdate: they are read and changed. kOverwrite: all of them
// are written before any is read.
enum class Access : uint8_t { kRead, kUpdate, kOverwrite };

struct ExpectedUse {
  Block block;
  Access access = Access::kRead;
};

// Bytes of a slot by kind; 0: the slot has no block of that kind.
using SlotBytes = std::array<int64_t, kKinds>;

// Memory and files are handed out in these units: what O_DIRECT asks of any disk of today.
inline constexpr int64_t kPageBytes = 4096;
// The memory that a block of `bytes` takes.
constexpr int64_t BlockMemoryBytes(int64_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// The blocks of a set, numbered. Immutable, thread-safe.
class BlockTable {
 public:
  // INVALID_ARGUMENT for a negative size, or if there is no block at all.
  static StatusOr<BlockTable> Make(std::span<const SlotBytes> slots);

  // The number of blocks including those of 0 bytes; numbers are below it.
  size_t size() const { return bytes_.size(); }
  // INVALID_ARGUMENT for a slot that does not exist or has no block of that kind.
  StatusOr<uint32_t> Find(Block block) const;
  Block At(uint32_t number) const {
    return {static_cast<uint32_t>(number / kKinds), static_cast<Kind>(number % kKinds)};
  }
  int64_t Bytes(uint32_t number) const { return bytes_[number]; }
  int64_t MemoryBytes(uint32_t number) const { return BlockMemoryBytes(bytes_[number]); }

 private:
  std::vector<int64_t> bytes_;
};

}  // namespace heddle::offload
