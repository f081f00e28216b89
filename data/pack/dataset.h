// A packed set opened for reading: shards whose blocks are checked before their first use. Source:
// formats.md F25, training-runtime.md 15.1.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/pack/manifest.h"

namespace heddle::pack {

struct OpenOptions {
  // When not empty: FAILED_PRECONDITION unless the set was made with this tokenizer (hex SHA-256).
  std::string tokenizer_sha256;
  // When not empty: FAILED_PRECONDITION unless the set has this manifest hash (a checkpoint's).
  std::string manifest_hash;
};

// Thread-safe after Open. Documents are numbered 0..documents()-1 over all shards; each ends with
// the eos id. Files must not change while open; one that is cut short all the same is DATA_LOSS.
class Dataset {
 public:
  // Opens the shards and checks manifest, headers, sizes, block tables and document tables; token
  // blocks are checked on first use. NOT_FOUND: no data set at `dir`. DATA_LOSS: damaged, truncated
  // or missing shard, with file and block. FAILED_PRECONDITION: other tokenizer, other manifest,
  // newer version.
  static StatusOr<std::unique_ptr<Dataset>> Open(const std::string& dir,
                                                 const OpenOptions& options = {});
  ~Dataset();
  Dataset(const Dataset&) = delete;
  Dataset& operator=(const Dataset&) = delete;

  const Manifest& manifest() const;
  const std::string& manifest_hash() const { return manifest().hash; }
  const std::string& dir() const;
  int64_t documents() const { return manifest().documents; }
  int64_t tokens() const { return manifest().tokens; }
  uint32_t vocab_size() const { return manifest().vocab_size; }

  // Tokens of document `d`, its eos included. REQUIRES: 0 <= d < documents().
  int64_t DocumentLength(int64_t d) const;

  // Tokens [begin, begin + out.size()) of document `d`. DATA_LOSS names file and block on a bad
  // checksum or an id outside the vocabulary. REQUIRES: the range lies in the document.
  Status ReadTokens(int64_t d, int64_t begin, std::span<uint32_t> out) const;

  // FAILED_PRECONDITION if the tokenizer.json beside the data is not the one the set was made with,
  // so that a model is never trained on ids it cannot decode (F5). OK without the file.
  Status CheckTokenizer() const;

  // Checks every byte: all block CRCs, all ids, each shard's XXH3-128.
  Status Verify() const;

 private:
  struct Impl;
  explicit Dataset(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What Manifest::tokenizer_sha256 would be of data made with the tokenizer.json of `folder`; empty
// where there is none.
StatusOr<std::string> TokenizerSha256(const std::string& folder);

}  // namespace heddle::pack
