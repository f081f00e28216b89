// Collectives between the ranks of an attempt (training-runtime.md 3.2, 19). Sums are taken in
// ascending order of rank, element by element, so their bits depend on the world size only: not on
// the back end, the network, timing or placement, and an attempt placed elsewhere resumes exactly.
//
// Torch-free interface; back ends live in their own .cc files.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/status/status.h"

namespace heddle::v1 {
class RendezvousReply;
class RendezvousRequest;
}  // namespace heddle::v1

namespace heddle::comm {

// A collective under way. Its buffers are not touched until Wait() returns. Every one that was
// started is waited for once, in any order.
class Pending {
 public:
  virtual ~Pending() = default;
  virtual Status Wait() = 0;
};

// Of a collective that is not of one unit of the model.
inline constexpr int kNoUnit = -1;

// Type of gradients between ranks. They are summed in fp32 either way.
enum class Wire { kFp32, kBf16 };

// Operations from one thread, launched in the same order by all ranks. After any error the group is
// dead: the process is to end (19.5). Errors: UNAVAILABLE, a peer is gone or the deadline passed.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;
  // Name for logs: "solo", "gloo", "mpi", "nccl".
  virtual std::string backend() const = 0;

  // values = sum over ranks, fp32 accumulation. All ranks pass the same size. `unit` names in
  // reports what is summed; kNoUnit: more than one unit.
  virtual Status AllReduceSum(std::span<float> values, int unit) = 0;
  // For the few numbers that ranks agree on in a step: one round of messages.
  virtual Status AllReduceSum(std::span<double> values) = 0;

  // all = every rank's `mine` in order of rank: world_size() x mine.size() bytes. `mine` may be its
  // own place in `all`. `unit` names what is gathered in reports.
  virtual StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                            std::span<std::byte> all, int unit) = 0;
  // sum[i] = sum over ranks of their all[rank() * sum.size() + i], fp32 accumulation;
  // all.size() = world_size() * sum.size(). kBf16 rounds every rank's share once, its own too.
  virtual StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float> all,
                                                                   std::span<float> sum, Wire wire,
                                                                   int unit) = 0;
  // Slice r of `sent`, of sent_bytes[r] bytes, goes to rank r; `received` becomes what every rank
  // sent to this one, received_bytes[r] from rank r. Slices lie end to end in order of rank, this
  // rank's own among them; `sent` and `received` do not overlap. Sizes are one per rank, any may be
  // zero, and ranks that move nothing call it too; both are copied before it returns. The sizes
  // have been agreed on before, e.g. by an all-gather of counts: where a rank sent another size
  // than this one expects, Wait() is INTERNAL and names the rank and both. INVALID_ARGUMENT: sizes
  // do not add up to the spans. For experts on several ranks.
  virtual StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                           std::span<const size_t> sent_bytes,
                                                           std::span<std::byte> received,
                                                           std::span<const size_t> received_bytes,
                                                           int unit) = 0;

  // A hash of all collectives that were launched so far, in their order and with their units: equal
  // on ranks that did the same. Back ends cannot tell messages of one size apart; ranks that agree
  // on this number can. 0: nobody counts.
  virtual uint64_t Launched() const { return 0; }

  // From now on waits end by this deadline; the default is the one given at creation.
  virtual void SetTimeout(std::chrono::milliseconds timeout) = 0;
  // Any thread: later calls fail at once and, where the back end can, the one that waits ends.
  virtual void Abort() = 0;
};

// Sends one request of the rendezvous store to the coordinator and waits for the answer, at most
// the request's timeout_ms plus a grace of its own. Must be callable from any thread.
using RendezvousCall =
    std::function<StatusOr<heddle::v1::RendezvousReply>(const heddle::v1::RendezvousRequest&)>;

struct GroupOptions {
  int rank = 0;
  int world_size = 1;
  int local_rank = 0;  // its place among the ranks of its task, which start with rank - local_rank
  // Address of this rank's interface, numeric; never a host name, which Debian maps to 127.0.1.1
  // (control-plane B1).
  std::string data_address;
  // Keys of the store start with it, e.g. a secret of the attempt and the group's name.
  std::string key_prefix;
  RendezvousCall rendezvous;
  // Folder for files of the back end, which are gone when the group is; empty: the system's.
  std::string scratch;
  std::chrono::milliseconds init_timeout{300'000};
  std::chrono::milliseconds step_timeout{120'000};
};

// World of one: no sockets, no waiting.
std::unique_ptr<Communicator> MakeSolo();

// Connects all pairs over TCP. INVALID_ARGUMENT: bad rank, world size or address. UNAVAILABLE:
// peers did not come in time. Blocks until every rank is there.
StatusOr<std::unique_ptr<Communicator>> ConnectGloo(const GroupOptions& options);

// OpenMPI through the plug-in libheddle_mpi.so beside the binary, without mpirun (mpi/README.md);
// once in a process. UNIMPLEMENTED where the plug-in, OpenMPI or PMIx is missing.
StatusOr<std::unique_ptr<Communicator>> ConnectMpi(const GroupOptions& options);

// NCCL through the plug-in libheddle_cuda.so beside the binary, one device per rank. UNIMPLEMENTED
// where there is no plug-in, FAILED_PRECONDITION where it finds no device.
StatusOr<std::unique_ptr<Communicator>> ConnectNccl(const GroupOptions& options);
// The plug-in loads and there is a device.
bool NcclUsable();

}  // namespace heddle::comm
