// What a back end has to be able to do: move bytes between ranks. Sums are made of it in one place
// (MakeOrdered), so that they have the same bits over every back end. For this folder.
#pragma once

#include <chrono>
#include <cstddef>
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
                                                            std::span<std::byte> all) = 0;
  // Both hold one slice per rank, all of one size: slice r of `received` is slice rank() of rank
  // r's `sent`.
  virtual StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                           std::span<std::byte> received) = 0;

  virtual void SetTimeout(std::chrono::milliseconds timeout) = 0;
  // Any thread.
  virtual void Abort() = 0;
};

// Sums as all-to-all of slices, a local sum in ascending order of rank and, for an all-reduce, an
// all-gather of the sums (training-runtime.md 3.2).
std::unique_ptr<Communicator> MakeOrdered(std::unique_ptr<Transport> transport);

// INVALID_ARGUMENT: bad rank or world size, or a data address that is no numeric one.
Status CheckGroupOptions(const GroupOptions& options);

// Proves the group before the attempt counts as joined: every rank's number must be there, twice,
// so that every pair has spoken when the second round ends. Sets options.step_timeout.
StatusOr<std::unique_ptr<Communicator>> Proven(std::unique_ptr<Communicator> group,
                                               const GroupOptions& options);

}  // namespace heddle::comm
