// Data sets whose tokens tell where they come from.
#pragma once

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "data/pack/dataset.h"
#include "data/stream/sequence_stream.h"
#include "tests/data/data_test_util.h"

namespace heddle::stream {

// A data set on disk for as long as the object lives.
struct TestSet {
  test::TempFolder folder;
  std::vector<std::vector<uint32_t>> documents;
  std::set<int64_t> first_tokens;  // of each document
  std::set<int64_t> last_tokens;   // of each document before its eos
  std::shared_ptr<const pack::Dataset> dataset;
};

// `lengths[d]` tokens in document d; every token of the set is different, but for the eos (0) at
// the ends.
inline std::unique_ptr<TestSet> MakeSet(const std::vector<int64_t>& lengths) {
  auto set = std::make_unique<TestSet>();
  uint32_t next = 1;
  for (const int64_t length : lengths) {
    std::vector<uint32_t> document;
    for (int64_t k = 0; k + 1 < length; ++k) document.push_back(next++);
    document.push_back(0);
    set->first_tokens.insert(document[0]);
    if (document.size() > 1) set->last_tokens.insert(document[document.size() - 2]);
    set->documents.push_back(std::move(document));
  }
  test::PackedSetOptions options;
  options.vocab_size = next + 1;
  options.shard_tokens_max = 3000;  // several shards
  test::WritePackedSet(set->folder.path(), set->documents, options);
  set->dataset = *pack::Dataset::Open(set->folder.path());
  return set;
}

// Lengths as in real text: many short, few much longer than a sequence.
inline std::unique_ptr<TestSet> MakeRandomSet(int64_t documents, uint64_t seed) {
  RngCursor random(Rng(seed, "test.lengths"));
  std::vector<int64_t> lengths;
  for (int64_t d = 0; d < documents; ++d) {
    const uint64_t kind = random.Below(10);
    lengths.push_back(static_cast<int64_t>(1 + random.Below(kind == 0  ? 1500
                                                            : kind < 4 ? 200
                                                                       : 40)));
  }
  return MakeSet(lengths);
}

inline bool operator==(const PackedBatch& a, const PackedBatch& b) {
  return a.tokens == b.tokens && a.positions == b.positions && a.labels == b.labels &&
         a.cu_seqlens == b.cu_seqlens && a.segment_tokens_max == b.segment_tokens_max &&
         a.valid_labels == b.valid_labels && a.hash_low == b.hash_low && a.hash_high == b.hash_high;
}

}  // namespace heddle::stream
