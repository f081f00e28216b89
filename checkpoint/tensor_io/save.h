// One rank's side of a save (training-runtime.md 14.2-14.7): a deep copy of what the rank owns,
// then SST files from the copy. Torch-free: the trainer's state lives in flat host buffers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "checkpoint/format/shard_writer.h"
#include "checkpoint/tensor_io/snapshot_file.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

// Part of one (tensor, class) as it lies in this rank's memory: elements
// [first, first + count) of the global tensor, contiguous at `data`.
struct LocalRange {
  uint32_t tensor = 0;  // id in the list of tensors
  heddle::v1::TensorClass tensor_class = heddle::v1::TENSOR_CLASS_MASTER;
  uint64_t first = 0;
  uint64_t count = 0;
  const void* data = nullptr;
};

// Sorts by name and numbers from 1. INVALID_ARGUMENT names a repeated name.
StatusOr<std::vector<heddle::v1::TensorInfo>> NumberTensors(
    std::vector<heddle::v1::TensorInfo> tensors);

// The ranges that replica `rank` of `world` writes of tensors that every rank holds whole: chunk c
// belongs to replica c mod world, counting chunks over all tensors and classes, so that small
// tensors spread too. `whole` has one range per (tensor, class), first 0.
std::vector<LocalRange> ReplicaShare(const std::vector<heddle::v1::TensorInfo>& tensors,
                                     const std::vector<LocalRange>& whole, uint32_t rank,
                                     uint32_t world);

// Host copy of a rank's part. Buffers are kept and reused after a Clear().
class Snapshot {
 public:
  void Clear();
  // Adds a copy of every range and counts values that are not finite. RESOURCE_EXHAUSTED without
  // memory. Blocks for the copy only; afterwards training may change its buffers.
  Status Copy(const std::vector<heddle::v1::TensorInfo>& tensors,
              const std::vector<LocalRange>& ranges);
  // Clear() and Copy().
  Status Stage(const std::vector<heddle::v1::TensorInfo>& tensors,
               const std::vector<LocalRange>& ranges);
  // The same into a nameless file of `dir`, for what does not fit into memory twice; the folder is
  // that of the first call. Errors by errno.
  Status CopyToDisk(const std::vector<heddle::v1::TensorInfo>& tensors,
                    const std::vector<LocalRange>& ranges, const std::string& dir);

  uint64_t bytes() const { return bytes_; }
  // Values that are NaN or infinite; a snapshot that has any must not be sealed (reliability R7).
  uint64_t non_finite() const { return non_finite_; }
  // Name and class of the tensor the first of them stands in.
  const std::string& first_non_finite() const { return first_non_finite_; }

  // Writes the copy in chunks, kFilesAtOnce files at a time, which ask options.permit each for
  // themselves. FAILED_PRECONDITION when non_finite() > 0. Other errors as SstShardWriter; the
  // files of a failed call are removed. The snapshot is unchanged.
  StatusOr<std::vector<heddle::v1::ShardFile>> Write(const ShardWriterOptions& options) const;
  // One is digested while the other waits for the disk.
  static constexpr size_t kFilesAtOnce = 2;

 private:
  struct Part {
    LocalRange range;  // data points into a buffer; null: in file_
    heddle::v1::ElementType type;
    std::vector<SnapshotFile::Extent> extents;  // one per chunk that the part touches
  };
  // Sorted, checked, counted in bytes_.
  StatusOr<std::vector<Part>> PartsOf(const std::vector<heddle::v1::TensorInfo>& tensors,
                                      const std::vector<LocalRange>& ranges);
  // Copies the elements and counts those that are not finite.
  void CopyPart(const std::vector<heddle::v1::TensorInfo>& tensors, const Part& part, char* target);
  StatusOr<char*> BufferOf(uint64_t bytes);
  // What becomes one entry of a file.
  struct Entry {
    EntryKey key;
    heddle::v1::ElementType type;
    uint64_t bytes = 0;
    const char* data = nullptr;   // null: in file_
    SnapshotFile::Extent extent;  // there
  };
  std::vector<Entry> Entries() const;
  Status AddAll(std::span<const Entry> entries, SstShardWriter* writer) const;

  std::vector<Part> parts_;
  // Nothing fills it first: the first save waits for each of its pages as it is.
  struct Buffer {
    std::unique_ptr<char[]> bytes;
    uint64_t capacity = 0;
  };
  std::vector<Buffer> buffers_;  // the first used_ hold parts
  size_t used_ = 0;
  SnapshotFile file_;
  uint64_t bytes_ = 0;
  uint64_t non_finite_ = 0;
  std::string first_non_finite_;
};

}  // namespace heddle::checkpoint
