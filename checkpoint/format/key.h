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
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

inline constexpr uint32_t kFormatVersion = 1;
inline constexpr size_t kKeyBytes = 13;
inline constexpr uint64_t kChunkBytes = uint64_t{1} << 20;

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

// 4 for f32, 2 for bf16, 8 for f64 and i64.
uint64_t ElementBytes(heddle::v1::ElementType type);
// Elements of a whole chunk: 2^18 f32, 2^19 bf16, 2^17 f64 and i64.
uint64_t ChunkElements(heddle::v1::ElementType type);
// Stored type of a tensor's class: moment_type for the moments, else master_type.
heddle::v1::ElementType TypeOf(const heddle::v1::TensorInfo& tensor,
                               heddle::v1::TensorClass tensor_class);
// Product of the shape; 1 for a scalar. 0 when a dimension is 0 or negative or the product
// overflows.
uint64_t Elements(const heddle::v1::TensorInfo& tensor);
// "master", "moment1", ...
std::string_view ToText(heddle::v1::TensorClass tensor_class);

}  // namespace heddle::checkpoint
