// The home of blocks in host memory, for a worker without a spill folder: the resident set copies
// to and from it as a GPU's ring of slots does.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "worker/offload/blocks.h"
#include "worker/offload/home.h"

namespace heddle::offload {

// Begin copies in the owner's thread. The memory of a block counts against the process from its
// first write on, beside the budget of the resident set.
class Arena : public Home {
 public:
  // Of these memory nodes (base/numa), or without any as the system likes. RESOURCE_EXHAUSTED with
  // the bytes needed if the address range is refused.
  static StatusOr<std::unique_ptr<Arena>> Create(const BlockTable& table,
                                                 const std::vector<int>& nodes = {});
  ~Arena() override;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void Begin(const Transfer& transfer) override;
  void Wait(std::vector<TransferEnd>& ends) override;
  void Wake() override;
  std::string Describe() const override;

 private:
  Arena(std::byte* base, const BlockTable& table, std::vector<int64_t> offsets, int64_t bytes)
      : base_(base), table_(table), offsets_(std::move(offsets)), bytes_(bytes) {}

  std::byte* const base_;
  const BlockTable table_;
  const std::vector<int64_t> offsets_;  // by block
  const int64_t bytes_;
  std::vector<TransferEnd> ends_;  // the owner's
  std::mutex mutex_;               // guards woken_
  std::condition_variable wake_;
  bool woken_ = false;
};

}  // namespace heddle::offload
