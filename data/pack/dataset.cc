#include "data/pack/dataset.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "data/pack/checksum.h"
#include "data/pack/files.h"
#include "data/pack/shard_format.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle::pack {
namespace {

// A read-only mapping of a whole file.
class Mapping {
 public:
  Mapping() = default;
  ~Mapping() {
    if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  Status Map(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) return DataLoss(Str(path, ": shard is missing"));
    if (fd < 0) return FromErrno("cannot open shard", path, errno);
    struct stat info;
    Status status = OkStatus();
    if (::fstat(fd, &info) != 0) {
      status = FromErrno("cannot read shard", path, errno);
    } else if (info.st_size < static_cast<off_t>(kShardHeaderBytes)) {
      status = DataLoss(Str(path, ": truncated: ", static_cast<int64_t>(info.st_size),
                            " bytes, less than a header"));
    } else {
      size_ = static_cast<size_t>(info.st_size);
      void* data = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
      if (data == MAP_FAILED) {
        status = FromErrno("cannot map shard", path, errno);
      } else {
        data_ = static_cast<const char*>(data);
      }
    }
    ::close(fd);
    return status;
  }
  const char* data() const { return data_; }
  std::string_view view() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

// One mapped shard; blocks are checked once, by whichever thread comes first.
class Shard {
 public:
  static StatusOr<std::unique_ptr<Shard>> Open(const std::string& path, uint32_t index,
                                               const Manifest& manifest, const ShardEntry& entry) {
    auto shard = std::unique_ptr<Shard>(new Shard(path));
    RETURN_IF_ERROR(shard->mapping_.Map(path));
    const std::string_view bytes = shard->mapping_.view();
    StatusOr<ShardHeader> header = DecodeShardHeader(bytes, bytes.size());
    if (!header.ok()) return Annotate(header.status(), path);
    shard->header_ = *std::move(header);
    RETURN_IF_ERROR(shard->CheckHeader(index, manifest, entry));
    RETURN_IF_ERROR(shard->CheckTables(entry));
    return shard;
  }

  int64_t documents() const { return static_cast<int64_t>(header_.documents); }
  uint64_t DocumentOffset(int64_t d) const {
    uint64_t offset;
    std::memcpy(&offset, mapping_.data() + header_.document_table_offset + 8 * d, 8);
    return offset;
  }

  Status Read(uint64_t first, std::span<uint32_t> out) const {
    if (out.empty()) return OkStatus();
    const uint64_t begin = kShardHeaderBytes + first * header_.token_bytes;
    const uint64_t end = begin + out.size() * header_.token_bytes;
    RETURN_IF_ERROR(UseBytes(begin, end));
    const char* source = mapping_.data() + begin;
    if (header_.token_bytes == 4) {
      std::memcpy(out.data(), source, out.size() * 4);
    } else {
      for (size_t i = 0; i < out.size(); ++i) {
        uint16_t token;
        std::memcpy(&token, source + 2 * i, 2);
        out[i] = token;
      }
    }
    return OkStatus();
  }

  // Every byte, whatever was checked before.
  Status Verify(const ShardEntry& entry) const {
    for (uint64_t b = 0; b < ShardBlocks(header_); ++b) RETURN_IF_ERROR(CheckBlock(b));
    if (Xxh3Hex(mapping_.view()) != entry.xxh3_128) {
      return DataLoss(Str(path_, ": XXH3-128 differs from that in ", kManifestName));
    }
    return OkStatus();
  }

 private:
  explicit Shard(const std::string& path) : path_(path) {}

  Status CheckHeader(uint32_t index, const Manifest& manifest, const ShardEntry& entry) const {
    if (header_.tokenizer_sha256 != manifest.tokenizer_sha256) {
      return DataLoss(Str(path_, ": block 0: made with another tokenizer than ", kManifestName,
                          " says (", header_.tokenizer_sha256.substr(0, 12), "… instead of ",
                          manifest.tokenizer_sha256.substr(0, 12), "…)"));
    }
    if (header_.shard_index != index || header_.tokens != static_cast<uint64_t>(entry.tokens) ||
        header_.documents != static_cast<uint64_t>(entry.documents) ||
        header_.file_bytes != static_cast<uint64_t>(entry.bytes) ||
        header_.vocab_size != manifest.vocab_size || header_.eos_id != manifest.eos_id ||
        header_.token_bytes != static_cast<uint32_t>(manifest.token_bytes)) {
      return DataLoss(Str(path_, ": block 0: not the shard that ", kManifestName, " describes"));
    }
    return OkStatus();
  }

  Status CheckTables(const ShardEntry& entry) {
    const uint64_t blocks = ShardBlocks(header_);
    block_crcs_.resize(blocks);
    const char* table = mapping_.data() + header_.crc_table_offset;
    std::memcpy(block_crcs_.data(), table, 4 * blocks);
    uint32_t stored;
    std::memcpy(&stored, table + 4 * blocks, 4);
    const uint32_t actual = Crc32c(block_crcs_.data(), 4 * blocks);
    if (stored != actual) return DataLoss(Str(path_, ": block table: checksum does not match"));
    if (actual != entry.table_crc32c) {
      return DataLoss(
          Str(path_, ": block table: not the shard that ", kManifestName, " describes"));
    }
    checked_ = std::vector<std::atomic<uint8_t>>(blocks);
    RETURN_IF_ERROR(UseBytes(0, kShardHeaderBytes));
    RETURN_IF_ERROR(UseBytes(header_.document_table_offset, header_.crc_table_offset));
    uint64_t previous = 0;
    for (int64_t d = 0; d <= documents(); ++d) {
      const uint64_t offset = DocumentOffset(d);
      if (d == 0 ? offset != 0 : offset <= previous) {
        return DataLoss(Str(path_, ": document table: entry ", d, " is out of order"));
      }
      previous = offset;
    }
    if (previous != header_.tokens) {
      return DataLoss(Str(path_, ": document table: does not end with the tokens"));
    }
    return OkStatus();
  }

  // Makes sure that the blocks of [begin, end) were checked.
  Status UseBytes(uint64_t begin, uint64_t end) const {
    if (begin == end) return OkStatus();
    for (uint64_t b = begin / kBlockBytes; b <= (end - 1) / kBlockBytes; ++b) {
      if (checked_[b].load(std::memory_order_acquire) != 0) continue;
      RETURN_IF_ERROR(CheckBlock(b));
      checked_[b].store(1, std::memory_order_release);
    }
    return OkStatus();
  }

  Status CheckBlock(uint64_t b) const {
    const uint64_t begin = b * kBlockBytes;
    const uint64_t end = std::min<uint64_t>(begin + kBlockBytes, header_.crc_table_offset);
    if (Crc32c(mapping_.data() + begin, end - begin) != block_crcs_[b]) {
      return DataLoss(
          Str(path_, ": block ", b, " (bytes ", begin, " to ", end, "): checksum does not match"));
    }
    const uint64_t tokens_end = kShardHeaderBytes + header_.tokens * header_.token_bytes;
    const uint64_t from = std::max<uint64_t>(begin, kShardHeaderBytes);
    const uint64_t to = std::min(end, tokens_end);
    for (uint64_t at = from; at < to; at += header_.token_bytes) {
      uint32_t token = 0;
      std::memcpy(&token, mapping_.data() + at, header_.token_bytes);
      if (token >= header_.vocab_size) {
        return DataLoss(Str(path_, ": block ", b, ": byte ", at, ": token ", token,
                            " is not in the vocabulary of ", header_.vocab_size));
      }
    }
    return OkStatus();
  }

  std::string path_;
  Mapping mapping_;
  ShardHeader header_;
  std::vector<uint32_t> block_crcs_;
  mutable std::vector<std::atomic<uint8_t>> checked_;
};

}  // namespace

struct Dataset::Impl {
  std::string dir;
  Manifest manifest;
  std::vector<std::unique_ptr<Shard>> shards;
  std::vector<int64_t> first_document;  // of each shard

  // The shard that holds document `d`; `local` is its number there.
  const Shard& ShardOf(int64_t d, int64_t* local) const {
    const auto next = std::upper_bound(first_document.begin(), first_document.end(), d);
    const auto index = static_cast<size_t>(next - first_document.begin()) - 1;
    *local = d - first_document[index];
    return *shards[index];
  }
};

Dataset::Dataset(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Dataset::~Dataset() = default;

StatusOr<std::unique_ptr<Dataset>> Dataset::Open(const std::string& dir,
                                                 const OpenOptions& options) {
  const std::string path = Str(dir, "/", kManifestName);
  const StatusOr<std::string> bytes = ReadFile(path);
  if (!bytes.ok() && bytes.status().code() == StatusCode::kNotFound) {
    return NotFound(
        Str(dir, ": no data set here (no ", kManifestName, "); make one with heddle data prepare"));
  }
  if (!bytes.ok()) return bytes.status();
  auto impl = std::make_unique<Impl>();
  impl->dir = dir;
  ASSIGN_OR_RETURN(impl->manifest, ParseManifest(*bytes, path));
  const Manifest& manifest = impl->manifest;
  if (!options.tokenizer_sha256.empty() && options.tokenizer_sha256 != manifest.tokenizer_sha256) {
    return FailedPrecondition(Str(path, ": made with another tokenizer: its SHA-256 is ",
                                  manifest.tokenizer_sha256, ", wanted ",
                                  options.tokenizer_sha256));
  }
  if (!options.manifest_hash.empty() && options.manifest_hash != manifest.hash) {
    return FailedPrecondition(Str(path, ": another data set than before: its manifest hash is ",
                                  manifest.hash, ", wanted ", options.manifest_hash));
  }
  int64_t first = 0;
  for (size_t i = 0; i < manifest.shards.size(); ++i) {
    const ShardEntry& entry = manifest.shards[i];
    ASSIGN_OR_RETURN(
        std::unique_ptr<Shard> shard,
        Shard::Open(Str(dir, "/", entry.file), static_cast<uint32_t>(i), manifest, entry));
    impl->first_document.push_back(first);
    first += shard->documents();
    impl->shards.push_back(std::move(shard));
  }
  return std::unique_ptr<Dataset>(new Dataset(std::move(impl)));
}

const Manifest& Dataset::manifest() const { return impl_->manifest; }
const std::string& Dataset::dir() const { return impl_->dir; }

int64_t Dataset::DocumentLength(int64_t d) const {
  HEDDLE_CHECK(d >= 0 && d < documents());
  int64_t local = 0;
  const Shard& shard = impl_->ShardOf(d, &local);
  return static_cast<int64_t>(shard.DocumentOffset(local + 1) - shard.DocumentOffset(local));
}

Status Dataset::ReadTokens(int64_t d, int64_t begin, std::span<uint32_t> out) const {
  HEDDLE_CHECK(d >= 0 && d < documents());
  int64_t local = 0;
  const Shard& shard = impl_->ShardOf(d, &local);
  const uint64_t first = shard.DocumentOffset(local);
  const uint64_t length = shard.DocumentOffset(local + 1) - first;
  HEDDLE_CHECK(begin >= 0 && static_cast<uint64_t>(begin) + out.size() <= length);
  return shard.Read(first + static_cast<uint64_t>(begin), out);
}

Status Dataset::CheckTokenizer() const {
  ASSIGN_OR_RETURN(const std::string sha, TokenizerSha256(dir()));
  if (!sha.empty() && sha != manifest().tokenizer_sha256) {
    return FailedPrecondition(
        Str(dir(), "/tokenizer.json: not the tokenizer the data were made with: its SHA-256 is ",
            sha, ", ", kManifestName, " says ", manifest().tokenizer_sha256));
  }
  return OkStatus();
}

StatusOr<std::string> TokenizerSha256(const std::string& folder) {
  const StatusOr<std::string> bytes = ReadFile(Str(folder, "/tokenizer.json"));
  if (bytes.status().code() == StatusCode::kNotFound) {
    return std::string();
  }
  RETURN_IF_ERROR(bytes.status());
  return tokenizer::Sha256Hex(*bytes);
}

Status Dataset::Verify() const {
  for (size_t i = 0; i < impl_->shards.size(); ++i) {
    RETURN_IF_ERROR(impl_->shards[i]->Verify(impl_->manifest.shards[i]));
  }
  return OkStatus();
}

}  // namespace heddle::pack
