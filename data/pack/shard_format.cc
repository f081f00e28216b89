#include "data/pack/shard_format.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "data/pack/checksum.h"

namespace heddle::pack {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are mapped as they are stored");

constexpr char kMagic[8] = {'H', 'D', 'L', 'T', 'O', 'K', '0', '1'};
constexpr uint64_t kTokensMax = uint64_t{1} << 40;
constexpr size_t kHeaderCrcOffset = kShardHeaderBytes - 4;

// Writes or reads the header's fields in order.
class FieldCursor {
 public:
  explicit FieldCursor(char* bytes) : bytes_(bytes) {}
  template <typename T>
  void Put(T value) {
    std::memcpy(bytes_ + at_, &value, sizeof(value));
    at_ += sizeof(value);
  }
  template <typename T>
  void Get(T* value) {
    std::memcpy(value, bytes_ + at_, sizeof(*value));
    at_ += sizeof(*value);
  }
  char* here() { return bytes_ + at_; }
  void Skip(size_t bytes) { at_ += bytes; }

 private:
  char* bytes_;
  size_t at_ = 0;
};

}  // namespace

void SetShardOffsets(ShardHeader* header) {
  const uint64_t token_end = kShardHeaderBytes + header->tokens * header->token_bytes;
  header->document_table_offset = (token_end + 7) / 8 * 8;
  header->crc_table_offset = header->document_table_offset + 8 * (header->documents + 1);
  header->file_bytes = header->crc_table_offset + 4 * ShardBlocks(*header) + 4;
}

std::string EncodeShardHeader(const ShardHeader& header) {
  std::string bytes(kShardHeaderBytes, '\0');
  FieldCursor cursor(bytes.data());
  std::memcpy(cursor.here(), kMagic, sizeof(kMagic));
  cursor.Skip(sizeof(kMagic));
  cursor.Put(header.version);
  cursor.Put(header.token_bytes);
  cursor.Put(header.shard_index);
  cursor.Put(header.vocab_size);
  cursor.Put(header.eos_id);
  cursor.Put(uint32_t{0});
  cursor.Put(header.tokens);
  cursor.Put(header.documents);
  cursor.Put(header.document_table_offset);
  cursor.Put(header.crc_table_offset);
  cursor.Put(header.file_bytes);
  HEDDLE_CHECK(header.tokenizer_sha256.size() == 64);
  std::memcpy(cursor.here(), header.tokenizer_sha256.data(), 64);
  const uint32_t crc = Crc32c(bytes.data(), kHeaderCrcOffset);
  std::memcpy(bytes.data() + kHeaderCrcOffset, &crc, sizeof(crc));
  return bytes;
}

StatusOr<ShardHeader> DecodeShardHeader(std::string_view view, uint64_t file_bytes) {
  if (view.size() < kShardHeaderBytes) {
    return DataLoss(Str("truncated: ", view.size(), " bytes, less than a header"));
  }
  std::string bytes(view.substr(0, kShardHeaderBytes));
  FieldCursor cursor(bytes.data());
  if (std::memcmp(cursor.here(), kMagic, sizeof(kMagic)) != 0) {
    return DataLoss("block 0: not a token shard (wrong magic)");
  }
  uint32_t crc;
  std::memcpy(&crc, bytes.data() + kHeaderCrcOffset, sizeof(crc));
  if (crc != Crc32c(bytes.data(), kHeaderCrcOffset)) {
    return DataLoss("block 0: header checksum does not match");
  }
  cursor.Skip(sizeof(kMagic));
  ShardHeader header;
  uint32_t reserved = 0;
  cursor.Get(&header.version);
  cursor.Get(&header.token_bytes);
  cursor.Get(&header.shard_index);
  cursor.Get(&header.vocab_size);
  cursor.Get(&header.eos_id);
  cursor.Get(&reserved);
  cursor.Get(&header.tokens);
  cursor.Get(&header.documents);
  ShardHeader stored = header;
  cursor.Get(&stored.document_table_offset);
  cursor.Get(&stored.crc_table_offset);
  cursor.Get(&stored.file_bytes);
  header.tokenizer_sha256.assign(cursor.here(), 64);
  if (header.version > kShardVersion) {
    return FailedPrecondition(Str("format version ", header.version, " is newer than ",
                                  kShardVersion, "; use a newer heddle"));
  }
  if ((header.token_bytes != 2 && header.token_bytes != 4) || header.tokens > kTokensMax ||
      header.documents > header.tokens) {
    return DataLoss("block 0: impossible counts in the header");
  }
  SetShardOffsets(&header);
  if (header.document_table_offset != stored.document_table_offset ||
      header.crc_table_offset != stored.crc_table_offset ||
      header.file_bytes != stored.file_bytes) {
    return DataLoss("block 0: the header's offsets do not follow from its counts");
  }
  if (header.file_bytes != file_bytes) {
    return DataLoss(Str(file_bytes < header.file_bytes ? "truncated: " : "too long: ", file_bytes,
                        " bytes instead of ", header.file_bytes));
  }
  return header;
}

std::string EncodeShard(ShardHeader header, const std::vector<uint32_t>& tokens,
                        const std::vector<uint64_t>& document_offsets) {
  header.tokens = tokens.size();
  header.documents = document_offsets.size() - 1;
  SetShardOffsets(&header);
  std::string bytes = EncodeShardHeader(header);
  bytes.resize(header.file_bytes);
  char* out = bytes.data() + kShardHeaderBytes;
  if (header.token_bytes == 4) {
    std::memcpy(out, tokens.data(), tokens.size() * 4);
  } else {
    for (const uint32_t token : tokens) {
      const auto narrow = static_cast<uint16_t>(token);
      std::memcpy(out, &narrow, 2);
      out += 2;
    }
  }
  std::memcpy(bytes.data() + header.document_table_offset, document_offsets.data(),
              document_offsets.size() * 8);
  char* table = bytes.data() + header.crc_table_offset;
  const uint64_t blocks = ShardBlocks(header);
  for (uint64_t b = 0; b < blocks; ++b) {
    const uint64_t begin = b * kBlockBytes;
    const uint64_t size = std::min<uint64_t>(kBlockBytes, header.crc_table_offset - begin);
    const uint32_t crc = Crc32c(bytes.data() + begin, size);
    std::memcpy(table + 4 * b, &crc, 4);
  }
  const uint32_t table_crc = Crc32c(table, 4 * blocks);
  std::memcpy(table + 4 * blocks, &table_crc, 4);
  return bytes;
}

}  // namespace heddle::pack
