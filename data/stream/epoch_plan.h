// Which documents make up which sequences in one epoch. Internal to this folder.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/rng/rng.h"
#include "data/pack/dataset.h"
#include "data/stream/packing.h"
#include "data/stream/permutation.h"
#include "data/stream/sequence_stream.h"

namespace heddle::stream {

// Thread-safe after construction, which visits every document's length.
class EpochPlan {
 public:
  // `key` is the stream's own; the epoch is mixed in here. `dataset` must outlive the plan.
  EpochPlan(const pack::Dataset& dataset, const StreamOptions& options, const Rng& key,
            int64_t epoch);

  int64_t sequences() const { return sequences_; }

  // Sequence `s` of the epoch. REQUIRES: 0 <= s < sequences().
  Sequence SequenceAt(int64_t s) const;

 private:
  using Window = std::vector<Sequence>;

  int64_t DocumentAt(int64_t position) const;
  void PlanBestFit();
  void PlanConcat();
  Window PackWindow(int64_t window) const;
  std::shared_ptr<const Window> WindowAt(int64_t window) const;
  Sequence BestFitAt(int64_t s) const;
  Sequence ConcatAt(int64_t s) const;

  const pack::Dataset& dataset_;
  const StreamOptions options_;
  const Rng key_;
  const Permutation documents_;
  int64_t sequences_ = 0;
  std::vector<int64_t> first_sequence_;  // best_fit: of each window, and the end
  std::vector<int64_t> first_token_;     // concat: of the document at each position, and the end

  struct CachedWindow {
    int64_t window = -1;
    std::shared_ptr<const Window> sequences;  // shared: a reader may outlive its place here
  };
  mutable std::mutex mutex_;
  mutable std::vector<CachedWindow> recent_;  // newest first
};

}  // namespace heddle::stream
