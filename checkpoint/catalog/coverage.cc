#include "checkpoint/catalog/coverage.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "checkpoint/catalog/tensors.h"

namespace heddle::checkpoint {

namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::ElementRange;
using heddle::v1::RankSeal;
using heddle::v1::ShardFile;
using heddle::v1::TensorInfo;

constexpr size_t kMaxProblems = 100;
using Slot = std::pair<uint32_t, int>;  // (tensor id, class)

// Ids count from 1 in the sorted order of names; returns the expected slots.
std::set<Slot> CheckTensors(const CheckpointRecord& record, std::vector<std::string>* problems) {
  std::set<Slot> slots;
  for (int i = 0; i < record.tensors_size(); ++i) {
    const TensorInfo& tensor = record.tensors(i);
    if (tensor.id() != static_cast<uint32_t>(i) + 1) {
      problems->push_back(Str(tensor.name(), ": has id ", tensor.id(), ", expected ", i + 1));
    }
    if (i > 0 && record.tensors(i - 1).name() >= tensor.name()) {
      problems->push_back(Str(tensor.name(), ": the list of tensors is not sorted by name"));
    }
    if (tensor.classes_size() == 0) {
      problems->push_back(Str(tensor.name(), ": has no class"));
    }
    for (const int tensor_class : tensor.classes()) {
      if (!slots.insert({tensor.id(), tensor_class}).second) {
        problems->push_back(Str(tensor.name(), ": names a class twice"));
      }
    }
  }
  return slots;
}

void CheckRanks(const CheckpointRecord& record, std::vector<std::string>* problems) {
  std::set<uint32_t> ranks;
  for (const RankSeal& seal : record.seals()) {
    if (seal.rank() >= record.world_size()) {
      problems->push_back(
          Str("rank ", seal.rank(), " is outside the world of ", record.world_size()));
    } else if (!ranks.insert(seal.rank()).second) {
      problems->push_back(Str("rank ", seal.rank(), " has sealed twice"));
    }
    for (std::string& problem : SealProblems(seal)) {
      problems->push_back(std::move(problem));
    }
  }
  for (uint32_t rank = 0; rank < record.world_size() && problems->size() < kMaxProblems; ++rank) {
    if (!ranks.contains(rank)) {
      problems->push_back(Str("rank ", rank, " has not sealed"));
    }
  }
  if (record.world_size() == 0) {
    problems->push_back("the world size is 0");
  }
}

std::string SlotText(const CheckpointRecord& record, const Slot& slot) {
  const bool known = slot.first >= 1 && slot.first <= static_cast<uint32_t>(record.tensors_size());
  const std::string name =
      known ? record.tensors(static_cast<int>(slot.first) - 1).name() : Str("tensor ", slot.first);
  return Str(name, " (", ToText(static_cast<heddle::v1::TensorClass>(slot.second)), ")");
}

}  // namespace

std::string StepDir(const std::string& attempt_dir, uint64_t step) {
  return Str(attempt_dir, "/step-", step);
}

bool IsShardName(const std::string& name, uint32_t rank) {
  const std::string prefix = Str("rank-", rank, "-");
  const std::string suffix = ".sst";
  if (!name.starts_with(prefix) || !name.ends_with(suffix)) {
    return false;
  }
  const std::string number =
      name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
  return !number.empty() && number.size() <= 9 &&
         std::all_of(number.begin(), number.end(), [](char c) { return c >= '0' && c <= '9'; });
}

std::vector<std::string> SealProblems(const RankSeal& seal) {
  std::vector<std::string> problems;
  if (seal.files_size() == 0) {
    problems.push_back(Str("rank ", seal.rank(), " seals no file"));
  }
  std::set<std::string> names;
  for (const ShardFile& file : seal.files()) {
    if (!IsShardName(file.name(), seal.rank())) {
      problems.push_back(Str("\"", file.name(), "\" is no file name of rank ", seal.rank()));
    }
    if (!names.insert(file.name()).second) {
      problems.push_back(Str(file.name(), ": is named twice"));
    }
    if (file.digest().size() != 16) {
      problems.push_back(Str(file.name(), ": has no digest of 16 bytes"));
    }
    if (file.bytes() == 0 || file.entries() == 0) {
      problems.push_back(Str(file.name(), ": is empty"));
    }
  }
  return problems;
}

std::vector<std::string> CoverageProblems(const CheckpointRecord& record) {
  std::vector<std::string> problems;
  const std::set<Slot> slots = CheckTensors(record, &problems);
  CheckRanks(record, &problems);
  std::map<Slot, std::vector<ElementSpan>> spans;
  for (const RankSeal& seal : record.seals()) {
    for (const ShardFile& file : seal.files()) {
      for (const ElementRange& range : file.ranges()) {
        const Slot slot{range.tensor(), range.tensor_class()};
        if (slots.contains(slot)) {
          spans[slot].push_back({.first = range.first(), .count = range.count()});
        } else {
          problems.push_back(
              Str(file.name(), ": holds ", SlotText(record, slot), ", which is not listed"));
        }
      }
    }
  }
  for (const Slot& slot : slots) {
    if (slot.first == 0 || slot.first > static_cast<uint32_t>(record.tensors_size())) {
      continue;  // named above
    }
    const uint64_t elements = Elements(record.tensors(static_cast<int>(slot.first) - 1));
    for (const std::string& problem : CoverProblems(std::move(spans[slot]), elements)) {
      problems.push_back(Str(SlotText(record, slot), ": ", problem));
    }
    if (problems.size() >= kMaxProblems) {
      break;
    }
  }
  if (problems.size() > kMaxProblems) {
    problems.resize(kMaxProblems);
  }
  return problems;
}

Status CheckCoverage(const CheckpointRecord& record) {
  const std::vector<std::string> problems = CoverageProblems(record);
  if (problems.empty()) {
    return OkStatus();
  }
  std::string text = "the shards are no whole checkpoint";
  for (size_t i = 0; i < std::min(problems.size(), kListedMax); ++i) {
    text += Str("; ", problems[i]);
  }
  if (problems.size() > kListedMax) {
    const bool cut = problems.size() >= kMaxProblems;
    text += Str("; and ", cut ? "at least " : "", problems.size() - kListedMax, " more");
  }
  return FailedPrecondition(text);
}

uint64_t TotalBytes(const CheckpointRecord& record) {
  uint64_t bytes = 0;
  for (const RankSeal& seal : record.seals()) {
    for (const ShardFile& file : seal.files()) {
      bytes += file.bytes();
    }
  }
  return bytes;
}

}  // namespace heddle::checkpoint
