// Encodes batches of documents on several threads and gives them back in the order they came.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle::pack {

// Texts go in, tokens come out; `numbers` and `tags` are the caller's.
struct EncodeBatch {
  std::vector<std::string> texts;
  std::vector<std::string> names;  // for messages
  std::vector<int64_t> numbers;
  std::vector<bool> tags;
  std::vector<uint32_t> tokens;  // of all documents, each with its eos
  std::vector<size_t> ends;      // where each document's tokens end
  Status status;
};

class EncodePool {
 public:
  // Starts `threads` threads. `tokenizer` must outlive the pool and have an eos.
  EncodePool(const tokenizer::Tokenizer& tokenizer, int threads);
  // Drops what is unfinished and joins the threads.
  ~EncodePool();
  EncodePool(const EncodePool&) = delete;
  EncodePool& operator=(const EncodePool&) = delete;

  void Submit(std::unique_ptr<EncodeBatch> batch);
  // Batches submitted and not yet taken.
  size_t pending() const;
  // Waits for the oldest of them. REQUIRES: pending() > 0.
  std::unique_ptr<EncodeBatch> Take();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace heddle::pack
