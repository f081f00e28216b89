// The layout of `shard-NNNNN.tok` (formats.md F25). This is a stored format; all integers little
// endian:
//   0      header, 4096 bytes
//   4096   tokens, u16 or u32; then zeros up to a multiple of 8
//   D      u64 document offsets in tokens, documents + 1 of them, the first 0, the last = tokens
//   C      u32 CRC-32C of each 1 MiB block of [0, C), the last block shorter
//   end    u32 CRC-32C of that table
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::pack {

inline constexpr size_t kShardHeaderBytes = 4096;
inline constexpr size_t kBlockBytes = 1 << 20;
inline constexpr uint32_t kShardVersion = 1;

struct ShardHeader {
  uint32_t version = kShardVersion;
  uint32_t token_bytes = 2;
  uint32_t shard_index = 0;
  uint32_t vocab_size = 0;
  uint32_t eos_id = 0;
  uint64_t tokens = 0;
  uint64_t documents = 0;
  uint64_t document_table_offset = 0;  // D
  uint64_t crc_table_offset = 0;       // C
  uint64_t file_bytes = 0;
  std::string tokenizer_sha256;  // hex, 64 digits
};

// Where everything lies, from counts alone.
void SetShardOffsets(ShardHeader* header);

// Blocks of [0, C).
inline uint64_t ShardBlocks(const ShardHeader& header) {
  return (header.crc_table_offset + kBlockBytes - 1) / kBlockBytes;
}

std::string EncodeShardHeader(const ShardHeader& header);

// Checks magic, version, the header's own CRC and that all offsets follow from the counts and from
// `file_bytes`, the real size. DATA_LOSS without a file name (the caller adds it);
// FAILED_PRECONDITION for a newer version.
StatusOr<ShardHeader> DecodeShardHeader(std::string_view bytes, uint64_t file_bytes);

// The whole file. `document_offsets` as stored: documents + 1 of them.
std::string EncodeShard(ShardHeader header, const std::vector<uint32_t>& tokens,
                        const std::vector<uint64_t>& document_offsets);

}  // namespace heddle::pack
