#include "checkpoint/catalog/lineage.h"

#include <algorithm>
#include <map>

namespace heddle::checkpoint {

namespace {

using heddle::v1::CheckpointRecord;

// (step, fence) descending.
bool Newer(const CheckpointRecord& a, const CheckpointRecord& b) {
  return a.step() != b.step() ? a.step() > b.step() : a.fence() > b.fence();
}

std::vector<size_t> NewestFirst(const std::vector<CheckpointRecord>& records,
                                bool (*wanted)(const CheckpointRecord&)) {
  std::vector<size_t> found;
  for (size_t i = 0; i < records.size(); ++i) {
    if (wanted(records[i])) {
      found.push_back(i);
    }
  }
  std::sort(found.begin(), found.end(),
            [&](size_t a, size_t b) { return Newer(records[a], records[b]); });
  return found;
}

bool IsCommitted(const CheckpointRecord& record) {
  return record.state() == heddle::v1::CHECKPOINT_STATE_COMMITTED;
}

}  // namespace

CheckpointKey KeyOf(const CheckpointRecord& record) { return {record.fence(), record.step()}; }

bool IsGood(const CheckpointRecord& record) { return IsCommitted(record) && !record.damaged(); }

std::vector<size_t> RestoreCandidates(const std::vector<CheckpointRecord>& records, size_t limit) {
  std::vector<size_t> good = NewestFirst(records, IsGood);
  if (good.size() > limit) {
    good.resize(limit);
  }
  return good;
}

std::vector<size_t> Lineage(const std::vector<CheckpointRecord>& records, size_t start) {
  std::map<CheckpointKey, size_t> by_key;
  for (size_t i = 0; i < records.size(); ++i) {
    by_key[KeyOf(records[i])] = i;
  }
  std::vector<size_t> chain;
  std::set<size_t> seen;
  size_t at = start;
  while (seen.insert(at).second) {
    chain.push_back(at);
    const CheckpointRecord& record = records[at];
    if (!record.has_parent_fence() || !record.has_parent_step()) {
      break;
    }
    const auto parent = by_key.find({record.parent_fence(), record.parent_step()});
    if (parent == by_key.end()) {
      break;
    }
    at = parent->second;
  }
  return chain;
}

std::vector<size_t> Expirable(const std::vector<CheckpointRecord>& records,
                              const RetentionPolicy& policy) {
  const uint64_t keep_newest = std::max<uint64_t>(policy.keep_last, 2);
  std::vector<size_t> expirable;
  uint64_t newer_good = 0;
  uint64_t newer_verified = 0;
  for (const size_t i : NewestFirst(records, IsCommitted)) {
    const CheckpointRecord& record = records[i];
    const bool kept_for_good =
        record.pinned() || policy.in_use.contains(KeyOf(record)) ||
        (policy.keep_every > 0 && !record.damaged() && record.step() % policy.keep_every == 0);
    if (!kept_for_good && newer_good >= keep_newest && newer_verified >= 2) {
      expirable.push_back(i);
    }
    if (!record.damaged()) {
      ++newer_good;
      newer_verified += record.verified() ? 1 : 0;
    }
  }
  std::reverse(expirable.begin(), expirable.end());
  return expirable;
}

std::vector<size_t> ToVerify(const std::vector<CheckpointRecord>& records) {
  return NewestFirst(
      records, [](const CheckpointRecord& record) { return IsGood(record) && !record.verified(); });
}

}  // namespace heddle::checkpoint
