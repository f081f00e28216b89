// Frames on their way to the daemon. Reliable ones stay until the daemon acknowledges them and are
// sent again to the next daemon. Progress stays in a bounded ring, also after it was sent: a daemon
// that died may not have passed it on, and the coordinator drops repeats (X4, O3).
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <string>

#include "worker/control/control_frame.h"

namespace heddle::shim {

class Outbox {
 public:
  void Add(const control::Frame& frame);

  // A daemon came: everything kept is due again, numbered from 1.
  void Attach();
  // The daemon went: what was sent to it and not acknowledged stays.
  void Detach();
  // The next frame to send, encoded; empty if none is due.
  std::string Next();
  // Number `number` of this connection is dealt with. Unknown numbers and sticky frames are left.
  void Acknowledge(uint64_t number);

  bool Drained() const { return next_ == entries_.end(); }
  uint64_t kept() const { return kept_; }
  size_t kept_bytes() const { return kept_bytes_; }
  // Frames that no daemon ever got.
  uint64_t progress_dropped() const { return progress_dropped_; }
  // Every kept frame, encoded, in order.
  std::string Replay() const;

 private:
  struct Entry {
    std::string bytes;
    control::FrameType type;
    uint32_t rank;
    uint64_t number = 0;  // of this connection
    bool sent = false;    // at least once
  };
  using Entries = std::list<Entry>;

  void Erase(Entries::iterator entry);
  void DropOldestProgress();

  Entries entries_;
  Entries::iterator next_ = entries_.end();  // first one not yet sent on this connection
  std::map<uint64_t, Entries::iterator> sent_;
  uint64_t last_number_ = 0;
  uint64_t kept_ = 0;
  size_t kept_bytes_ = 0;
  size_t progress_ = 0;
  size_t progress_bytes_ = 0;
  uint64_t progress_dropped_ = 0;
};

}  // namespace heddle::shim
