#include "checkpoint/tensor_io/save.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <tuple>
#include <utility>

#include "checkpoint/catalog/tensors.h"
#include "checkpoint/format/key.h"

namespace heddle::checkpoint {

namespace {

using heddle::v1::ElementType;
using heddle::v1::TensorInfo;

// Copies and counts in one pass; an exponent of all ones is NaN or infinite.
template <typename Bits>
uint64_t CopyCounting(const void* from, void* to, uint64_t count, Bits exponent) {
  const Bits* source = static_cast<const Bits*>(from);
  Bits* target = static_cast<Bits*>(to);
  uint64_t non_finite = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const Bits value = source[i];
    non_finite += (value & exponent) == exponent ? 1 : 0;
    target[i] = value;
  }
  return non_finite;
}

uint64_t CopyElements(ElementType type, const void* from, void* to, uint64_t count) {
  switch (type) {
    case heddle::v1::ELEMENT_TYPE_F32:
      return CopyCounting<uint32_t>(from, to, count, 0x7F800000u);
    case heddle::v1::ELEMENT_TYPE_BF16:
      return CopyCounting<uint16_t>(from, to, count, 0x7F80u);
    case heddle::v1::ELEMENT_TYPE_F64:
      return CopyCounting<uint64_t>(from, to, count, 0x7FF0000000000000u);
    case heddle::v1::ELEMENT_TYPE_I64:
      std::memcpy(to, from, count * sizeof(int64_t));
      return 0;
  }
  return 0;
}

bool Before(const LocalRange& a, const LocalRange& b) {
  return std::tie(a.tensor, a.tensor_class, a.first) < std::tie(b.tensor, b.tensor_class, b.first);
}

// The stored tensor of a range, or what is wrong with the range.
StatusOr<const TensorInfo*> InfoOf(const std::vector<TensorInfo>& tensors,
                                   const LocalRange& range) {
  if (range.tensor == 0 || range.tensor > tensors.size()) {
    return InvalidArgument(Str("no tensor has the id ", range.tensor));
  }
  const TensorInfo& info = tensors[range.tensor - 1];
  const bool known = std::find(info.classes().begin(), info.classes().end(), range.tensor_class) !=
                     info.classes().end();
  const uint64_t elements = Elements(info);
  if (!known || range.first > elements || range.count > elements - range.first) {
    return InvalidArgument(Str(info.name(), " (", ToText(range.tensor_class), "): [", range.first,
                               ", +", range.count, ") of ", elements, " elements"));
  }
  return &info;
}

// What of a range lies in one chunk: a range that starts or ends inside a chunk becomes sub-chunks.
struct Cut {
  uint32_t chunk = 0;
  uint32_t first = 0;  // element of the chunk
  uint64_t begin = 0;  // byte of the range
  uint64_t bytes = 0;
};
std::vector<Cut> CutsOf(const LocalRange& range, ElementType type) {
  const uint64_t chunk_elements = ChunkElements(type);
  const uint64_t element = ElementBytes(type);
  const uint64_t end = range.first + range.count;
  std::vector<Cut> cuts;
  for (uint64_t at = range.first; at < end;) {
    const uint64_t chunk = at / chunk_elements;
    const uint64_t stop = std::min(end, (chunk + 1) * chunk_elements);
    cuts.push_back({static_cast<uint32_t>(chunk),
                    static_cast<uint32_t>(at - chunk * chunk_elements),
                    (at - range.first) * element, (stop - at) * element});
    at = stop;
  }
  return cuts;
}

// One file of a save: its entries by number, and what became of it.
struct FileWrite {
  size_t first = 0;
  size_t count = 0;
  std::unique_ptr<SstShardWriter> writer;
  Status status;
  std::vector<heddle::v1::ShardFile> done;
};

// A new file from `roll_bytes` on; one even for no entries.
std::vector<FileWrite> FilesOf(size_t entries, const std::function<uint64_t(size_t)>& bytes_of,
                               uint64_t roll_bytes) {
  std::vector<FileWrite> files(1);
  uint64_t bytes = 0;
  for (size_t i = 0; i < entries; ++i) {
    if (bytes >= roll_bytes) {
      files.emplace_back().first = i;
      bytes = 0;
    }
    ++files.back().count;
    bytes += kKeyBytes + bytes_of(i);
  }
  return files;
}

// All files in order, or the first error, and then none of them stays.
StatusOr<std::vector<heddle::v1::ShardFile>> Collect(std::vector<FileWrite>* files) {
  std::vector<heddle::v1::ShardFile> all;
  Status error = OkStatus();
  for (const FileWrite& file : *files) {
    if (error.ok()) error = file.status;
    all.insert(all.end(), file.done.begin(), file.done.end());
  }
  if (error.ok()) return all;
  for (const FileWrite& file : *files) {
    if (file.writer != nullptr) file.writer->Discard();
  }
  return error;
}

}  // namespace

StatusOr<std::vector<TensorInfo>> NumberTensors(std::vector<TensorInfo> tensors) {
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name() < b.name(); });
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (i > 0 && tensors[i - 1].name() == tensors[i].name()) {
      return InvalidArgument(Str(tensors[i].name(), ": is listed twice"));
    }
    tensors[i].set_id(static_cast<uint32_t>(i) + 1);
  }
  return tensors;
}

std::vector<LocalRange> ReplicaShare(const std::vector<TensorInfo>& tensors,
                                     const std::vector<LocalRange>& whole, uint32_t rank,
                                     uint32_t world) {
  std::vector<LocalRange> sorted = whole;
  std::sort(sorted.begin(), sorted.end(), Before);
  std::vector<LocalRange> share;
  uint64_t chunk = 0;
  for (const LocalRange& range : sorted) {
    const ElementType type = TypeOf(tensors[range.tensor - 1], range.tensor_class);
    const uint64_t step = ChunkElements(type);
    for (uint64_t first = 0; first < range.count; first += step, ++chunk) {
      if (chunk % world != rank) {
        continue;
      }
      LocalRange part = range;
      part.first = first;
      part.count = std::min(step, range.count - first);
      part.data = static_cast<const char*>(range.data) + first * ElementBytes(type);
      share.push_back(part);
    }
  }
  return share;
}

void Snapshot::Clear() {
  parts_.clear();
  used_ = 0;
  file_.Clear();
  bytes_ = 0;
  non_finite_ = 0;
  first_non_finite_.clear();
}

Status Snapshot::Stage(const std::vector<TensorInfo>& tensors,
                       const std::vector<LocalRange>& ranges) {
  Clear();
  return Copy(tensors, ranges);
}

StatusOr<std::vector<Snapshot::Part>> Snapshot::PartsOf(const std::vector<TensorInfo>& tensors,
                                                        const std::vector<LocalRange>& ranges) {
  std::vector<Part> parts;
  for (const LocalRange& range : ranges) {
    ASSIGN_OR_RETURN(const TensorInfo* info, InfoOf(tensors, range));
    const ElementType type = TypeOf(*info, range.tensor_class);
    parts.push_back({.range = range, .type = type});
    bytes_ += range.count * ElementBytes(type);
  }
  return parts;
}

void Snapshot::CopyPart(const std::vector<TensorInfo>& tensors, const Part& part, char* target) {
  const uint64_t bad = CopyElements(part.type, part.range.data, target, part.range.count);
  if (bad > 0 && non_finite_ == 0) {
    first_non_finite_ =
        Str(tensors[part.range.tensor - 1].name(), " (", ToText(part.range.tensor_class), ")");
  }
  non_finite_ += bad;
}

StatusOr<char*> Snapshot::BufferOf(uint64_t bytes) {
  if (used_ == buffers_.size()) buffers_.emplace_back();
  Buffer& buffer = buffers_[used_];
  if (buffer.bytes == nullptr || buffer.capacity < bytes) {
    buffer = {};  // the old one's room first
    try {
      buffer.bytes = std::make_unique_for_overwrite<char[]>(bytes);
    } catch (const std::bad_alloc&) {
      return ResourceExhausted(Str("no memory for a snapshot of ", bytes, " bytes"));
    }
    buffer.capacity = bytes;
  }
  ++used_;
  return buffer.bytes.get();
}

Status Snapshot::Copy(const std::vector<TensorInfo>& tensors,
                      const std::vector<LocalRange>& ranges) {
  ASSIGN_OR_RETURN(std::vector<Part> parts, PartsOf(tensors, ranges));
  uint64_t bytes = 0;
  for (const Part& part : parts) {
    bytes += part.range.count * ElementBytes(part.type) + sizeof(uint64_t);
  }
  ASSIGN_OR_RETURN(char* const buffer, BufferOf(bytes));
  uint64_t at = 0;
  for (Part& part : parts) {
    at = (at + sizeof(uint64_t) - 1) / sizeof(uint64_t) * sizeof(uint64_t);
    CopyPart(tensors, part, buffer + at);
    part.range.data = buffer + at;
    at += part.range.count * ElementBytes(part.type);
  }
  parts_.insert(parts_.end(), parts.begin(), parts.end());
  return OkStatus();
}

Status Snapshot::CopyToDisk(const std::vector<TensorInfo>& tensors,
                            const std::vector<LocalRange>& ranges, const std::string& dir) {
  ASSIGN_OR_RETURN(std::vector<Part> parts, PartsOf(tensors, ranges));
  RETURN_IF_ERROR(file_.Open(dir));
  std::vector<char> copy;
  for (Part& part : parts) {
    copy.resize(part.range.count * ElementBytes(part.type));
    CopyPart(tensors, part, copy.data());
    for (const Cut& cut : CutsOf(part.range, part.type)) {
      ASSIGN_OR_RETURN(const SnapshotFile::Extent extent,
                       file_.Append({copy.data() + cut.begin, cut.bytes}));
      part.extents.push_back(extent);
    }
    part.range.data = nullptr;
  }
  parts_.insert(parts_.end(), parts.begin(), parts.end());
  return OkStatus();
}

std::vector<Snapshot::Entry> Snapshot::Entries() const {
  std::vector<Part> sorted = parts_;
  std::sort(sorted.begin(), sorted.end(),
            [](const Part& a, const Part& b) { return Before(a.range, b.range); });
  std::vector<Entry> entries;
  for (const Part& part : sorted) {
    size_t k = 0;
    for (const Cut& cut : CutsOf(part.range, part.type)) {
      Entry& entry = entries.emplace_back();
      entry.key = {.tensor = part.range.tensor,
                   .tensor_class = part.range.tensor_class,
                   .chunk = cut.chunk,
                   .first = cut.first};
      entry.type = part.type;
      entry.bytes = cut.bytes;
      if (part.range.data == nullptr) {
        entry.extent = part.extents[k++];
      } else {
        entry.data = static_cast<const char*>(part.range.data) + cut.begin;
      }
    }
  }
  return entries;
}

Status Snapshot::AddAll(std::span<const Entry> entries, SstShardWriter* writer) const {
  std::vector<char> from_disk;
  for (const Entry& entry : entries) {
    const char* data = entry.data;
    if (data == nullptr) {
      from_disk.resize(entry.bytes);
      RETURN_IF_ERROR(file_.Read(entry.extent, from_disk));
      data = from_disk.data();
    }
    RETURN_IF_ERROR(writer->Add(entry.key, entry.type, {data, entry.bytes}));
  }
  return OkStatus();
}

StatusOr<std::vector<heddle::v1::ShardFile>> Snapshot::Write(
    const ShardWriterOptions& options) const {
  if (non_finite_ > 0) {
    return FailedPrecondition(Str(non_finite_, " values are not finite, the first in ",
                                  first_non_finite_, ": not saved"));
  }
  const std::vector<Entry> entries = Entries();
  std::vector<FileWrite> files = FilesOf(
      entries.size(), [&](size_t i) { return entries[i].bytes; }, options.roll_bytes);
  std::mutex disk;
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  const auto write_some = [&] {
    for (size_t i = next++; i < files.size() && !failed; i = next++) {
      files[i].status = [&]() -> Status {
        ShardWriterOptions mine = options;
        mine.first_file = options.first_file + static_cast<uint32_t>(i);
        mine.roll_bytes = std::numeric_limits<uint64_t>::max();
        mine.disk = &disk;
        ASSIGN_OR_RETURN(files[i].writer, SstShardWriter::Create(std::move(mine)));
        RETURN_IF_ERROR(AddAll(std::span(entries).subspan(files[i].first, files[i].count),
                               files[i].writer.get()));
        ASSIGN_OR_RETURN(files[i].done, files[i].writer->Finish());
        return OkStatus();
      }();
      failed = failed || !files[i].status.ok();
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < std::min(kFilesAtOnce, files.size()); ++i) others.emplace_back(write_some);
  write_some();
  for (std::thread& other : others) other.join();
  return Collect(&files);
}

}  // namespace heddle::checkpoint
