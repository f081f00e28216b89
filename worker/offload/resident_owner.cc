// The thread of the resident set: what to fetch, what to evict, and the ends of transfers.
//
// Plan looks along the expected uses from the first that is not in memory. For each it wants room:
// free memory, or that of the block whose next use is furthest away and later than this one
// (Belady); blocks nobody expects go first, the least recently used of them foremost. Clean blocks
// are dropped, dirty ones are written, and while they are, the look goes on: reads of the next
// blocks and writes of the last ones overlap up to `transfers` each. What the caller waits for goes
// before all of that, and may take the room of anything that is not pinned.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "worker/offload/resident_set.h"

namespace heddle::offload {
namespace {

// Of the budget: far enough ahead that a disk need not wait.
constexpr int64_t kNearShare = 8;

}  // namespace

void ResidentSet::Own() {
  std::vector<Start> starts;
  std::vector<TransferEnd> ends;
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      if (stopped_ && transfers_ == 0) return;
      if (!stopped_) Plan(starts);
      transfers_ += static_cast<int>(starts.size());
    }
    changed_.notify_all();
    // Without the lock: checksums, copies and zeros take their time.
    for (const Start& start : starts) {
      if (start.zero) {
        const auto bytes = static_cast<size_t>(table_.MemoryBytes(start.transfer.block));
        std::memset(start.transfer.data, 0, bytes);
        ends.push_back({start.transfer, OkStatus()});
      } else {
        home_->Begin(start.transfer);
      }
    }
    starts.clear();
    if (ends.empty()) home_->Wait(ends);
    {
      const std::lock_guard lock(mutex_);
      for (const TransferEnd& end : ends) Finish(end);
    }
    changed_.notify_all();
    ends.clear();
  }
}

void ResidentSet::Plan(std::vector<Start>& starts) {
  // Prefetching before the demand has its memory would take that away again.
  if (failed_.ok() && PlanDemand(starts)) PlanExpected(starts);
}

// False: the demand still needs memory.
bool ResidentSet::PlanDemand(std::vector<Start>& starts) {
  if (!demand_) return true;
  const uint32_t number = demand_->block;
  const Resident& block = blocks_[number];
  // Errors are the caller's to take first.
  if (read_errors_.contains(number)) return true;
  if (block.state == State::kBlank && demand_->access != Access::kOverwrite) {
    StartRead(number, starts);
  }
  if (block.state != State::kAway) return true;
  if (MakeRoom(table_.MemoryBytes(number), 0, true, starts) != Room::kReady) return false;
  Fetch(number, demand_->access, starts);
  return true;
}

void ResidentSet::PlanExpected(std::vector<Start>& starts) {
  // What comes after these many bytes may take free memory and that of blocks nobody expects: until
  // it is needed, memory becomes free by itself, of gradients that are over.
  const int64_t near = options_.budget_bytes / kNearShare + options_.min_pinned_bytes;
  int64_t promised = 0;  // memory that uses before this one wait for
  bool all_before = true;
  for (size_t place = fetched_; place < uses_.size() && failed_.ok(); ++place) {
    const auto [number, access, bytes] = uses_.At(place);
    const bool wanted = uses_.Next(number) == place && blocks_[number].state == State::kAway &&
                        !read_errors_.contains(number);
    if (wanted) {
      if (reading_.running >= options_.transfers) return;
      const bool far = uses_.BytesUntil(place) > near;
      switch (MakeRoom(promised + bytes, far ? ExpectedUses::kNever - 1 : place, false, starts)) {
        case Room::kNone:
          return;
        case Room::kComing:
          promised += bytes;
          all_before = false;
          break;
        case Room::kReady:
          Fetch(number, access, starts);
          break;
      }
    }
    if (all_before) fetched_ = place + 1;
  }
}

void ResidentSet::Fetch(uint32_t number, Access access, std::vector<Start>& starts) {
  Resident& block = blocks_[number];
  block.data = memory_.Take(table_.MemoryBytes(number));
  if (block.data == nullptr) {
    failed_ = Annotate(
        FromErrno("mmap", {}, ENOMEM),
        Str("expert offload: ", table_.MemoryBytes(number), " bytes for the ", table_.At(number)));
    return;
  }
  block.state = State::kBlank;
  Reorder(number);
  if (access != Access::kOverwrite) StartRead(number, starts);
}

void ResidentSet::StartRead(uint32_t number, std::vector<Start>& starts) {
  Resident& block = blocks_[number];
  block.state = State::kReading;
  Reorder(number);
  if (block.written) reading_.Begin(clock_.NowSteady());
  starts.push_back(
      {.transfer = {.write = false, .block = number, .data = block.data}, .zero = !block.written});
}

ResidentSet::Room ResidentSet::MakeRoom(int64_t bytes, size_t place, bool demanded,
                                        std::vector<Start>& starts) {
  while (memory_.used_bytes() - leaving_bytes_ + bytes > options_.budget_bytes) {
    const std::optional<uint32_t> victim = Furthest(place, demanded);
    if (!victim) return Room::kNone;
    if (!blocks_[*victim].dirty) {
      Release(*victim);
      ++stats_.evictions;
    } else if (writing_.running < options_.transfers) {
      StartWrite(*victim, starts);
    } else {
      return Room::kNone;
    }
  }
  return memory_.Fits(bytes) ? Room::kReady : Room::kComing;
}

std::optional<uint32_t> ResidentSet::Furthest(size_t place, bool demanded) const {
  const std::optional<uint32_t> kept = demand_ ? std::optional(demand_->block) : std::nullopt;
  std::optional<uint32_t> first = order_.First(kept);
  if (first && !demanded && uses_.Next(*first) <= place) first.reset();
  if (options_.check_order) HEDDLE_CHECK(first == FurthestOfAll(place, demanded));
  return first;
}

bool ResidentSet::IsIdle(const Resident& block) {
  const bool here = block.state == State::kHere || block.state == State::kBlank;
  return here && block.pins == 0 && !block.writing;
}

void ResidentSet::Reorder(uint32_t number) {
  const Resident& block = blocks_[number];
  if (IsIdle(block)) {
    order_.Put(number, {uses_.Next(number), block.used});
  } else {
    order_.Drop(number);
  }
}

std::optional<uint32_t> ResidentSet::FurthestOfAll(size_t place, bool demanded) const {
  std::optional<uint32_t> furthest;
  for (uint32_t number = 0; number < blocks_.size(); ++number) {
    const Resident& block = blocks_[number];
    if (!IsIdle(block) || (demand_ && demand_->block == number)) continue;
    const size_t next = uses_.Next(number);
    if (!demanded && next <= place) continue;
    if (furthest) {
      const size_t other = uses_.Next(*furthest);
      if (next < other || (next == other && block.used >= blocks_[*furthest].used)) continue;
    }
    furthest = number;
  }
  return furthest;
}

void ResidentSet::StartWrite(uint32_t number, std::vector<Start>& starts) {
  Resident& block = blocks_[number];
  block.writing = true;
  block.leaving = true;
  Reorder(number);
  leaving_bytes_ += table_.MemoryBytes(number);
  writing_.Begin(clock_.NowSteady());
  starts.push_back({.transfer = {.write = true, .block = number, .data = block.data}});
}

void ResidentSet::Release(uint32_t number) {
  Resident& block = blocks_[number];
  memory_.Give(std::exchange(block.data, nullptr), table_.MemoryBytes(number));
  block.state = State::kAway;
  Reorder(number);
  fetched_ = std::min(fetched_, uses_.Next(number));
}

void ResidentSet::Finish(const TransferEnd& end) {
  --transfers_;
  if (end.transfer.write) {
    FinishWrite(end.transfer.block, end.status);
  } else {
    FinishRead(end.transfer.block, end.status);
  }
}

void ResidentSet::FinishRead(uint32_t number, const Status& status) {
  Resident& block = blocks_[number];
  if (block.written) {
    reading_.End(clock_.NowSteady());
    if (status.ok()) stats_.bytes_read += table_.MemoryBytes(number);
  }
  if (status.ok()) {
    block.state = State::kHere;
    Reorder(number);
    return;
  }
  read_errors_[number] = status;
  Release(number);
}

void ResidentSet::FinishWrite(uint32_t number, const Status& status) {
  Resident& block = blocks_[number];
  writing_.End(clock_.NowSteady());
  block.writing = false;
  Reorder(number);
  if (status.ok()) {
    stats_.bytes_written += table_.MemoryBytes(number);
    block.dirty = false;
    block.written = true;
  } else if (failed_.ok()) {
    failed_ = status;
  }
  const bool leaves = block.leaving && status.ok();
  StopLeaving(number);
  if (!leaves) return;
  Release(number);
  ++stats_.evictions;
}

void ResidentSet::StopLeaving(uint32_t number) {
  Resident& block = blocks_[number];
  if (!block.leaving) return;
  block.leaving = false;
  leaving_bytes_ -= table_.MemoryBytes(number);
}

}  // namespace heddle::offload
