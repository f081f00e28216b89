// Folders, files and packed sets for the tests of data/.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"
#include "data/pack/checksum.h"
#include "data/pack/files.h"
#include "data/pack/manifest.h"
#include "data/pack/shard_writer.h"

namespace heddle::test {

// A folder that is removed with everything in it at the end of the test.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = std::filesystem::temp_directory_path() / "heddle-data-XXXXXX";
    HEDDLE_CHECK(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string operator/(std::string_view name) const { return Str(path_, "/", name); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void WriteFile(const std::string& path, std::string_view bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  file.close();
  HEDDLE_CHECK(file.good(), path);
}

inline std::string ReadBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  HEDDLE_CHECK(file.good(), path);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

struct PackedSetOptions {
  uint32_t vocab_size = 1000;
  uint32_t eos_id = 0;
  int64_t shard_tokens_max = 1 << 20;
  std::string tokenizer_sha256 = std::string(64, 'a');
  std::string split = "train";
};

// Writes a packed set of these documents, whose last token should be the eos, without any
// tokenizer.
inline void WritePackedSet(const std::string& dir,
                           const std::vector<std::vector<uint32_t>>& documents,
                           const PackedSetOptions& options = {}) {
  std::filesystem::create_directories(dir);
  pack::ShardHeader header;
  header.vocab_size = options.vocab_size;
  header.eos_id = options.eos_id;
  header.token_bytes = options.vocab_size <= 65536 ? 2 : 4;
  header.tokenizer_sha256 = options.tokenizer_sha256;
  pack::ShardWriter writer(dir, header, options.shard_tokens_max, {});
  for (size_t d = 0; d < documents.size(); ++d) {
    const auto bytes = static_cast<int64_t>(documents[d].size());
    HEDDLE_CHECK(writer.Add(static_cast<int64_t>(d), documents[d], bytes).ok());
  }
  HEDDLE_CHECK(writer.Finish(static_cast<int64_t>(documents.size())).ok());
  pack::Manifest manifest;
  manifest.split = options.split;
  manifest.tokenizer_sha256 = options.tokenizer_sha256;
  manifest.vocab_size = options.vocab_size;
  manifest.eos_id = options.eos_id;
  manifest.token_bytes = static_cast<int>(header.token_bytes);
  manifest.sources = {"test"};
  manifest.source_digest = pack::Xxh3Hex("test");
  writer.Describe(&manifest);
  HEDDLE_CHECK(pack::WriteFileAtomically(Str(dir, "/", pack::kManifestName),
                                         pack::SerializeManifest(manifest))
                   .ok());
}

}  // namespace heddle::test
