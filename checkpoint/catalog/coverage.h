// Whether the shards of a checkpoint make a whole: every element of every (tensor, class) in
// exactly one range. The coordinator asks before it commits (training-runtime.md 14.5), the
// verifier again. Pure: looks at the record only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

// Folder of a step inside an attempt's folder: "<attempt_dir>/step-<N>".
std::string StepDir(const std::string& attempt_dir, uint64_t step);

// True for a name that a seal may carry: "rank-<rank>-<number>.sst" of this very rank, no path.
bool IsShardName(const std::string& name, uint32_t rank);

// Everything wrong with one rank's seal by itself: file names, digests of 16 bytes, empty files,
// repeated names. Empty: good.
std::vector<std::string> SealProblems(const heddle::v1::RankSeal& seal);

// Everything that keeps `record` from being a whole checkpoint: ranks missing or twice
// (world_size), seal problems, tensor ids that do not count from 1 in the sorted order of names,
// ranges of unknown tensors or classes, gaps, overlaps, elements beyond the end; each names tensor
// and class. Empty: coverage is exact. At most 100 lines.
std::vector<std::string> CoverageProblems(const heddle::v1::CheckpointRecord& record);

// OK, or FAILED_PRECONDITION with the problems joined.
Status CheckCoverage(const heddle::v1::CheckpointRecord& record);

// Sum of the bytes of all sealed files.
uint64_t TotalBytes(const heddle::v1::CheckpointRecord& record);

}  // namespace heddle::checkpoint
