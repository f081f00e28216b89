// Trains a byte-level BPE vocabulary and writes it as `tokenizer.json`. Given the same texts in any
// order the result is the same, and equals that of the PyPI `tokenizers` trainer: the most frequent
// pair is merged first, ties go to the smaller pair of ids. Source: formats.md section 4.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::tokenizer {

struct BpeTrainerOptions {
  uint32_t vocab_size = 8192;  // special tokens and the 256 bytes included
  std::vector<std::string> special_tokens = {"<|endoftext|>"};  // take the ids from 0 on
  int64_t min_frequency = 2;                                    // rarer pairs are never merged
};

// Counts words, then learns merges. Not thread-safe.
class BpeTrainer {
 public:
  // INVALID_ARGUMENT if `vocab_size` cannot hold the 256 bytes and the special tokens, or exceeds
  // 2^24.
  static StatusOr<std::unique_ptr<BpeTrainer>> Create(const BpeTrainerOptions& options);
  ~BpeTrainer();
  BpeTrainer(const BpeTrainer&) = delete;
  BpeTrainer& operator=(const BpeTrainer&) = delete;

  // Adds a text. INVALID_ARGUMENT with the byte offset when it is not UTF-8.
  Status Add(std::string_view text);

  // Learns and returns the file's text; the vocabulary is smaller than asked where the texts have
  // too few pairs. `progress` (may be empty) is called with merges done and wanted. Call once.
  // INVALID_ARGUMENT when no text was added.
  StatusOr<std::string> Finish(const std::function<void(int64_t, int64_t)>& progress);

 private:
  struct Impl;
  explicit BpeTrainer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// SIZE of "bpe:SIZE"; nullopt-like NOT_FOUND when `spec` does not begin with "bpe:",
// INVALID_ARGUMENT when SIZE is no number in [257, 2^24].
StatusOr<uint32_t> ParseBpeSpec(std::string_view spec);

}  // namespace heddle::tokenizer
