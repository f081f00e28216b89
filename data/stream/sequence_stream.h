// The global order of training sequences. Sequence i is a pure function of (manifest hash, seed,
// i): no shuffle state, no carry-over, no rank. A run's data position is therefore one number, and
// any number of ranks reads the same order. Source: training-runtime.md section 15; the order
// itself is described in README.md.
//
// Invariants: 1. Within an epoch every token of the data set occurs in exactly one sequence,
// once. 2. No segment (cu_seqlens interval) holds tokens of two documents. 3. The label of a
// document's last token is kIgnoredLabel, every other token's label is the token that follows it in
// its document, also where a document longer than max_seq_len is cut into several segments.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/pack/dataset.h"

namespace heddle::stream {

inline constexpr int64_t kIgnoredLabel = -100;

enum class Packing { kBestFit, kConcat };

struct StreamOptions {
  uint64_t seed = 0;
  int64_t max_seq_len = 2048;
  Packing packing = Packing::kBestFit;
  bool shuffle = true;  // false: documents and sequences in stored order (evaluation)
  int64_t window_documents =
      1024;  // best_fit packs this many consecutive documents of the order together
};

// What can be known of a sequence without reading its tokens.
struct SequenceShape {
  int64_t index = 0;
  int64_t tokens = 0;
  int64_t valid_labels = 0;  // labels that are not kIgnoredLabel
  int64_t segments = 0;
};

// Several sequences one after the other, ready for a varlen model. Sizes: tokens, positions, labels
// [N]; cu_seqlens [segments + 1], from 0 to N.
struct PackedBatch {
  std::vector<int64_t> tokens;
  std::vector<int64_t> positions;  // restart at 0 in each segment
  std::vector<int64_t> labels;
  std::vector<int32_t> cu_seqlens = {0};
  int64_t segment_tokens_max = 0;
  int64_t valid_labels = 0;
  uint64_t hash_low =
      0;  // sums of the 32-bit halves of the sequences' hashes (training-runtime.md 8.1);
  uint64_t hash_high = 0;  // added over micro-batches and ranks, then BatchHash()
};

// Infinite: after the last sequence of epoch e comes the first of epoch e + 1. Thread-safe.
class SequenceSource {
 public:
  virtual ~SequenceSource() = default;

  // Appends sequence `index` to `batch`. DATA_LOSS as Dataset::ReadTokens. REQUIRES: index >= 0.
  Status Append(int64_t index, PackedBatch* batch) const { return AppendAs(index, index, batch); }
  // The same, with `global_index` as the seed of its hash: its index in the mixture it is part of.
  virtual Status AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const = 0;
  virtual SequenceShape Shape(int64_t index) const = 0;
  // Names the order: data, seed and options. Two sources with equal fingerprints give equal
  // sequences; kept in checkpoints.
  virtual std::string fingerprint() const = 0;
};

// One data set. `dataset` is shared with whoever opened it, since several streams may read it.
class SequenceStream : public SequenceSource {
 public:
  // INVALID_ARGUMENT for an empty data set, max_seq_len < 2 or window_documents < 1.
  static StatusOr<std::unique_ptr<SequenceStream>> Create(
      std::shared_ptr<const pack::Dataset> dataset, const StreamOptions& options);
  ~SequenceStream() override;

  Status AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const override;
  SequenceShape Shape(int64_t index) const override;
  std::string fingerprint() const override;

  // Number of sequences of an epoch (epochs differ a little under best_fit), and of all epochs
  // before it.
  int64_t SequencesInEpoch(int64_t epoch) const;
  int64_t FirstSequenceOfEpoch(int64_t epoch) const;
  int64_t EpochOf(int64_t index) const;

 private:
  struct Impl;
  explicit SequenceStream(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct WeightedSource {
  std::shared_ptr<const SequenceSource> source;
  double weight = 1;
};

// Mixture: index i goes to source k as its sequence number count_k(i), where after any i sequences
// each count is within one of i times its share (largest deficit first, ties to the lower k).
// Shares are the weights over their sum, rounded to multiples of 2^-16. INVALID_ARGUMENT for no
// source, more than 2^15 of them, or a weight that is not positive and finite.
StatusOr<std::unique_ptr<SequenceSource>> MakeMixture(std::vector<WeightedSource> sources);

// Half-open range of micro-batches.
struct MicroBatchRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// Micro-batches [floor(rank M / world), floor((rank + 1) M / world)) of a step
// (training-runtime.md 7.4).
MicroBatchRange RankMicroBatches(int64_t micro_batches, int rank, int world);

// Micro-batch `m` of `step`: sequences [step G + m b, step G + (m + 1) b), G = global_batch_size, b
// = micro_batch_size. REQUIRES: G is a multiple of b.
StatusOr<PackedBatch> ReadMicroBatch(const SequenceSource& source, int64_t step,
                                     int64_t global_batch_size, int64_t micro_batch_size,
                                     int64_t m);

// Tokens, valid labels and segments of sequences [begin, end) together: what losses of a global
// batch are divided by (7.2), and where a micro-batch begins in it. Reads no tokens. `index` is
// `begin`.
SequenceShape TotalShape(const SequenceSource& source, int64_t begin, int64_t end);

// XXH3-64 of the token ids as little-endian u32, seeded with the global sequence index.
uint64_t SequenceHash(int64_t index, const std::vector<int64_t>& tokens);
// The 64-bit batch hash of the two sums, each reduced mod 2^32: high << 32 | low.
uint64_t BatchHash(uint64_t low_sum, uint64_t high_sum);

}  // namespace heddle::stream
