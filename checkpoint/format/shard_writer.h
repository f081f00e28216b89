// Writes one rank's part of a checkpoint as immutable RocksDB SST files (training-runtime.md 14.4,
// reliability D4). Nothing written here is visible to a reader: a checkpoint exists once the
// coordinator committed its record.
//
// Invariants: 1. A file name is used once: files are created with O_EXCL in a folder of this fence
// and step. 2. After Finish every file, and every folder on the way from the root, is synced.
// 3. After any error the writer is dead: it never retries a write or fsync on the same file.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"
#include "checkpoint/format/key.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

struct ShardWriterOptions {
  std::string root;  // checkpoint root, exists
  std::string dir;   // j-.../f<F>/step-<N>, relative to root; made as needed
  heddle::v1::ShardHeader header;
  uint64_t roll_bytes = uint64_t{256} << 20;  // a new file from here on
  uint32_t first_file = 0;                    // number in the name of the first file
  uint64_t permit_every_bytes = uint64_t{64} << 20;
  // Held for each write, where several writers share a disk: two streams at once are slower than
  // one after the other on most, and while one writes the others digest. Null: nobody else.
  std::mutex* disk = nullptr;
  // Asked before each file, every permit_every_bytes and at Finish; a refusal ends the writer with
  // that status (control-plane L4). Empty: always permitted.
  std::function<Status()> permit;
};

// One thread.
class SstShardWriter {
 public:
  // Makes the folders and opens the first file. ALREADY_EXISTS: this rank has written this step
  // before. RESOURCE_EXHAUSTED: disk full. The permit's status where it refused.
  static StatusOr<std::unique_ptr<SstShardWriter>> Create(ShardWriterOptions options);
  // Files of an unfinished writer stay: garbage without a record, removed by the coordinator.
  ~SstShardWriter();
  SstShardWriter(const SstShardWriter&) = delete;
  SstShardWriter& operator=(const SstShardWriter&) = delete;

  // REQUIRES: keys strictly ascending, type the tensor's, value whole elements, at most a chunk and
  // inside it (INVALID_ARGUMENT otherwise).
  Status Add(const EntryKey& key, heddle::v1::ElementType type, std::string_view value);

  // Closes the last file and syncs files and folders. A rank that owns nothing gets one file with
  // only the header. No call after this one.
  StatusOr<std::vector<heddle::v1::ShardFile>> Finish();

  // Removes every file of this writer, to give a full disk its room back. Only for files that were
  // never reported in a seal. Errors are ignored: what stays is garbage without a record.
  void Discard();

  uint64_t bytes_written() const;

 private:
  struct Impl;
  explicit SstShardWriter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Syncs a folder's entries. Errors as FromErrno.
Status SyncFolder(const std::string& path);

}  // namespace heddle::checkpoint
