// Proof that a committed checkpoint is whole: every file present with its size and digest, every
// block's checksum, every element of every (tensor, class) stored exactly once and where the record
// says. What `heddle ckpt verify` and the coordinator's background check run. Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

struct VerifyProblem {
  std::string file;    // rank-<r>-<i>.sst; empty: the record itself
  std::string block;   // what is known of the place within the file: offset, key
  std::string tensor;  // name and class, empty where the whole file is meant
  std::string what;
};
std::string ToText(const VerifyProblem& problem);

struct VerifyReport {
  uint64_t files = 0;
  uint64_t bytes = 0;  // read and checked
  uint64_t entries = 0;
  uint64_t tensors = 0;
  // In file order; of many of one kind the first kListedMax and their number. Of a file that cannot
  // be read: why, and one line with the number of its ranges.
  std::vector<VerifyProblem> problems;
  bool good() const { return problems.empty(); }
};

// Reads everything. Never fails: an unreadable file is a problem in the report. `progress` (may be
// empty) is told the bytes done after each file and ends the check early when it returns false.
VerifyReport VerifyCheckpoint(const heddle::v1::CheckpointRecord& record, const std::string& root,
                              const std::function<bool(uint64_t bytes_done)>& progress = {});

}  // namespace heddle::checkpoint
