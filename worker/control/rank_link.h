// A trainer's end of the control link: frames over the socket the shim gave it. One thread of its
// own reads and writes, so no call here blocks on the network except the Wait* and request calls,
// which have deadlines. All methods are thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/status/status.h"
#include "heddle/v1/control.pb.h"

namespace heddle::v1 {
class DamageReport;
}

namespace heddle::control {

class RankLink {
 public:
  // Run on the link's thread: return quickly, never call Wait* or a request from one.
  struct Handlers {
    std::function<void(const v1::StopRank&)> on_stop;
    // Every CheckpointReply that no request of this rank waits for (request 0: COMMITTED of a step
    // whose last seal another rank sent, or FENCED).
    std::function<void(const v1::CheckpointReply&)> on_checkpoint;
    // The shim is gone or sent nonsense: the process should leave (PDEATHSIG usually wins).
    std::function<void(const Status&)> on_lost;
  };
  struct Identity {
    uint64_t fence = 0;
    uint32_t rank = 0;
  };

  // Reads HEDDLE_CONTROL=fd:N, HEDDLE_FENCE, HEDDLE_RANK. FAILED_PRECONDITION outside a shim.
  static StatusOr<std::unique_ptr<RankLink>> FromEnvironment(Handlers handlers);
  // Takes the connected stream socket `fd`.
  static StatusOr<std::unique_ptr<RankLink>> Adopt(int fd, Identity identity, Handlers handlers);
  // Gives queued frames 1 s to leave, then joins the thread.
  ~RankLink();
  RankLink(const RankLink&) = delete;
  RankLink& operator=(const RankLink&) = delete;

  uint64_t fence() const;
  uint32_t rank() const;

  // Launch, in this order: Hello -> WaitForSpec -> Ready -> WaitForStart -> Joined.
  Status Hello(const v1::RankHello& hello);
  StatusOr<v1::RankSpec> WaitForSpec(std::chrono::milliseconds timeout);
  Status Ready(const v1::RankReady& ready);
  StatusOr<v1::StartRank> WaitForStart(std::chrono::milliseconds timeout);
  Status Joined(const v1::RankJoined& joined);

  // Queues and returns; beyond 1,024 queued progress frames the oldest is dropped and counted.
  Status Progress(const v1::RankProgress& progress);
  uint64_t progress_dropped() const;
  Status Damage(const v1::DamageReport& damage);
  // Last words; returns when they left this process or after 1 s.
  Status Exit(const v1::RankExit& exit);

  // Requests. `request` (or `n` when 0) is filled in here; a repeat after UNAVAILABLE is sent with
  // the same number until `timeout`: DEADLINE_EXCEEDED; so is the next call for the same step.
  // UNAVAILABLE: the link is lost. Calls of several threads may overlap. Verdicts FENCED and
  // REFUSED are replies, not errors.
  StatusOr<v1::CheckpointReply> OpenCheckpoint(v1::OpenCheckpoint open,
                                               std::chrono::milliseconds timeout);
  // Returns with OK (counted, more ranks to come), COMMITTED (this was the last), FENCED, REFUSED.
  StatusOr<v1::CheckpointReply> SealShard(v1::SealShard seal, std::chrono::milliseconds timeout);
  // Waits until step `step` is decided: COMMITTED, FENCED or REFUSED, whoever sealed last.
  StatusOr<v1::CheckpointReply> WaitForCommit(uint64_t step, std::chrono::milliseconds timeout);
  // request.timeout_ms bounds the server's wait; set it below `timeout`.
  StatusOr<v1::RendezvousReply> Rendezvous(v1::RendezvousRequest request,
                                           std::chrono::milliseconds timeout);

  // The newest STOP, if one came.
  bool StopRequested() const;

 private:
  class Impl;
  explicit RankLink(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace heddle::control
