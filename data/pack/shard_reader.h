// One `shard-NNNNN.tok` opened for reading. Read by pread, not through a mapping: the read of a
// mapped page that the file lost, or that its disk cannot give, is SIGBUS and ends the process; a
// pread says so. It costs a system call per document, against thousands of tokens' arithmetic.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/pack/manifest.h"
#include "data/pack/shard_format.h"

namespace heddle::pack {

// Thread-safe after Open. Holds a descriptor, and 4 bytes of memory a document (8 from 2^32 tokens
// on); blocks are checked once, by whichever thread comes first.
class ShardReader {
 public:
  // Checks header, size, block table and document table. DATA_LOSS names the file; `index` is the
  // shard's place in the set.
  static StatusOr<std::unique_ptr<ShardReader>> Open(const std::string& path, uint32_t index,
                                                     const Manifest& manifest,
                                                     const ShardEntry& entry);
  ~ShardReader();
  ShardReader(const ShardReader&) = delete;
  ShardReader& operator=(const ShardReader&) = delete;

  int64_t documents() const { return static_cast<int64_t>(header_.documents); }
  // In tokens, from the shard's start. REQUIRES: 0 <= d <= documents().
  uint64_t DocumentOffset(int64_t d) const {
    const auto at = static_cast<size_t>(d);
    return offsets_.empty() ? long_offsets_[at] : offsets_[at];
  }

  // Tokens from `first` on. DATA_LOSS names file and block, or the sizes of a file that was cut
  // short since Open; else the errno of the disk.
  Status Read(uint64_t first, std::span<uint32_t> out) const;

  // Every byte, whatever was checked before.
  Status Verify(const ShardEntry& entry) const;

 private:
  ShardReader(const std::string& path, uint32_t index, const ShardEntry& entry)
      : path_(path), index_(index), bytes_(entry.bytes) {}

  Status OpenFile();
  Status CheckSize() const;
  Status CheckHeader(const Manifest& manifest, const ShardEntry& entry) const;
  Status ReadBlockTable(const ShardEntry& entry);
  Status ReadDocumentTable();
  Status ReadBytes(uint64_t begin, std::span<char> out) const;
  // What a read that came to the end of the file means.
  Status CutShort() const;
  // Makes sure that the blocks of [begin, end) were checked.
  Status UseBytes(uint64_t begin, uint64_t end) const;
  // Reads block `b` and checks it.
  Status ReadBlock(uint64_t b, std::vector<char>* block) const;

  const std::string path_;
  const uint32_t index_;
  const int64_t bytes_;  // of the file, as the manifest has it
  int fd_ = -1;
  ShardHeader header_;
  std::vector<uint32_t> block_crcs_;
  std::vector<uint32_t> offsets_;
  std::vector<uint64_t> long_offsets_;  // instead, where 32 bits are too few
  mutable std::vector<std::atomic<uint8_t>> checked_;
};

}  // namespace heddle::pack
