#include "data/pack/shard_reader.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string_view>

#include "data/pack/checksum.h"

namespace heddle::pack {
namespace {

// A set may have more shards than the soft limit of 1,024 files, which is kept low for programs
// that call select().
int OpenWithinHardLimit(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  rlimit files = {};
  if (fd >= 0 || errno != EMFILE || getrlimit(RLIMIT_NOFILE, &files) != 0) return fd;
  files.rlim_cur = files.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &files) != 0) return fd;
  return ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
}

}  // namespace

ShardReader::~ShardReader() {
  if (fd_ >= 0) ::close(fd_);
}

StatusOr<std::unique_ptr<ShardReader>> ShardReader::Open(const std::string& path, uint32_t index,
                                                         const Manifest& manifest,
                                                         const ShardEntry& entry) {
  auto shard = std::unique_ptr<ShardReader>(new ShardReader(path, index, entry));
  RETURN_IF_ERROR(shard->OpenFile());
  RETURN_IF_ERROR(shard->CheckSize());
  std::string header(kShardHeaderBytes, '\0');
  RETURN_IF_ERROR(shard->ReadBytes(0, header));
  StatusOr<ShardHeader> decoded = DecodeShardHeader(header, static_cast<uint64_t>(shard->bytes_));
  if (!decoded.ok()) return Annotate(decoded.status(), path);
  shard->header_ = *std::move(decoded);
  RETURN_IF_ERROR(shard->CheckHeader(manifest, entry));
  RETURN_IF_ERROR(shard->ReadBlockTable(entry));
  RETURN_IF_ERROR(shard->UseBytes(0, kShardHeaderBytes));
  RETURN_IF_ERROR(shard->ReadDocumentTable());
  return shard;
}

Status ShardReader::OpenFile() {
  fd_ = OpenWithinHardLimit(path_);
  if (fd_ < 0 && errno == ENOENT) return DataLoss(Str(path_, ": shard is missing"));
  if (fd_ < 0) return FromErrno("cannot open shard", path_, errno);
  return OkStatus();
}

Status ShardReader::CheckSize() const {
  struct stat info = {};
  if (::fstat(fd_, &info) != 0) return FromErrno("cannot read shard", path_, errno);
  if (info.st_size != bytes_) {
    return DataLoss(Str(path_, info.st_size < bytes_ ? ": truncated: " : ": too long: ",
                        static_cast<int64_t>(info.st_size), " bytes instead of ", bytes_));
  }
  return OkStatus();
}

Status ShardReader::CheckHeader(const Manifest& manifest, const ShardEntry& entry) const {
  if (header_.tokenizer_sha256 != manifest.tokenizer_sha256) {
    return DataLoss(Str(path_, ": block 0: made with another tokenizer than ", kManifestName,
                        " says (", header_.tokenizer_sha256.substr(0, 12), "… instead of ",
                        manifest.tokenizer_sha256.substr(0, 12), "…)"));
  }
  if (header_.shard_index != index_ || header_.tokens != static_cast<uint64_t>(entry.tokens) ||
      header_.documents != static_cast<uint64_t>(entry.documents) ||
      header_.vocab_size != manifest.vocab_size || header_.eos_id != manifest.eos_id ||
      header_.token_bytes != static_cast<uint32_t>(manifest.token_bytes)) {
    return DataLoss(Str(path_, ": block 0: not the shard that ", kManifestName, " describes"));
  }
  return OkStatus();
}

Status ShardReader::ReadBlockTable(const ShardEntry& entry) {
  const uint64_t blocks = ShardBlocks(header_);
  std::vector<uint32_t> table(blocks + 1);  // and its own CRC
  RETURN_IF_ERROR(ReadBytes(header_.crc_table_offset,
                            {reinterpret_cast<char*>(table.data()), 4 * table.size()}));
  const uint32_t actual = Crc32c(table.data(), 4 * blocks);
  if (table.back() != actual) {
    return DataLoss(Str(path_, ": block table: checksum does not match"));
  }
  if (actual != entry.table_crc32c) {
    return DataLoss(Str(path_, ": block table: not the shard that ", kManifestName, " describes"));
  }
  table.pop_back();
  block_crcs_ = std::move(table);
  checked_ = std::vector<std::atomic<uint8_t>>(blocks);
  return OkStatus();
}

// Out of the very bytes that were checked: a plan of documents must never see others.
Status ShardReader::ReadDocumentTable() {
  const bool is_long = header_.tokens > std::numeric_limits<uint32_t>::max();
  const auto entries = static_cast<size_t>(header_.documents) + 1;
  is_long ? long_offsets_.reserve(entries) : offsets_.reserve(entries);
  uint64_t previous = 0;
  std::vector<char> block;  // holds whole entries: both begin at multiples of 8
  for (uint64_t b = header_.document_table_offset / kBlockBytes; b < ShardBlocks(header_); ++b) {
    RETURN_IF_ERROR(ReadBlock(b, &block));
    checked_[b].store(1, std::memory_order_release);
    const uint64_t begin = std::max(b * kBlockBytes, header_.document_table_offset);
    for (size_t at = begin - b * kBlockBytes; at < block.size(); at += 8) {
      uint64_t offset;
      std::memcpy(&offset, block.data() + at, 8);
      const size_t d = is_long ? long_offsets_.size() : offsets_.size();
      if (d == 0 ? offset != 0 : offset <= previous || offset > header_.tokens) {
        return DataLoss(Str(path_, ": document table: entry ", d, " is out of order"));
      }
      is_long ? long_offsets_.push_back(offset) : offsets_.push_back(static_cast<uint32_t>(offset));
      previous = offset;
    }
  }
  if (previous != header_.tokens) {
    return DataLoss(Str(path_, ": document table: does not end with the tokens"));
  }
  return OkStatus();
}

Status ShardReader::Read(uint64_t first, std::span<uint32_t> out) const {
  if (out.empty()) return OkStatus();
  const uint64_t begin = kShardHeaderBytes + first * header_.token_bytes;
  const size_t bytes = out.size() * header_.token_bytes;
  RETURN_IF_ERROR(UseBytes(begin, begin + bytes));
  if (header_.token_bytes == 4)
    return ReadBytes(begin, {reinterpret_cast<char*>(out.data()), bytes});
  std::vector<uint16_t> narrow(out.size());
  RETURN_IF_ERROR(ReadBytes(begin, {reinterpret_cast<char*>(narrow.data()), bytes}));
  std::copy(narrow.begin(), narrow.end(), out.begin());
  return OkStatus();
}

Status ShardReader::Verify(const ShardEntry& entry) const {
  Xxh3Stream hash;
  std::vector<char> block;
  for (uint64_t b = 0; b < ShardBlocks(header_); ++b) {
    RETURN_IF_ERROR(ReadBlock(b, &block));
    hash.Update({block.data(), block.size()});
  }
  block.resize(header_.file_bytes - header_.crc_table_offset);
  RETURN_IF_ERROR(ReadBytes(header_.crc_table_offset, block));
  hash.Update({block.data(), block.size()});
  if (hash.Hex() != entry.xxh3_128) {
    return DataLoss(Str(path_, ": XXH3-128 differs from that in ", kManifestName));
  }
  return OkStatus();
}

Status ShardReader::ReadBytes(uint64_t begin, std::span<char> out) const {
  while (!out.empty()) {
    const ssize_t got = ::pread(fd_, out.data(), out.size(), static_cast<off_t>(begin));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FromErrno("cannot read shard", path_, errno);
    if (got == 0) return CutShort();
    begin += static_cast<uint64_t>(got);
    out = out.subspan(static_cast<size_t>(got));
  }
  return OkStatus();
}

Status ShardReader::CutShort() const {
  struct stat info = {};
  if (::fstat(fd_, &info) != 0) return FromErrno("cannot read shard", path_, errno);
  return DataLoss(Str(path_, ": shard ", index_, " was cut short while in use: ",
                      static_cast<int64_t>(info.st_size), " bytes instead of ", bytes_,
                      "; copy the data set anew or prepare it again"));
}

Status ShardReader::UseBytes(uint64_t begin, uint64_t end) const {
  std::vector<char> block;
  for (uint64_t b = begin / kBlockBytes; b <= (end - 1) / kBlockBytes; ++b) {
    if (checked_[b].load(std::memory_order_acquire) != 0) continue;
    RETURN_IF_ERROR(ReadBlock(b, &block));
    checked_[b].store(1, std::memory_order_release);
  }
  return OkStatus();
}

Status ShardReader::ReadBlock(uint64_t b, std::vector<char>* block) const {
  const uint64_t begin = b * kBlockBytes;
  const uint64_t end = std::min<uint64_t>(begin + kBlockBytes, header_.crc_table_offset);
  block->resize(end - begin);
  RETURN_IF_ERROR(ReadBytes(begin, *block));
  if (Crc32c(block->data(), block->size()) != block_crcs_[b]) {
    return DataLoss(
        Str(path_, ": block ", b, " (bytes ", begin, " to ", end, "): checksum does not match"));
  }
  const uint64_t tokens_end = kShardHeaderBytes + header_.tokens * header_.token_bytes;
  const uint64_t from = std::max<uint64_t>(begin, kShardHeaderBytes);
  const uint64_t to = std::min(end, tokens_end);
  for (uint64_t at = from; at < to; at += header_.token_bytes) {
    uint32_t token = 0;
    std::memcpy(&token, block->data() + (at - begin), header_.token_bytes);
    if (token >= header_.vocab_size) {
      return DataLoss(Str(path_, ": block ", b, ": byte ", at, ": token ", token,
                          " is not in the vocabulary of ", header_.vocab_size));
    }
  }
  return OkStatus();
}

}  // namespace heddle::pack
