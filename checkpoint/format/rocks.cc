#include "checkpoint/format/rocks.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "rocksdb/file_system.h"
#include "rocksdb/table.h"

namespace heddle::checkpoint {

Status FromRocks(const rocksdb::Status& status, const std::string& path) {
  if (status.ok()) {
    return OkStatus();
  }
  const std::string text = Str(path, ": ", status.ToString());
  if (status.IsNoSpace() || status.subcode() == rocksdb::Status::kNoSpace ||
      status.subcode() == rocksdb::Status::kMemoryLimit) {
    return ResourceExhausted(text);
  }
  if (status.IsPathNotFound() || status.IsNotFound()) {
    return NotFound(text);
  }
  if (status.IsInvalidArgument() || status.IsNotSupported()) {
    return InvalidArgument(text);
  }
  return DataLoss(text);  // Corruption, IOError: the bytes cannot be trusted
}

Digester::Digester() : state_(XXH3_createState()) {
  HEDDLE_CHECK(state_ != nullptr, "no memory for a digest");
  XXH3_128bits_reset(static_cast<XXH3_state_t*>(state_));
}

Digester::~Digester() { XXH3_freeState(static_cast<XXH3_state_t*>(state_)); }

void Digester::Update(const char* data, size_t size) {
  XXH3_128bits_update(static_cast<XXH3_state_t*>(state_), data, size);
}

std::string Digester::Finish() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical,
                           XXH3_128bits_digest(static_cast<const XXH3_state_t*>(state_)));
  return std::string(reinterpret_cast<const char*>(canonical.digest), sizeof(canonical.digest));
}

namespace {

constexpr char kDigestName[] = "heddle.XXH3-128";

class DigestGenerator : public rocksdb::FileChecksumGenerator {
 public:
  void Update(const char* data, size_t size) override { digester_.Update(data, size); }
  void Finalize() override { digest_ = digester_.Finish(); }
  std::string GetChecksum() const override { return digest_; }
  const char* Name() const override { return kDigestName; }

 private:
  Digester digester_;
  std::string digest_;
};

class DigestGeneratorFactory : public rocksdb::FileChecksumGenFactory {
 public:
  std::unique_ptr<rocksdb::FileChecksumGenerator> CreateFileChecksumGenerator(
      const rocksdb::FileChecksumGenContext& context) override {
    if (!context.requested_checksum_func_name.empty() &&
        context.requested_checksum_func_name != kDigestName) {
      return nullptr;
    }
    return std::make_unique<DigestGenerator>();
  }
  const char* Name() const override { return "heddle.XXH3-128.factory"; }
};

}  // namespace

std::shared_ptr<rocksdb::FileChecksumGenFactory> DigestFactory() {
  return std::make_shared<DigestGeneratorFactory>();
}

namespace {

constexpr size_t kPageBytes = 4096;

class TurnTakingFile : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  TurnTakingFile(std::unique_ptr<rocksdb::FSWritableFile> file, std::mutex* disk)
      : FSWritableFileOwnerWrapper(std::move(file)), disk_(*disk) {}

  rocksdb::IOStatus PositionedAppend(const rocksdb::Slice& data, uint64_t offset,
                                     const rocksdb::IOOptions& options,
                                     rocksdb::IODebugContext* debug) override {
    const std::lock_guard turn(disk_);
    return FSWritableFileOwnerWrapper::PositionedAppend(data, offset, options, debug);
  }
  using FSWritableFileOwnerWrapper::PositionedAppend;
  // A sector would do, but then every page of the buffer lies across two of memory.
  size_t GetRequiredBufferAlignment() const override {
    return std::max(kPageBytes, FSWritableFileOwnerWrapper::GetRequiredBufferAlignment());
  }

 private:
  std::mutex& disk_;
};

class TurnTakingFileSystem : public rocksdb::FileSystemWrapper {
 public:
  explicit TurnTakingFileSystem(std::mutex* disk)
      : FileSystemWrapper(rocksdb::FileSystem::Default()), disk_(disk) {}
  const char* Name() const override { return "heddle.TurnTakingFileSystem"; }

  rocksdb::IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* file,
                                    rocksdb::IODebugContext* debug) override {
    std::unique_ptr<rocksdb::FSWritableFile> opened;
    rocksdb::IOStatus status = FileSystemWrapper::NewWritableFile(path, options, &opened, debug);
    if (status.ok()) {
      *file = std::make_unique<TurnTakingFile>(std::move(opened), disk_);
    }
    return status;
  }

 private:
  std::mutex* const disk_;
};

}  // namespace

std::unique_ptr<rocksdb::Env> TurnTakingEnv(std::mutex* disk) {
  return rocksdb::NewCompositeEnv(std::make_shared<TurnTakingFileSystem>(disk));
}

rocksdb::Options SstOptions() {
  rocksdb::BlockBasedTableOptions table;
  table.format_version = 5;
  table.checksum = rocksdb::kXXH3;
  table.block_size = 64 << 10;
  table.no_block_cache = true;
  table.cache_index_and_filter_blocks = false;
  rocksdb::Options options;
  options.compression = rocksdb::kNoCompression;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.file_checksum_gen_factory = DigestFactory();
  options.writable_file_max_buffer_size = 2 << 20;
  options.paranoid_checks = true;
  return options;
}

}  // namespace heddle::checkpoint
