// The home of blocks on a disk: one file per kind in the spill folder, every block at its own place
// on whole pages, past the page cache where the file system allows it (training-runtime 12.10,
// 12.11). Scratch: the files have no name, so that nothing is left after kill -9, and are never
// synced; after a crash they are built anew from the checkpoint.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "worker/offload/blocks.h"
#include "worker/offload/disk.h"
#include "worker/offload/home.h"
#include "worker/offload/spill_dir.h"

namespace heddle::offload {

// Every block's XXH3-64 is kept in memory when it is written and compared when it is read.
//
// Ends of transfers carry, besides OK:
//   DATA_LOSS           other bytes came back than were written, or EIO: names block and offset
//   RESOURCE_EXHAUSTED  ENOSPC or EDQUOT, for file systems that allocate again at each write
//   others              by errno (ErrnoOf)
class Spill : public Home {
 public:
  // Makes the files and allocates all of their blocks. INVALID_ARGUMENT, FAILED_PRECONDITION,
  // RESOURCE_EXHAUSTED: as spill_dir.h says. Logs a warning for a network file system.
  static StatusOr<std::unique_ptr<Spill>> Create(const std::string& dir, const BlockTable& table,
                                                 std::unique_ptr<Disk> disk);

  void Begin(const Transfer& transfer) override;
  void Wait(std::vector<TransferEnd>& ends) override;
  void Wake() override { disk_->Wake(); }
  std::string Describe() const override;

 private:
  struct Place {
    size_t file = 0;
    int64_t offset = 0;
    uint64_t checksum = 0;
  };
  struct Operation {
    Transfer transfer;
    int64_t moved = 0;
    int retries = 0;
    bool busy = false;
  };
  Spill(std::string dir, const BlockTable& table, std::unique_ptr<Disk> disk)
      : dir_(std::move(dir)), table_(table), disk_(std::move(disk)) {}
  Status MakeFiles();
  void Submit(size_t operation);
  // Nothing while the transfer goes on.
  std::optional<Status> Continue(size_t number, int64_t result);
  Status Verify(const Transfer& transfer) const;
  // "write of the state of slot 3 at file offset 40960".
  std::string What(const Transfer& transfer) const;

  const std::string dir_;
  const BlockTable table_;
  const std::unique_ptr<Disk> disk_;
  std::array<SpillFd, kKinds> files_;
  std::string note_;
  int64_t bytes_ = 0;  // of all files
  bool allocated_ = true;
  std::vector<Place> places_;          // by block
  std::vector<Operation> operations_;  // by tag
  std::vector<DiskReply> replies_;
};

// A Spill in `spill_dir`, or without one an Arena of these memory nodes. Errors: theirs and
// MakeDisk's.
StatusOr<std::unique_ptr<Home>> MakeHome(const std::string& spill_dir, const BlockTable& table,
                                         DiskMethod method,
                                         const std::vector<int>& memory_nodes = {});

}  // namespace heddle::offload
