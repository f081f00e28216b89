// `heddle data inspect` and `heddle data sample`: look into a packed set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/pack/manifest.h"

namespace heddle::pack {

struct InspectReport {
  Manifest manifest;
  int64_t document_tokens_min = 0;
  int64_t document_tokens_median = 0;
  int64_t document_tokens_p99 = 0;
  int64_t document_tokens_max = 0;
  double bytes_per_token = 0;
  int64_t bytes_on_disk = 0;
  bool verified = false;       // every checksum was read and right
  bool has_tokenizer = false;  // tokenizer.json with the right SHA-256 lies beside the data
};

// Opens the set at `dir`; with `verify` reads and checks every byte. Errors as Dataset::Open and
// ::Verify.
StatusOr<InspectReport> Inspect(const std::string& dir, bool verify);

struct SampledDocument {
  int64_t document = 0;
  std::vector<uint32_t> ids;  // the first `tokens_max`
  std::string text;           // decoded, printable UTF-8
};

struct SampleOptions {
  int64_t documents = 3;
  int64_t tokens_max = 200;
  uint64_t seed = 0;
};

// Some documents, drawn by seed, decoded with the tokenizer.json beside the data (NOT_FOUND without
// it, FAILED_PRECONDITION when it is another one).
StatusOr<std::vector<SampledDocument>> Sample(const std::string& dir, const SampleOptions& options);

}  // namespace heddle::pack
