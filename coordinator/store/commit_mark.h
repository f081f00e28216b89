// The commit mark (control-plane D4): the newest acknowledged commit_seq, in one of two slots of a
// 4 KiB file, written after each sync of the log without an fsync of its own. It survives kill -9,
// is never ahead of the log, and shows at open whether an acknowledged batch vanished.
//
// STORED: two slots of 16 bytes at offsets 0 and 2048: u64 commit_seq, u64 checksum, little-endian.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"

namespace heddle::store {

class CommitMark {
 public:
  // Opens or creates the file. A torn slot counts as absent: the other one holds.
  static StatusOr<CommitMark> Open(const std::string& path);
  CommitMark(CommitMark&& other) noexcept;
  CommitMark& operator=(CommitMark&&) = delete;
  ~CommitMark();

  // 0 in a new file.
  uint64_t seq() const { return seq_; }

  // Overwrites the older slot. REQUIRES: seq >= this->seq(). Not thread-safe. Errors are the
  // caller's to ignore: an old mark detects less, it never alarms falsely.
  Status Write(uint64_t seq);

 private:
  CommitMark(int fd, uint64_t seq, int newest_slot);

  int fd_;
  uint64_t seq_;
  int newest_slot_;
};

}  // namespace heddle::store
