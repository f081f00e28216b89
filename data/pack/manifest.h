// `dataset.json`: what a packed set consists of. The hash of its bytes, the *manifest hash*, names
// the data set in checkpoints. Source: formats.md F25. This is a stored format: docs in
// data/pack/README.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::pack {

inline constexpr int kManifestVersion = 1;
inline constexpr char kManifestName[] = "dataset.json";

struct ShardEntry {
  std::string file;  // shard-NNNNN.tok
  int64_t tokens = 0;
  int64_t documents = 0;
  int64_t bytes = 0;          // of the file
  std::string xxh3_128;       // hex, of the whole file
  uint32_t table_crc32c = 0;  // of the shard's block CRC table: ties the table to this manifest
};

struct Manifest {
  std::string split;             // "train" or "eval"
  std::string tokenizer_sha256;  // hex
  uint32_t vocab_size = 0;
  uint32_t eos_id = 0;
  int token_bytes = 2;  // 2 or 4
  uint64_t seed = 0;    // of the split
  double eval_fraction = 0;
  std::vector<std::string> sources;
  std::string source_digest;  // hex XXH3-128 over names and sizes of the source files
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t text_bytes = 0;
  std::vector<ShardEntry> shards;

  std::string
      hash;  // manifest hash: hex XXH3-128 of the file's bytes; set by Parse and Serialize's reader
};

// The file's text, with a checksum of itself.
std::string SerializeManifest(const Manifest& manifest);

// DATA_LOSS names `path` and the byte or member when the text is damaged; FAILED_PRECONDITION for a
// newer version.
StatusOr<Manifest> ParseManifest(const std::string& bytes, const std::string& path);

}  // namespace heddle::pack
