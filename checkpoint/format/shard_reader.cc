#include "checkpoint/format/shard_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "checkpoint/format/rocks.h"
#include "rocksdb/sst_file_reader.h"

namespace heddle::checkpoint {

namespace {

struct FileDescriptor {
  int fd = -1;
  ~FileDescriptor() {
    if (fd >= 0) {
      close(fd);
    }
  }
};

rocksdb::ReadOptions CheckedReads() {
  rocksdb::ReadOptions options;
  options.verify_checksums = true;
  options.fill_cache = false;
  options.readahead_size = 4 << 20;
  return options;
}

StatusOr<uint64_t> SizeOf(const std::string& path) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0) {
    return FromErrno("open", path);
  }
  if (!S_ISREG(info.st_mode)) {
    return DataLoss(Str(path, ": is no plain file"));
  }
  return static_cast<uint64_t>(info.st_size);
}

}  // namespace

StatusOr<std::string> FileDigest(const std::string& path, uint64_t* bytes) {
  const FileDescriptor file{.fd = open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) {
    return FromErrno("open", path);
  }
  posix_fadvise(file.fd, 0, 0, POSIX_FADV_SEQUENTIAL);
  std::vector<char> buffer(size_t{4} << 20);
  Digester digester;
  uint64_t total = 0;
  while (true) {
    const ssize_t got = read(file.fd, buffer.data(), buffer.size());
    if (got < 0) {
      if (errno == EINTR) {
        continue;
      }
      return FromErrno("read", path);
    }
    if (got == 0) {
      break;
    }
    digester.Update(buffer.data(), static_cast<size_t>(got));
    total += static_cast<uint64_t>(got);
  }
  if (bytes != nullptr) {
    *bytes = total;
  }
  return digester.Finish();
}

struct ShardReader::Impl {
  explicit Impl(std::string p) : path(std::move(p)), reader(SstOptions()) {}
  std::string path;
  rocksdb::SstFileReader reader;
  heddle::v1::ShardHeader header;

  Status ReadHeader() {
    const std::unique_ptr<rocksdb::Iterator> it(reader.NewIterator(CheckedReads()));
    it->SeekToFirst();
    RETURN_IF_ERROR(FromRocks(it->status(), path));
    if (!it->Valid() || it->key() != rocksdb::Slice(HeaderKey())) {
      return DataLoss(Str(path, ": has no header entry"));
    }
    if (!header.ParseFromArray(it->value().data(), static_cast<int>(it->value().size()))) {
      return DataLoss(Str(path, ": the header entry does not parse"));
    }
    if (header.format_version() != kFormatVersion) {
      return DataLoss(Str(path, ": format version ", header.format_version(), ", this build reads ",
                          kFormatVersion));
    }
    return OkStatus();
  }

  Status Walk(const std::string& from, const std::string& to, const Visitor& visit) {
    const std::unique_ptr<rocksdb::Iterator> it(reader.NewIterator(CheckedReads()));
    std::string last = "the start";
    for (it->Seek(from); it->Valid() && it->key().compare(to) < 0; it->Next()) {
      if (it->key() == rocksdb::Slice(HeaderKey())) {
        continue;
      }
      const StatusOr<EntryKey> key = DecodeKey({it->key().data(), it->key().size()});
      if (!key.ok()) {
        return Annotate(key.status(), path);
      }
      RETURN_IF_ERROR(visit(*key, {it->value().data(), it->value().size()}));
      last = Str("tensor ", key->tensor, " chunk ", key->chunk);
    }
    // A damaged block only ends the loop.
    const Status status = FromRocks(it->status(), path);
    return status.ok() ? status : Annotate(status, Str("after ", last));
  }
};

ShardReader::ShardReader(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ShardReader::~ShardReader() = default;

const heddle::v1::ShardHeader& ShardReader::header() const { return impl_->header; }

StatusOr<std::unique_ptr<ShardReader>> ShardReader::Open(const std::string& path,
                                                         const heddle::v1::ShardFile& expected,
                                                         DigestCheck digest) {
  ASSIGN_OR_RETURN(const uint64_t size, SizeOf(path));
  if (size != expected.bytes()) {
    return DataLoss(Str(path, ": ", size, " bytes, the record says ", expected.bytes()));
  }
  if (digest == DigestCheck::kWholeFile) {
    ASSIGN_OR_RETURN(const std::string found, FileDigest(path));
    if (found != expected.digest()) {
      return DataLoss(Str(path, ": the digest of the file is not the one of the record"));
    }
  }
  auto impl = std::make_unique<Impl>(path);
  RETURN_IF_ERROR(FromRocks(impl->reader.Open(path), path));
  RETURN_IF_ERROR(impl->ReadHeader());
  return std::unique_ptr<ShardReader>(new ShardReader(std::move(impl)));
}

Status ShardReader::Scan(const EntryKey& from, const EntryKey& to, const Visitor& visit) {
  return impl_->Walk(EncodeKey(from), EncodeKey(to), visit);
}

Status ShardReader::ScanAll(const Visitor& visit) {
  return impl_->Walk(HeaderKey(), std::string(kKeyBytes + 1, '\xff'), visit);
}

Status ShardReader::VerifyBlocks() {
  return FromRocks(impl_->reader.VerifyChecksum(CheckedReads()), impl_->path);
}

}  // namespace heddle::checkpoint
