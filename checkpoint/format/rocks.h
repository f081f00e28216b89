// What the .cc files of this folder share about RocksDB: options that both ends must agree on, the
// whole-file digest and the translator of its status codes. Never included by a header.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "base/status/status.h"
#include "rocksdb/env.h"
#include "rocksdb/file_checksum.h"
#include "rocksdb/options.h"
#include "rocksdb/status.h"

namespace heddle::checkpoint {

// "FILE: what RocksDB says", with the code as the reaction: Corruption is DATA_LOSS, a full disk
// RESOURCE_EXHAUSTED, a missing path NOT_FOUND.
Status FromRocks(const rocksdb::Status& status, const std::string& path);

// Options of both reader and writer. Every file carries its XXH3-128 as its file checksum.
rocksdb::Options SstOptions();

// The local file system, but each piece of a file written past the page cache is written while
// `disk`, which is borrowed, is held.
std::unique_ptr<rocksdb::Env> TurnTakingEnv(std::mutex* disk);

// XXH3-128 over all bytes of a file as it is written.
std::shared_ptr<rocksdb::FileChecksumGenFactory> DigestFactory();

// Bytes of a digest in canonical (big-endian) order.
class Digester {
 public:
  Digester();
  ~Digester();
  Digester(const Digester&) = delete;
  Digester& operator=(const Digester&) = delete;
  void Update(const char* data, size_t size);
  std::string Finish() const;

 private:
  void* state_;
};

}  // namespace heddle::checkpoint
