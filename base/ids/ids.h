// Typed ids (architecture S6) and their text forms. A JobId is `j-` and 13 digits of Crockford
// base32; a Fence is a decimal number in text because it exceeds 2^53.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle {

// 41 bits of milliseconds since kIdEpochMs, 10 bits of generator, 13 bits of sequence: ids sort by
// time of creation. 0 is no job.
struct JobId {
  uint64_t value = 0;
  auto operator<=>(const JobId&) const = default;
};

// 2024-01-01T00:00:00Z; 41 bits last until 2093.
inline constexpr int64_t kIdEpochMs = 1704067200000;

// The coordinator's term: grows with every start of a coordinator on the same state.
struct Term {
  uint32_t value = 0;
  auto operator<=>(const Term&) const = default;
};

// Fencing token of an attempt: term in the upper 24 bits, sequence within the term in the lower 40.
// Never falls within a job. 0 is no fence.
struct Fence {
  uint64_t value = 0;
  static constexpr int kSequenceBits = 40;
  // REQUIRES: term < 2^24, sequence < 2^40.
  static Fence Make(Term term, uint64_t sequence);
  Term term() const { return Term{static_cast<uint32_t>(value >> kSequenceBits)}; }
  uint64_t sequence() const { return value & ((uint64_t{1} << kSequenceBits) - 1); }
  auto operator<=>(const Fence&) const = default;
};

// One placement of a job; numbers start at 1. Text: `j-...#2`.
struct AttemptId {
  JobId job;
  uint32_t number = 0;
  auto operator<=>(const AttemptId&) const = default;
};

// A machine with a worker: what the worker calls itself in its state folder, `n-` and 13 digits.
struct NodeId {
  uint64_t value = 0;
  auto operator<=>(const NodeId&) const = default;
};

// A checkpoint as users name it: JOB@STEP.
struct CheckpointId {
  JobId job;
  uint64_t step = 0;
  auto operator<=>(const CheckpointId&) const = default;
};

std::string ToText(JobId id);
std::string ToText(Fence fence);
std::string ToText(Term term);
std::string ToText(AttemptId id);
std::string ToText(NodeId id);
std::string ToText(CheckpointId id);

// Each parses what ToText prints (letters in any case; Crockford's I, L -> 1 and O -> 0) and
// returns INVALID_ARGUMENT with the text for anything else, numbers out of range included.
StatusOr<JobId> ParseJobId(std::string_view text);
StatusOr<NodeId> ParseNodeId(std::string_view text);
StatusOr<Fence> ParseFence(std::string_view text);

// 13 digits of Crockford base32, most significant first: sorts like the number.
std::string EncodeBase32(uint64_t value);
// The number, or nothing for other lengths, other characters or more than 64 bits.
std::optional<uint64_t> DecodeBase32(std::string_view text);

// Finds the one id that `text` names among `known`: a full id, or a prefix of one after `j-` (which
// may be left out) of at least one digit. NOT_FOUND if none, INVALID_ARGUMENT naming up to three
// candidates if several match.
StatusOr<JobId> ResolveJobPrefix(std::string_view text, const std::vector<JobId>& known);

// Makes job ids that never repeat within a generator number, also when the clock stands still or
// goes back: the millisecond then stays or runs ahead. Not thread-safe.
class JobIdGenerator {
 public:
  // REQUIRES: generator < 1024. Ids are greater than `last`, the newest known id of this generator
  // (0 if none).
  explicit JobIdGenerator(uint32_t generator, JobId last = {});
  JobId Next(int64_t wall_ms);

 private:
  uint64_t generator_;
  uint64_t last_ms_ = 0;
  uint64_t sequence_ = 0;
};

}  // namespace heddle

template <>
struct std::hash<heddle::JobId> {
  size_t operator()(heddle::JobId id) const noexcept { return std::hash<uint64_t>()(id.value); }
};
template <>
struct std::hash<heddle::NodeId> {
  size_t operator()(heddle::NodeId id) const noexcept { return std::hash<uint64_t>()(id.value); }
};
