#include "worker/offload/spill_file.h"

#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/log/log.h"
#include "base/units/units.h"
#include "worker/offload/arena.h"

namespace heddle::offload {
namespace {

// One system call moves less than 2 GiB.
constexpr int64_t kRequestBytes = kGiB;
constexpr int kRetries = 100;

}  // namespace

StatusOr<std::unique_ptr<Spill>> Spill::Create(const std::string& dir, const BlockTable& table,
                                               std::unique_ptr<Disk> disk) {
  std::unique_ptr<Spill> spill(new Spill(dir, table, std::move(disk)));
  RETURN_IF_ERROR(spill->MakeFiles());
  if (!spill->note_.empty()) {
    HEDDLE_WARN("spill folder", {"spill_dir", dir}, {"note", spill->note_});
  }
  return spill;
}

Status Spill::MakeFiles() {
  std::array<int64_t, kKinds> ends = {};
  places_.resize(table_.size());
  for (uint32_t block = 0; block < table_.size(); ++block) {
    const auto file = static_cast<size_t>(table_.At(block).kind);
    places_[block] = {.file = file, .offset = ends[file]};
    ends[file] += table_.MemoryBytes(block);
  }
  for (const int64_t end : ends) bytes_ += end;
  for (size_t kind = 0; kind < kKinds; ++kind) {
    if (ends[kind] == 0) continue;
    ASSIGN_OR_RETURN(files_[kind], OpenSpillFile(dir_));
  }
  RETURN_IF_ERROR(CheckOnDisk(dir_));
  RETURN_IF_ERROR(CheckFreeBytes(dir_, bytes_));
  for (size_t kind = 0; kind < kKinds; ++kind) {
    if (ends[kind] == 0) continue;
    ASSIGN_OR_RETURN(const bool allocated, AllocateSpillFile(files_[kind], dir_, ends[kind]));
    allocated_ = allocated_ && allocated;
  }
  note_ = FileSystemNote(dir_);
  return OkStatus();
}

void Spill::Begin(const Transfer& transfer) {
  if (transfer.write) {
    places_[transfer.block].checksum =
        XXH3_64bits(transfer.data, static_cast<size_t>(table_.Bytes(transfer.block)));
  }
  const auto idle = std::ranges::find(operations_, false, &Operation::busy);
  const auto number = static_cast<size_t>(idle - operations_.begin());
  if (idle == operations_.end()) operations_.emplace_back();
  operations_[number] = {.transfer = transfer, .busy = true};
  Submit(number);
}

void Spill::Submit(size_t number) {
  const Operation& operation = operations_[number];
  const Place& place = places_[operation.transfer.block];
  const int64_t left = table_.MemoryBytes(operation.transfer.block) - operation.moved;
  disk_->Submit({.write = operation.transfer.write,
                 .fd = files_[place.file].value,
                 .data = operation.transfer.data + operation.moved,
                 .bytes = std::min(left, kRequestBytes),
                 .offset = place.offset + operation.moved,
                 .tag = number});
}

void Spill::Wait(std::vector<TransferEnd>& ends) {
  replies_.clear();
  disk_->Wait(replies_);
  for (const DiskReply& reply : replies_) {
    std::optional<Status> status = Continue(reply.tag, reply.result);
    if (!status) {
      Submit(reply.tag);
      continue;
    }
    Operation& operation = operations_[reply.tag];
    operation.busy = false;
    ends.push_back({operation.transfer, *std::move(status)});
  }
}

std::optional<Status> Spill::Continue(size_t number, int64_t result) {
  Operation& operation = operations_[number];
  const Transfer& transfer = operation.transfer;
  const bool passes = result == -EAGAIN || result == -EINTR;
  if (passes && ++operation.retries <= kRetries) return std::nullopt;
  if (result < 0) return FromErrno(What(transfer), dir_, static_cast<int>(-result));
  const int64_t bytes = table_.MemoryBytes(transfer.block);
  // O_DIRECT goes on from a whole page only.
  const int64_t moved = (operation.moved + result) / kPageBytes * kPageBytes;
  if (moved >= bytes) return transfer.write ? OkStatus() : Verify(transfer);
  if (moved > operation.moved) {
    operation.moved = moved;
    return std::nullopt;
  }
  if (transfer.write) return FromErrno(What(transfer), dir_, ENOSPC);
  return DataLoss(Str(What(transfer), " ", dir_, ": the file ends after ", operation.moved + result,
                      " of ", bytes,
                      " bytes: something outside shortened it; restart from the last checkpoint"));
}

Status Spill::Verify(const Transfer& transfer) const {
  const uint64_t written = places_[transfer.block].checksum;
  const uint64_t read =
      XXH3_64bits(transfer.data, static_cast<size_t>(table_.Bytes(transfer.block)));
  if (read == written) return OkStatus();
  return DataLoss(Str(What(transfer), " ", dir_, ": XXH3 ", read, ", was written with ", written,
                      ": the disk gave back other bytes; check it, name another spill_dir, and "
                      "restart from the last checkpoint"));
}

std::string Spill::What(const Transfer& transfer) const {
  return Str(transfer.write ? "spill: write of the " : "spill: read of the ",
             table_.At(transfer.block), " at file offset ", places_[transfer.block].offset, " in");
}

std::string Spill::Describe() const {
  bool direct = true;
  for (const SpillFd& file : files_) direct = direct && (file.value < 0 || file.direct);
  std::string text = Str("spill files of ", ApproximateBytes(bytes_), " in ", dir_, " (",
                         disk_->Name(), direct ? ", O_DIRECT" : ", buffered: no O_DIRECT here");
  if (!allocated_) text += ", not allocated in advance";
  text += ')';
  return note_.empty() ? text : Str(text, ", ", note_);
}

StatusOr<std::unique_ptr<Home>> MakeHome(const std::string& spill_dir, const BlockTable& table,
                                         DiskMethod method, const std::vector<int>& memory_nodes) {
  if (spill_dir.empty()) return Arena::Create(table, memory_nodes);
  ASSIGN_OR_RETURN(std::unique_ptr<Disk> disk, MakeDisk(method));
  return Spill::Create(spill_dir, table, std::move(disk));
}

}  // namespace heddle::offload
