// Reads one SST file of a checkpoint. Every byte that is handed out has passed its block checksum;
// the whole-file digest is checked too where the caller asks for it (training-runtime.md 14.8).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/status/status.h"
#include "checkpoint/format/key.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

// XXH3-128 of a file, 16 bytes big-endian. `bytes` (optional) receives the size.
StatusOr<std::string> FileDigest(const std::string& path, uint64_t* bytes = nullptr);

enum class DigestCheck { kNone, kWholeFile };

// One thread.
class ShardReader {
 public:
  // Opens `path` and compares it with what the record says of it: size, header, and with kWholeFile
  // the digest. NOT_FOUND: no such file. DATA_LOSS: anything differs, with the file's name.
  static StatusOr<std::unique_ptr<ShardReader>> Open(const std::string& path,
                                                     const heddle::v1::ShardFile& expected,
                                                     DigestCheck digest);
  ~ShardReader();
  ShardReader(const ShardReader&) = delete;
  ShardReader& operator=(const ShardReader&) = delete;

  const heddle::v1::ShardHeader& header() const;

  using Visitor = std::function<Status(const EntryKey& key, std::string_view value)>;
  // Every entry with from <= key < to in key order, the header excepted. DATA_LOSS for a bad block
  // (with what the library says of its offset) or a bad key; a status of `visit` ends the scan.
  Status Scan(const EntryKey& from, const EntryKey& to, const Visitor& visit);
  Status ScanAll(const Visitor& visit);

  // Reads and checks every block. DATA_LOSS names the first bad one.
  Status VerifyBlocks();

 private:
  struct Impl;
  explicit ShardReader(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace heddle::checkpoint
