// What the trainer asks of the daemon's end: the order of a rank's life and the few calls of a
// save. The trainer is written against this interface; `link_control.h` speaks it over the control
// socket, tests have their own. Source: control-plane section 9-11, control.proto.
#pragma once

#include <cstdint>
#include <optional>

#include "base/status/status.h"
#include "heddle/v1/control.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::control {
class RankPage;
}

namespace heddle::trainer {

// What a rank does, in its progress word. Numbers are part of the page's format; words for them
// stand in base/rank_words/words.def.
enum class Phase : uint32_t {
  kStarting = 0,
  kRestoring = 1,
  kData = 2,
  kForward = 3,
  kReduce = 4,
  kUpdate = 5,
  kSave = 6,
  kEvaluate = 7,
  kLeaving = 8,
  kBackward = 9,
};

// Thread-safe. UNAVAILABLE from any call: the link is gone, the process is to end.
class RankControl {
 public:
  virtual ~RankControl() = default;

  // The rank's start, in this order; each waits for the other end.
  virtual StatusOr<heddle::v1::RankSpec> Hello(const heddle::v1::RankHello& hello) = 0;
  virtual StatusOr<heddle::v1::StartRank> Ready(const heddle::v1::RankReady& ready) = 0;
  virtual Status Joined(const heddle::v1::RankJoined& joined) = 0;

  // Waits for the answer, at most a little longer than the request's timeout_ms.
  virtual StatusOr<heddle::v1::RendezvousReply> Rendezvous(
      const heddle::v1::RendezvousRequest& request) = 0;

  // Never waits; the oldest points are dropped where the other end is slow.
  virtual void Report(const heddle::v1::RankProgress& progress) = 0;
  virtual void ReportDamage(const heddle::v1::DamageReport& damage) = 0;

  // Wait for the verdict. DEADLINE_EXCEEDED: none came yet, ask again with the same step.
  virtual StatusOr<heddle::v1::CheckpointReply> Open(heddle::v1::OpenCheckpoint open) = 0;
  virtual StatusOr<heddle::v1::CheckpointReply> Seal(heddle::v1::SealShard seal) = 0;
  // Waits a moment until `step` is decided, whoever sealed last: COMMITTED, FENCED or REFUSED.
  // DEADLINE_EXCEEDED: not yet.
  virtual StatusOr<heddle::v1::CheckpointReply> AwaitCommit(uint64_t step) = 0;

  // The newest stop request, if any came.
  virtual std::optional<heddle::v1::StopRank> StopRequest() = 0;

  // OK while this rank may write under its fence (control-plane L4); UNAVAILABLE without a permit.
  virtual Status WritePermit() = 0;
  // Writes the progress word of the shared page: read by the daemon without this rank's help.
  virtual void NoteProgress(uint64_t step, Phase phase) = 0;
  // ... and the unit of the model that a pass visits; -1: none.
  virtual void NoteUnit(int /*unit*/) {}

  // The page itself, for the ring of collectives; null where there is none. Owned by this object.
  virtual control::RankPage* page() = 0;

  // Last words.
  virtual void Exit(const heddle::v1::RankExit& exit) = 0;
};

}  // namespace heddle::trainer
