// Reads a rank's micro-batches ahead of the step loop on one thread, into a bounded ring. The ring
// is keyed by the consumer's counter: what was prefetched never matters to the state of a run.
// Source: training-runtime.md 15.6.
#pragma once

#include <cstdint>
#include <memory>

#include "base/status/status.h"
#include "data/stream/sequence_stream.h"

namespace heddle::stream {

struct PrefetchOptions {
  int64_t first_step = 0;
  int64_t global_batch_size = 1;
  int64_t micro_batch_size = 1;
  int rank = 0;
  int world = 1;
  int64_t depth = 4;  // micro-batches in the ring
};

struct PrefetchStats {
  int64_t queue_depth = 0;  // micro-batches ready now
  double wait_ms = 0;       // that Next has waited in total
};

// One consumer thread.
class Prefetcher {
 public:
  // INVALID_ARGUMENT when global_batch_size is no positive multiple of micro_batch_size, rank is
  // not in [0, world) or depth < 1. Starts the thread.
  static StatusOr<std::unique_ptr<Prefetcher>> Create(std::shared_ptr<const SequenceSource> source,
                                                      const PrefetchOptions& options);
  // Stops and joins the thread.
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // Micro-batch number k = 0, 1, ... of this rank in `step`; k < RankMicroBatches().size. Steps and
  // numbers must follow each other; to jump (a rollback), make a new Prefetcher. The error of a bad
  // block comes with the micro-batch that needed it.
  StatusOr<PackedBatch> Next(int64_t step, int64_t k);
  PrefetchStats stats() const;

 private:
  class Impl;
  explicit Prefetcher(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace heddle::stream
