// What the tests of the resident set share: homes by name, contents of blocks by a number.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/disk_dir.h"
#include "worker/offload/arena.h"
#include "worker/offload/resident_set.h"
#include "worker/offload/spill_file.h"

namespace heddle::offload {

using test::DiskDir;

// `bytes` that depend on the block and on a version.
inline std::vector<std::byte> Contents(uint32_t block, uint64_t version, int64_t bytes) {
  RngCursor random(Rng(version, "test.contents").Child(block));
  std::vector<std::byte> contents(static_cast<size_t>(bytes));
  for (size_t at = 0; at < contents.size(); at += sizeof(uint64_t)) {
    const uint64_t word = random.Next();
    std::memcpy(&contents[at], &word, std::min(sizeof(word), contents.size() - at));
  }
  return contents;
}

inline bool Equal(const std::byte* data, const std::vector<std::byte>& contents) {
  return std::memcmp(data, contents.data(), contents.size()) == 0;
}

// `count` slots with `bytes` of weights and nothing else.
inline BlockTable WeightSlots(size_t count, int64_t bytes) {
  const std::vector<SlotBytes> slots(count, SlotBytes{bytes, 0, 0});
  return *BlockTable::Make(slots);
}

// "io_uring", "threads" or "arena".
inline StatusOr<std::unique_ptr<Home>> MakeHomeNamed(std::string_view name, const std::string& dir,
                                                     const BlockTable& table) {
  if (name == "arena") return MakeHome("", table, DiskMethod::kAuto);
  return MakeHome(dir, table, name == "threads" ? DiskMethod::kThreads : DiskMethod::kUring);
}

// Whether io_uring can be had here; tests of it skip where not.
inline Status UringHere() { return ::heddle::status_internal::ToStatus(MakeUringDisk()); }

// Pins weights of `slot` to overwrite, fills them with Contents(slot, version) and unpins.
inline Status Fill(ResidentSet& set, uint32_t slot, uint64_t version, int64_t bytes) {
  ASSIGN_OR_RETURN(std::byte* const data, set.Pin(slot, Kind::kWeights, Access::kOverwrite));
  std::ranges::copy(Contents(slot, version, bytes), data);
  return set.Unpin(slot, Kind::kWeights);
}

// OK if the weights of `slot` are Contents(slot, version); DATA_LOSS "wrong bytes" if not.
inline Status Check(ResidentSet& set, uint32_t slot, uint64_t version, int64_t bytes) {
  ASSIGN_OR_RETURN(std::byte* const data, set.Pin(slot, Kind::kWeights, Access::kRead));
  const bool equal = Equal(data, Contents(slot, version, bytes));
  RETURN_IF_ERROR(set.Unpin(slot, Kind::kWeights));
  return equal ? OkStatus() : DataLoss(Str("wrong bytes in slot ", slot));
}

}  // namespace heddle::offload
