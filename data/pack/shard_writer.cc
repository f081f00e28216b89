#include "data/pack/shard_writer.h"

#include <cstdio>
#include <cstring>
#include <utility>

#include "data/pack/checksum.h"
#include "data/pack/files.h"

namespace heddle::pack {
namespace {

std::string ShardName(size_t index) {
  char name[32];
  std::snprintf(name, sizeof(name), "shard-%05zu.tok", index);
  return name;
}

bool IsIntact(const std::string& dir, const ShardEntry& entry) {
  const StatusOr<std::string> bytes = ReadFile(Str(dir, "/", entry.file));
  return bytes.ok() && Xxh3Hex(*bytes) == entry.xxh3_128;
}

}  // namespace

bool IsShardName(const std::string& name) {
  const bool framed = name.starts_with("shard-") && name.ends_with(".tok");
  const std::string digits = framed ? name.substr(6, name.size() - 10) : "";
  return digits.size() >= 5 && digits.find_first_not_of("0123456789") == std::string::npos;
}

ShardWriter::ShardWriter(std::string dir, const ShardHeader& header, int64_t shard_tokens_max,
                         const std::vector<FinishedShard>& finished)
    : dir_(std::move(dir)), header_(header), shard_tokens_max_(shard_tokens_max) {
  for (const FinishedShard& shard : finished) {
    if (shard.entry.file != ShardName(finished_.size()) || !IsIntact(dir_, shard.entry)) break;
    finished_.push_back(shard);
  }
}

int64_t ShardWriter::next_source_document() const {
  return finished_.empty() ? 0 : finished_.back().next_source_document;
}

StatusOr<bool> ShardWriter::Add(int64_t source_document, std::span<const uint32_t> tokens,
                                int64_t text_bytes) {
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  offsets_.push_back(tokens_.size());
  text_bytes_ += text_bytes;
  if (static_cast<int64_t>(tokens_.size()) < shard_tokens_max_) return false;
  RETURN_IF_ERROR(WriteShard(source_document + 1));
  return true;
}

Status ShardWriter::Finish(int64_t source_documents) {
  if (tokens_.empty()) return OkStatus();
  return WriteShard(source_documents);
}

Status ShardWriter::WriteShard(int64_t next_source_document) {
  FinishedShard shard;
  header_.shard_index = static_cast<uint32_t>(finished_.size());
  const std::string bytes = EncodeShard(header_, tokens_, offsets_);
  shard.entry.file = ShardName(finished_.size());
  shard.entry.tokens = static_cast<int64_t>(tokens_.size());
  shard.entry.documents = static_cast<int64_t>(offsets_.size()) - 1;
  shard.entry.bytes = static_cast<int64_t>(bytes.size());
  shard.entry.xxh3_128 = Xxh3Hex(bytes);
  std::memcpy(&shard.entry.table_crc32c, bytes.data() + bytes.size() - 4, 4);
  shard.text_bytes = text_bytes_;
  shard.next_source_document = next_source_document;
  RETURN_IF_ERROR(WriteFileAtomically(Str(dir_, "/", shard.entry.file), bytes));
  finished_.push_back(std::move(shard));
  tokens_.clear();
  offsets_.assign(1, 0);
  text_bytes_ = 0;
  return OkStatus();
}

void ShardWriter::Describe(Manifest* manifest) const {
  for (const FinishedShard& shard : finished_) {
    manifest->shards.push_back(shard.entry);
    manifest->documents += shard.entry.documents;
    manifest->tokens += shard.entry.tokens;
    manifest->text_bytes += shard.text_bytes;
  }
}

}  // namespace heddle::pack
