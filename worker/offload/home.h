// Where blocks are while they are not in the resident set: files of a disk (spill_file.h) or a host
// arena (arena.h). The resident set starts transfers and collects their ends.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::offload {

// One block on its way. `data` has the block's memory bytes, begins on a page, and stays untouched
// (read) or unchanged (write) until the transfer is done.
struct Transfer {
  bool write = false;
  uint32_t block = 0;
  std::byte* data = nullptr;
};

struct TransferEnd {
  Transfer transfer;
  Status status;
};

// Begin and Wait belong to one thread, the owner; Wake is for any thread.
class Home {
 public:
  virtual ~Home() = default;
  // Starts a transfer; its end comes out of Wait, errors too. One transfer of a block at a time.
  // REQUIRES, to read: the block was written before.
  virtual void Begin(const Transfer& transfer) = 0;
  // Appends ends; blocks until there is one, or until Wake. May return without any.
  virtual void Wait(std::vector<TransferEnd>& ends) = 0;
  // The Wait of now, or the next one, returns.
  virtual void Wake() = 0;
  // One line for people: what it is, how large, what to know about it.
  virtual std::string Describe() const = 0;
};

}  // namespace heddle::offload
