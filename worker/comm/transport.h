// What a back end has to be able to do: move bytes between ranks. Sums are made of it in one place
// (MakeOrdered), so that they have the same bits over every back end. For this folder.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/status/status.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {

// Threads, order, errors and buffers as in Communicator.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;
  virtual std::string backend() const = 0;

  // As Communicator::StartAllGather.
  virtual StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                            std::span<std::byte> all, int unit) = 0;
  // As Communicator::StartAllToAll, with sizes that add up. Without sizes, which all ranks leave
  // away together, slices are of one size. Ranks whose sizes disagree get an error or a slice
  // of another size, at the latest at the deadline; MakeOrdered finds that out, unless
  // ChecksSizes().
  virtual StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                           std::span<const size_t> sent_bytes,
                                                           std::span<std::byte> received,
                                                           std::span<const size_t> received_bytes,
                                                           int unit) = 0;
  // StartAllToAll itself refuses sizes that disagree.
  virtual bool ChecksSizes() const { return false; }

  virtual void SetTimeout(std::chrono::milliseconds timeout) = 0;
  // Any thread.
  virtual void Abort() = 0;
};

// Sums as all-to-all of slices, a local sum in ascending order of rank and, for an all-reduce, an
// all-gather of the sums (training-runtime.md 3.2).
std::unique_ptr<Communicator> MakeOrdered(std::unique_ptr<Transport> transport);

// What a rank gives to an all-to-all adds up. INVALID_ARGUMENT: not one size per rank, or sizes
// that are not those of the bytes.
Status CheckSlices(int world_size, size_t sent, std::span<const size_t> sent_bytes, size_t received,
                   std::span<const size_t> received_bytes);
// For all-to-alls whose ranks disagree: INTERNAL, naming both.
Status SizeMismatch(int rank, int peer, uint64_t sent, uint64_t expected);

// INVALID_ARGUMENT: bad rank or world size, or a data address that is no numeric one.
Status CheckGroupOptions(const GroupOptions& options);

// Proves the group before the attempt counts as joined: every rank's number must be there, twice,
// so that every pair has spoken when the second round ends. Sets options.step_timeout.
StatusOr<std::unique_ptr<Communicator>> Proven(std::unique_ptr<Communicator> group,
                                               const GroupOptions& options);

}  // namespace heddle::comm
