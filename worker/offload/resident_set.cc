// The caller's side of the resident set; resident_owner.cc is the other one.
#include "worker/offload/resident_set.h"

#include <algorithm>
#include <utility>

#include "base/units/units.h"
#include "worker/offload/disk.h"

namespace heddle::offload {
namespace {

constexpr double kSecondsPerNs = 1e-9;

Status CheckBudget(const BlockTable& table, const ResidentSetOptions& options) {
  int64_t needed = options.min_pinned_bytes;
  for (uint32_t block = 0; block < table.size(); ++block) {
    needed = std::max(needed, table.MemoryBytes(block));
  }
  if (options.budget_bytes >= needed) return OkStatus();
  return InvalidArgument(Str("memory.expert_offloading.resident_mb: the budget of ",
                             options.budget_bytes, " bytes is below the ", needed,
                             " bytes that are in use together: set it to at least ",
                             (needed + kMiB - 1) / kMiB));
}

}  // namespace

void ResidentSet::Busy::Begin(int64_t now_ns) {
  if (running++ == 0) since_ns = now_ns;
}

void ResidentSet::Busy::End(int64_t now_ns) {
  if (--running == 0) total_ns += now_ns - since_ns;
}

double ResidentSet::Busy::TakeSeconds(int64_t now_ns) {
  if (running > 0) {
    total_ns += now_ns - since_ns;
    since_ns = now_ns;
  }
  return static_cast<double>(std::exchange(total_ns, 0)) * kSecondsPerNs;
}

StatusOr<std::unique_ptr<ResidentSet>> ResidentSet::Create(const BlockTable& table,
                                                           const ResidentSetOptions& options,
                                                           std::unique_ptr<Home> home) {
  HEDDLE_CHECK(options.transfers > 0);
  HEDDLE_CHECK(options.transfers <= kDiskRequests / 2);
  RETURN_IF_ERROR(CheckBudget(table, options));
  std::unique_ptr<ResidentSet> set(new ResidentSet(table, options, std::move(home)));
  set->owner_ = std::thread([owned = set.get()] { owned->Own(); });
  return set;
}

ResidentSet::ResidentSet(const BlockTable& table, const ResidentSetOptions& options,
                         std::unique_ptr<Home> home)
    : table_(table),
      options_(options),
      home_(std::move(home)),
      memory_(options.budget_bytes, options.memory_nodes),
      uses_(table.size()),
      order_(table.size()),
      blocks_(table.size()) {}

ResidentSet::~ResidentSet() {
  if (owner_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    home_->Wake();
    owner_.join();
  }
  for (uint32_t number = 0; number < blocks_.size(); ++number) {
    if (blocks_[number].data != nullptr) Release(number);
  }
}

Status ResidentSet::Expect(std::span<const ExpectedUse> uses) {
  std::vector<ExpectedUses::Use> numbered;
  numbered.reserve(uses.size());
  for (const ExpectedUse& use : uses) {
    ASSIGN_OR_RETURN(const uint32_t number, table_.Find(use.block));
    numbered.push_back({number, use.access, table_.MemoryBytes(number)});
  }
  {
    const std::lock_guard lock(mutex_);
    RETURN_IF_ERROR(failed_);
    uses_.Replace(std::move(numbered));
    order_.Renew([this](uint32_t number) { return uses_.Next(number); });
    fetched_ = 0;
  }
  home_->Wake();
  return OkStatus();
}

StatusOr<std::byte*> ResidentSet::Pin(uint32_t slot, Kind kind, Access access) {
  ASSIGN_OR_RETURN(const uint32_t number, table_.Find({slot, kind}));
  std::unique_lock lock(mutex_);
  RETURN_IF_ERROR(failed_);
  RETURN_IF_ERROR(CheckFits(number));
  uses_.Consume(number);
  Resident& block = blocks_[number];
  if (Ready(block, access) || BlankAtOnce(number, access)) {
    ++stats_.hits;
  } else {
    ++stats_.misses;
    RETURN_IF_ERROR(Await(lock, number, access));
  }
  StopLeaving(number);
  block.state = State::kHere;
  block.dirty = block.dirty || access != Access::kRead;
  block.used = ++pin_count_;
  if (block.pins++ == 0) pinned_bytes_ += table_.MemoryBytes(number);
  Reorder(number);
  return block.data;
}

bool ResidentSet::IsHere(uint32_t slot, Kind kind, Access access) {
  const StatusOr<uint32_t> number = table_.Find({slot, kind});
  if (!number.ok()) return false;
  const std::lock_guard lock(mutex_);
  return failed_.ok() && CheckFits(*number).ok() && Ready(blocks_[*number], access);
}

Status ResidentSet::Unpin(uint32_t slot, Kind kind) {
  ASSIGN_OR_RETURN(const uint32_t number, table_.Find({slot, kind}));
  {
    const std::lock_guard lock(mutex_);
    Resident& block = blocks_[number];
    if (block.pins == 0) {
      return FailedPrecondition(Str("expert offload: ", Block{slot, kind}, " is not pinned"));
    }
    if (--block.pins == 0) pinned_bytes_ -= table_.MemoryBytes(number);
    Reorder(number);
    RETURN_IF_ERROR(failed_);
  }
  // What is expected may have waited for this memory.
  home_->Wake();
  return OkStatus();
}

Status ResidentSet::Discard(uint32_t slot, Kind kind) {
  ASSIGN_OR_RETURN(const uint32_t number, table_.Find({slot, kind}));
  {
    std::unique_lock lock(mutex_);
    Resident& block = blocks_[number];
    if (block.pins > 0) {
      return FailedPrecondition(Str("expert offload: ", Block{slot, kind}, " is pinned"));
    }
    const int64_t began_ns = clock_.NowSteady();
    changed_.wait(lock, [&block] { return !block.writing && block.state != State::kReading; });
    exposed_ns_ += clock_.NowSteady() - began_ns;
    RETURN_IF_ERROR(failed_);
    read_errors_.erase(number);
    if (block.data != nullptr) Release(number);
    block = Resident();
  }
  home_->Wake();
  return OkStatus();
}

ResidentSetStats ResidentSet::TakeStats() {
  const std::lock_guard lock(mutex_);
  ResidentSetStats stats = std::exchange(stats_, {});
  const int64_t now_ns = clock_.NowSteady();
  stats.read_seconds = reading_.TakeSeconds(now_ns);
  stats.write_seconds = writing_.TakeSeconds(now_ns);
  stats.exposed_seconds = static_cast<double>(std::exchange(exposed_ns_, 0)) * kSecondsPerNs;
  stats.resident_bytes = memory_.mapped_bytes();
  stats.peak_bytes = memory_.peak_mapped_bytes();
  return stats;
}

std::string ResidentSet::Describe() const {
  return Str("experts: at most ", ApproximateBytes(options_.budget_bytes), " in memory, ",
             home_->Describe());
}

bool ResidentSet::Ready(const Resident& block, Access access) const {
  if (block.state == State::kBlank) return access == Access::kOverwrite;
  return block.state == State::kHere && (access == Access::kRead || !block.writing);
}

// An overwrite needs no more than memory; where that is free the owner is not asked.
bool ResidentSet::BlankAtOnce(uint32_t number, Access access) {
  Resident& block = blocks_[number];
  if (access != Access::kOverwrite || block.state != State::kAway) return false;
  block.data = memory_.Take(table_.MemoryBytes(number));
  if (block.data == nullptr) return false;
  block.state = State::kBlank;
  read_errors_.erase(number);
  return true;
}

Status ResidentSet::CheckFits(uint32_t number) const {
  const int64_t bytes = table_.MemoryBytes(number);
  if (blocks_[number].pins > 0 || pinned_bytes_ + bytes <= options_.budget_bytes) return OkStatus();
  return ResourceExhausted(Str("expert offload: pinning the ", table_.At(number), " (", bytes,
                               " bytes) beside ", pinned_bytes_, " pinned bytes exceeds the ",
                               options_.budget_bytes,
                               " bytes of "
                               "memory.expert_offloading.resident_mb"));
}

Status ResidentSet::Await(std::unique_lock<std::mutex>& lock, uint32_t number, Access access) {
  const int64_t began_ns = clock_.NowSteady();
  const Resident& block = blocks_[number];
  demand_ = {number, access};
  StopLeaving(number);
  bool planned = false;
  while (failed_.ok() && !Ready(block, access)) {
    if (const auto error = read_errors_.find(number); error != read_errors_.end()) {
      // What is overwritten need not be readable.
      if (access != Access::kOverwrite) failed_ = error->second;
      read_errors_.erase(error);
      planned = false;
      continue;
    }
    // Once: after that the owner plans anew whenever a transfer ends.
    if (!std::exchange(planned, true)) home_->Wake();
    changed_.wait(lock);
  }
  demand_.reset();
  exposed_ns_ += clock_.NowSteady() - began_ns;
  return failed_;
}

}  // namespace heddle::offload
