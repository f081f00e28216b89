#include "checkpoint/format/shard_writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "checkpoint/format/rocks.h"
#include "rocksdb/sst_file_writer.h"

namespace heddle::checkpoint {

namespace {

std::string Joined(const std::string& folder, const std::string& name) {
  return Str(folder, "/", name);
}

// Folders of `dir` below `root`, outermost first: a, a/b, a/b/c.
StatusOr<std::vector<std::string>> Levels(const std::string& dir) {
  std::vector<std::string> levels;
  std::vector<std::string> names;  // of all files made so far
  size_t begin = 0;
  while (begin <= dir.size()) {
    size_t end = dir.find('/', begin);
    if (end == std::string::npos) {
      end = dir.size();
    }
    const std::string part = dir.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") {
      return InvalidArgument(Str("checkpoint folder \"", dir, "\" is no plain relative path"));
    }
    levels.push_back(dir.substr(0, end));
    begin = end + 1;
  }
  return levels;
}

// Whether the file system takes writes that pass by the page cache. A page is the question; opening
// the file for writing drops it again.
bool TakesDirectWrites(const std::string& path) {
  constexpr size_t kPageBytes = 4096;
  const int fd = open(path.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC);
  if (fd < 0) {
    return false;
  }
  const std::unique_ptr<void, decltype(&std::free)> page(std::aligned_alloc(kPageBytes, kPageBytes),
                                                         &std::free);
  std::memset(page.get(), 0, kPageBytes);
  const bool taken = pwrite(fd, page.get(), kPageBytes, 0) == static_cast<ssize_t>(kPageBytes);
  return close(fd) == 0 && taken;
}

// Claims the name for this writer: SstFileWriter itself would truncate what is there.
Status CreateExclusively(const std::string& path) {
  const int fd = open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0640);
  if (fd < 0) {
    if (errno == EEXIST) {
      return AlreadyExists(Str(path, ": this rank has written this step before"));
    }
    return FromErrno("create", path);
  }
  if (close(fd) != 0) {
    return FromErrno("close", path);
  }
  return OkStatus();
}

}  // namespace

Status SyncFolder(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) {
    return FromErrno("open folder", path);
  }
  if (fsync(fd) != 0) {
    Status failed = FromErrno("fsync folder", path);
    close(fd);
    return failed;
  }
  if (close(fd) != 0) {
    return FromErrno("close folder", path);
  }
  return OkStatus();
}

struct SstShardWriter::Impl {
  explicit Impl(ShardWriterOptions o) : options(std::move(o)), sst_options(SstOptions()) {
    if (options.disk != nullptr) {
      env = TurnTakingEnv(options.disk);
      sst_options.env = env.get();
    }
  }

  ShardWriterOptions options;
  std::unique_ptr<rocksdb::Env> env;  // outlives what writes through it
  rocksdb::Options sst_options;
  std::vector<std::string> levels;
  std::vector<std::string> names;  // of all files made so far
  std::unique_ptr<rocksdb::SstFileWriter> sst;
  heddle::v1::ShardFile file;  // the open one
  std::vector<heddle::v1::ShardFile> done;
  EntryKey last_key;
  bool any_key = false;
  uint64_t file_bytes = 0;  // values and keys of the open file, the header not counted
  uint64_t since_permit = 0;
  uint64_t written = 0;
  Status dead;

  std::string folder() const { return Joined(options.root, options.dir); }
  Status Permit() {
    since_permit = 0;
    return options.permit ? options.permit() : OkStatus();
  }

  Status MakeFolders() {
    ASSIGN_OR_RETURN(levels, Levels(options.dir));
    for (const std::string& level : levels) {
      const std::string path = Joined(options.root, level);
      if (mkdir(path.c_str(), 0750) != 0 && errno != EEXIST) {
        return FromErrno("make folder", path);
      }
    }
    return OkStatus();
  }

  Status OpenFile() {
    RETURN_IF_ERROR(Permit());
    file.Clear();
    file.set_name(
        Str("rank-", options.header.rank(), "-", options.first_file + done.size(), ".sst"));
    const std::string path = Joined(folder(), file.name());
    RETURN_IF_ERROR(CreateExclusively(path));
    names.push_back(file.name());
    rocksdb::EnvOptions writing;
    // The page cache would be one copy more, and hold what nobody reads soon.
    writing.use_direct_writes = TakesDirectWrites(path);
    writing.writable_file_max_buffer_size = sst_options.writable_file_max_buffer_size;
    sst = std::make_unique<rocksdb::SstFileWriter>(writing, sst_options);
    RETURN_IF_ERROR(FromRocks(sst->Open(path), path));
    std::string header;
    HEDDLE_CHECK(options.header.SerializeToString(&header));
    RETURN_IF_ERROR(FromRocks(sst->Put(HeaderKey(), header), path));
    file_bytes = 0;
    return OkStatus();
  }

  Status CloseFile() {
    const std::string path = Joined(folder(), file.name());
    rocksdb::ExternalSstFileInfo info;
    // A full disk may show here for the first time; the data is synced, the folder is not.
    RETURN_IF_ERROR(FromRocks(sst->Finish(&info), path));
    sst.reset();
    if (info.file_checksum.size() != 16) {
      return Internal(Str(path, ": RocksDB gave no XXH3-128 digest"));
    }
    file.set_bytes(info.file_size);
    file.set_digest(info.file_checksum);
    file.set_entries(info.num_entries);
    done.push_back(file);
    return OkStatus();
  }

  void NoteRange(const EntryKey& key, uint64_t first, uint64_t count) {
    if (file.ranges_size() > 0) {
      heddle::v1::ElementRange* last = file.mutable_ranges(file.ranges_size() - 1);
      if (last->tensor() == key.tensor && last->tensor_class() == key.tensor_class &&
          last->first() + last->count() == first) {
        last->set_count(last->count() + count);
        return;
      }
    }
    heddle::v1::ElementRange* range = file.add_ranges();
    range->set_tensor(key.tensor);
    range->set_tensor_class(key.tensor_class);
    range->set_first(first);
    range->set_count(count);
  }

  Status Put(const EntryKey& key, heddle::v1::ElementType type, std::string_view value) {
    if (file_bytes >= options.roll_bytes) {
      RETURN_IF_ERROR(CloseFile());
      RETURN_IF_ERROR(OpenFile());
    } else if (since_permit >= options.permit_every_bytes) {
      RETURN_IF_ERROR(Permit());
    }
    const std::string encoded = EncodeKey(key);
    RETURN_IF_ERROR(FromRocks(sst->Put(encoded, rocksdb::Slice(value.data(), value.size())),
                              Joined(folder(), file.name())));
    if (!file.has_first_key()) {
      file.set_first_key(encoded);
    }
    file.set_last_key(encoded);
    NoteRange(key, key.chunk * ChunkElements(type) + key.first, value.size() / ElementBytes(type));
    file_bytes += kKeyBytes + value.size();
    since_permit += kKeyBytes + value.size();
    written += value.size();
    return OkStatus();
  }

  Status FinishAll() {
    RETURN_IF_ERROR(CloseFile());
    // Names reach the disk before the seal: innermost folder first, then every parent, the root
    // included, because this writer may have made any of them.
    for (auto level = levels.rbegin(); level != levels.rend(); ++level) {
      RETURN_IF_ERROR(SyncFolder(Joined(options.root, *level)));
    }
    RETURN_IF_ERROR(SyncFolder(options.root));
    return Permit();
  }
};

SstShardWriter::SstShardWriter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SstShardWriter::~SstShardWriter() = default;

StatusOr<std::unique_ptr<SstShardWriter>> SstShardWriter::Create(ShardWriterOptions options) {
  options.header.set_format_version(kFormatVersion);
  auto impl = std::make_unique<Impl>(std::move(options));
  RETURN_IF_ERROR(impl->MakeFolders());
  RETURN_IF_ERROR(impl->OpenFile());
  return std::unique_ptr<SstShardWriter>(new SstShardWriter(std::move(impl)));
}

Status SstShardWriter::Add(const EntryKey& key, heddle::v1::ElementType type,
                           std::string_view value) {
  RETURN_IF_ERROR(impl_->dead);
  const uint64_t element = ElementBytes(type);
  const uint64_t count = value.size() / element;
  if (key.tensor == 0 || (impl_->any_key && !(impl_->last_key < key))) {
    return InvalidArgument(Str("keys must rise: tensor ", key.tensor, ", chunk ", key.chunk,
                               ", first ", key.first, " follows tensor ", impl_->last_key.tensor));
  }
  if (count == 0 || value.size() % element != 0 || key.first + count > ChunkElements(type)) {
    return InvalidArgument(Str("tensor ", key.tensor, ", chunk ", key.chunk, ": ", value.size(),
                               " bytes from element ", key.first, " do not fit a chunk"));
  }
  impl_->dead = impl_->Put(key, type, value);
  impl_->last_key = key;
  impl_->any_key = true;
  return impl_->dead;
}

StatusOr<std::vector<heddle::v1::ShardFile>> SstShardWriter::Finish() {
  RETURN_IF_ERROR(impl_->dead);
  impl_->dead = impl_->FinishAll();
  RETURN_IF_ERROR(impl_->dead);
  impl_->dead = FailedPrecondition("the shard writer is finished");
  return std::move(impl_->done);
}

void SstShardWriter::Discard() {
  impl_->dead = FailedPrecondition("the shard writer's files were discarded");
  impl_->sst.reset();
  for (const std::string& name : impl_->names) {
    unlink(Joined(impl_->folder(), name).c_str());
  }
}

uint64_t SstShardWriter::bytes_written() const { return impl_->written; }

}  // namespace heddle::checkpoint
