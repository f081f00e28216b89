// `prepare.json`: how far a preparation has come, so that an interrupted one goes on. It stays
// beside the finished set and tells a second call that there is nothing to do. A stored format,
// read only by the same version of the packer: another fingerprint is another preparation.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/pack/manifest.h"

namespace heddle::pack {

inline constexpr char kJournalName[] = "prepare.json";

struct FinishedShard {
  ShardEntry entry;
  int64_t text_bytes = 0;
  // All documents of this split with a source number below this are in this shard or an earlier
  // one.
  int64_t next_source_document = 0;
};

struct Journal {
  std::string fingerprint;  // of sources and options
  bool complete = false;
  std::string tokenizer_sha256;  // empty until the tokenizer is written
  std::vector<FinishedShard> train;
  std::vector<FinishedShard> eval;
};

// nullopt: `dir` has no journal. DATA_LOSS: it is damaged.
StatusOr<std::optional<Journal>> ReadJournal(const std::string& dir);
Status WriteJournal(const std::string& dir, const Journal& journal);

}  // namespace heddle::pack
