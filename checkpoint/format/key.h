// Keys of a checkpoint's SST files (training-runtime.md 14.2): 13 bytes, big-endian, so that byte
// order is (tensor, class, chunk, first) order. STORED: never changes within a format version.
//
//   tensor u32 | class u8 | chunk u32 | first element within the chunk u32
//
// A chunk is at most 1 MiB of elements and is cut at the same places whatever the world size, so a
// reader finds a range of a tensor without knowing who wrote it. The all-zero key holds the header.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status/status.h"
#include "checkpoint/catalog/tensors.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

inline constexpr uint32_t kFormatVersion = 1;
inline constexpr size_t kKeyBytes = 13;

struct EntryKey {
  uint32_t tensor = 0;  // counts from 1; 0 with everything else 0 is the header
  heddle::v1::TensorClass tensor_class = heddle::v1::TENSOR_CLASS_MASTER;
  uint32_t chunk = 0;
  uint32_t first = 0;  // within the chunk

  bool operator==(const EntryKey&) const = default;
  auto operator<=>(const EntryKey&) const = default;
};

std::string EncodeKey(const EntryKey& key);
// DATA_LOSS unless `bytes` is a key: 13 bytes, a known class.
StatusOr<EntryKey> DecodeKey(std::string_view bytes);
// 13 zero bytes.
std::string HeaderKey();

}  // namespace heddle::checkpoint
