// `heddle data prepare`: reads sources, tokenizes on several threads and writes packed sets. The
// bytes written depend on sources and options only, never on threads or restarts. Source:
// formats.md F25, F26.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "base/status/status.h"
#include "data/text/document_source.h"

namespace heddle::pack {

struct PrepareProgress {
  std::string phase;       // "tokenizer", "merges" or "pack"
  int64_t bytes_done = 0;  // of source text; in phase "merges": merges
  int64_t bytes_total = 0;
  int64_t documents = 0;
  int64_t tokens = 0;
  double megabytes_per_second = 0;
  double eta_seconds = 0;
};

struct PrepareOptions {
  text::SourceOptions source;  // inputs, filters
  std::string tokenizer;     // path of a tokenizer.json, or "bpe:SIZE" to train one on the sources
  std::string out;           // folder; made if missing. Evaluation documents go to `out`/eval
  double eval_fraction = 0;  // share of documents, [0, 1); equal texts always land on the same side
  uint64_t seed = 0;         // of the split
  int threads = 0;           // 0 = all cores
  int64_t shard_tokens_max = 64 << 20;
  int64_t tokenizer_bytes_max =
      256 << 20;  // of text that a trained tokenizer sees: the sources' beginning
  std::function<void(const PrepareProgress&)>
      progress;                     // may be empty; called on this thread, <= 10 a second
  std::function<bool()> cancelled;  // may be empty; true = stop with ABORTED, restartable
};

struct SplitReport {
  std::string dir;
  std::string manifest_hash;
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t text_bytes = 0;
  int64_t shards = 0;
};

struct PrepareReport {
  SplitReport train;
  SplitReport eval;  // dir empty when there is none
  std::string tokenizer_sha256;
  uint32_t vocab_size = 0;
  double bytes_per_token = 0;
  double seconds = 0;
  double megabytes_per_second = 0;  // of text, whole run
  int64_t shards_reused = 0;        // finished by an interrupted run before this one
  bool already_complete =
      false;  // the folder already holds exactly this data set; nothing was done
  std::map<std::string, int64_t> skipped;
};

// Makes the packed set(s). Restartable: after any interruption the same call goes on with the
// finished shards. ALREADY_EXISTS: `out` holds a data set of other sources or options, or other
// files. INVALID_ARGUMENT, NOT_FOUND: as ListFiles, DocumentReader, Tokenizer::Load.
// RESOURCE_EXHAUSTED: disk full; nothing half written is ever visible under a final name. ABORTED:
// cancelled. Blocking.
StatusOr<PrepareReport> Prepare(const PrepareOptions& options);

}  // namespace heddle::pack
