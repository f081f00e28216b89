// A source without some windows of its sequences: what a rollback left out (training-runtime.md
// 15.5, 16.2). A reader counts on without a gap; the sequences keep their global indices, so that
// hashes and reports speak of the same sequence before and after a rollback.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status/status.h"
#include "data/stream/sequence_stream.h"

namespace heddle::stream {

// Global sequences [first, first + count).
struct Window {
  int64_t first = 0;
  int64_t count = 0;
};

// Sorted, without empty ones; those that touch or overlap are one.
std::vector<Window> MergeWindows(std::vector<Window> windows);

// Of the sequences outside of `merged` windows: the global index of number `index`, and the number
// of the first one that is not before `global_index`.
int64_t GlobalIndex(const std::vector<Window>& merged, int64_t index);
int64_t LocalIndex(const std::vector<Window>& merged, int64_t global_index);

// Not to be a part of a mixture: a sequence's global index is the one that its hash is made with.
class SkippingSource : public SequenceSource {
 public:
  // INVALID_ARGUMENT: a window that begins below 0 or ends beyond 2^62.
  static StatusOr<std::unique_ptr<SkippingSource>> Create(
      std::shared_ptr<const SequenceSource> source, const std::vector<Window>& windows);

  Status AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const override;
  SequenceShape Shape(int64_t index) const override;
  // That of the source: the order is the same.
  std::string fingerprint() const override { return source_->fingerprint(); }

 private:
  SkippingSource(std::shared_ptr<const SequenceSource> source, std::vector<Window> windows)
      : source_(std::move(source)), windows_(std::move(windows)) {}

  const std::shared_ptr<const SequenceSource> source_;
  const std::vector<Window> windows_;  // merged
};

}  // namespace heddle::stream
