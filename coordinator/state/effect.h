// What the runtime does after the batch of an Outcome is durable, in order (P8). Every effect is
// idempotent and carries its fence (P10): repeating one, or losing one with a broken stream, is
// harmless; registration (X2) and the resend timer bring it again. An effect for a worker goes to
// its current session's stream and is dropped if there is none.
#pragma once

#include <cstdint>
#include <string>
#include <variant>

#include "base/ids/ids.h"
#include "coordinator/state/event.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::state {
namespace effect {

// ---- messages to a worker (bodies of CoordMsg) ----
struct SendAssign {
  std::string worker;
  heddle::v1::TaskAssignment assign;
};
struct SendStart {
  std::string worker;
  heddle::v1::StartTask start;
};
struct SendStop {
  std::string worker;
  heddle::v1::StopTask stop;
};
struct SendKillFenced {
  std::string worker;
  heddle::v1::KillFenced kill;
};
struct SendForget {
  std::string worker;
  heddle::v1::ForgetTask forget;
};
struct SendAck {
  std::string worker;
  heddle::v1::ReportAck ack;
};
struct SendCheckpointReply {
  std::string worker;
  heddle::v1::RankCheckpointReply reply;
};
// The worker answers with StacksReported. Asked once per finding; a lost one costs evidence only.
struct CollectStacks {
  std::string worker;
  heddle::v1::CollectStacks collect;
};
// To that session only; then close its stream.
struct SendStale {
  std::string worker;
  uint64_t session = 0;
  std::string reason;
};

// ---- inside the coordinator ----
// Queue, nodes or allocations changed: run a scheduling pass soon (debounced, S11).
struct WakeScheduler {};
// The attempt ended or was fenced: its rendezvous keys and waiters go (V2, V3).
struct DropRendezvous {
  Fence fence;
};
// Remove the folder of a checkpoint, then post CheckpointFilesDeleted. Asked again later if that
// does not arrive.
struct DeleteCheckpointFiles {
  CheckpointKey key;
  std::string dir;
};
// Write the MANIFEST copy beside a committed checkpoint (L2). Best effort.
struct WriteManifest {
  heddle::v1::CheckpointRecord record;
};
// Re-read the files in the background, compare digests, post CheckpointVerified.
struct VerifyCheckpoint {
  heddle::v1::CheckpointRecord record;
};

}  // namespace effect

using Effect = std::variant<effect::SendAssign, effect::SendStart, effect::SendStop,
                            effect::SendKillFenced, effect::SendForget, effect::SendAck,
                            effect::SendCheckpointReply, effect::SendStale, effect::WakeScheduler,
                            effect::DropRendezvous, effect::DeleteCheckpointFiles,
                            effect::WriteManifest, effect::VerifyCheckpoint, effect::CollectStacks>;

// "SendAssign", for logs and traces.
const char* EffectName(const Effect& effect);

}  // namespace heddle::state
