// Collects a split's documents into shards and writes each when it is full.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/pack/journal.h"
#include "data/pack/manifest.h"
#include "data/pack/shard_format.h"

namespace heddle::pack {

// Whether a ShardWriter names its files so: shard-NNNNN.tok.
bool IsShardName(const std::string& name);

class ShardWriter {
 public:
  // `header` has what all shards share: token width, vocabulary, eos, tokenizer. `finished` are the
  // shards of an interrupted run: those whose files are no longer intact, and all behind them, are
  // forgotten.
  ShardWriter(std::string dir, const ShardHeader& header, int64_t shard_tokens_max,
              const std::vector<FinishedShard>& finished);

  // Source documents below this number are in finished shards already.
  int64_t next_source_document() const;

  // Adds a document with its eos. True if a shard was written on its account: time to write the
  // journal. The error of the write.
  StatusOr<bool> Add(int64_t source_document, std::span<const uint32_t> tokens, int64_t text_bytes);

  // Writes what is left. `source_documents` = number of all documents of the sources.
  Status Finish(int64_t source_documents);

  const std::vector<FinishedShard>& finished() const { return finished_; }
  // Adds counts and shards to `manifest`.
  void Describe(Manifest* manifest) const;

 private:
  Status WriteShard(int64_t next_source_document);

  std::string dir_;
  ShardHeader header_;
  int64_t shard_tokens_max_;
  std::vector<FinishedShard> finished_;
  std::vector<uint32_t> tokens_;
  std::vector<uint64_t> offsets_ = {0};
  int64_t text_bytes_ = 0;
};

}  // namespace heddle::pack
