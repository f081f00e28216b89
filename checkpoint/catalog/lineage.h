// Which checkpoints of a job to restore from and which to keep (control-plane 4.5, training-runtime
// 14.9, 14.10; reliability R4). Pure functions of the records. Identity of a checkpoint within its
// job is (fence, step); of two with one step the higher fence counts (control-plane N5).
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

using CheckpointKey = std::pair<uint64_t, uint64_t>;  // (fence, step)
CheckpointKey KeyOf(const heddle::v1::CheckpointRecord& record);

// COMMITTED and not damaged: may be loaded.
bool IsGood(const heddle::v1::CheckpointRecord& record);

// Indices of the good records, newest first: by step, then fence, both descending. At most `limit`.
std::vector<size_t> RestoreCandidates(const std::vector<heddle::v1::CheckpointRecord>& records,
                                      size_t limit = 8);

// Chain of parents of records[start], itself first, as far as their records are there. Ends at a
// repeated record.
std::vector<size_t> Lineage(const std::vector<heddle::v1::CheckpointRecord>& records, size_t start);

struct RetentionPolicy {
  uint64_t keep_last = 3;   // newest good ones; at least 2 are kept whatever this says
  uint64_t keep_every = 0;  // multiples of this step are kept for good; 0: none
  // Sources of live jobs and whatever else must stay.
  std::set<CheckpointKey> in_use;
};

// Indices of COMMITTED records that may expire now, oldest first. Never pinned ones, ones in use,
// the newest keep_last (at least 2) good ones, multiples of keep_every, and never before two newer
// good ones are verified. Damaged ones expire under the same rule, but do not count as kept.
std::vector<size_t> Expirable(const std::vector<heddle::v1::CheckpointRecord>& records,
                              const RetentionPolicy& policy);

// The newest good records that are not verified yet, newest first: what a background check reads
// next, since nothing older may go before they are.
std::vector<size_t> ToVerify(const std::vector<heddle::v1::CheckpointRecord>& records);

}  // namespace heddle::checkpoint
