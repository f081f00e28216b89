// How the experts of a layer are reached where not all of them simply lie in this rank's memory.
// Interfaces that worker/shard and worker/offload implement and model/moe calls. Torch-free.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "base/status/status.h"

namespace heddle::layers {

// Rows on their way. Every one that was started is waited for once; its buffers are not touched
// until then.
class PendingRows {
 public:
  virtual ~PendingRows() = default;
  // UNAVAILABLE: a peer is gone.
  virtual Status Wait() = 0;
};

// Rows between the ranks that together have all experts of a layer: rank r of ranks() has the r-th
// equal range of them (training-runtime.md section 10). All of them call it equally often, in the
// same order, whether they have rows or not.
class RowExchange {
 public:
  virtual ~RowExchange() = default;
  virtual int ranks() const = 0;
  // `layer` says in reports whose rows they are.
  // Slice r of `sent`, sent_bytes[r] long, goes to rank r; `received` gets the slices for this
  // rank, end to end in order of rank, received_bytes[r] long. Sizes are copied before it returns.
  // UNAVAILABLE: a peer is gone.
  virtual StatusOr<std::unique_ptr<PendingRows>> StartAllToAll(
      int layer, std::span<const std::byte> sent, std::span<const size_t> sent_bytes,
      std::span<std::byte> received, std::span<const size_t> received_bytes) = 0;
};

// Memory of experts that comes and goes (training-runtime.md section 12). Experts are counted from
// the first that this rank has. One thread; one layer is under way at a time.
class ExpertMemory {
 public:
  enum class Use {
    kForward,  // weights are read
    kBackward  // weights are read, gradients are added to
  };
  virtual ~ExpertMemory() = default;
  // `experts` of `layer` are used next, each once, in the order that is returned: those that are
  // there come first, so that several visits of a layer share what was brought. No bit depends on
  // it: experts do not know of each other.
  virtual StatusOr<std::vector<int>> Begin(int layer, std::span<const int> experts, Use use) = 0;
  // How many of the next ones have their memory now, at least one. Waits for them.
  virtual StatusOr<size_t> Next() = 0;
  // Those that Next() gave last are done with.
  virtual Status End() = 0;
};

struct ExpertAccess {
  RowExchange* exchange = nullptr;  // null: this rank has all experts
  ExpertMemory* memory = nullptr;   // null: their memory is always there
};

}  // namespace heddle::layers
