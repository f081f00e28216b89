// A control for one rank's Checkpointer alone: nobody else is there.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/control.pb.h"
#include "worker/trainer/checkpointer.h"

namespace heddle::trainer {

// Answers at once: open is admitted, a seal completes the checkpoint.
class InstantControl : public RankControl {
 public:
  StatusOr<heddle::v1::RankSpec> Hello(const heddle::v1::RankHello&) override {
    return heddle::v1::RankSpec();
  }
  StatusOr<heddle::v1::StartRank> Ready(const heddle::v1::RankReady&) override {
    return heddle::v1::StartRank();
  }
  Status Joined(const heddle::v1::RankJoined&) override { return OkStatus(); }
  StatusOr<heddle::v1::RendezvousReply> Rendezvous(const heddle::v1::RendezvousRequest&) override {
    return heddle::v1::RendezvousReply();
  }
  void Report(const heddle::v1::RankProgress&) override {}
  void ReportDamage(const heddle::v1::DamageReport&) override {}
  StatusOr<heddle::v1::CheckpointReply> Open(heddle::v1::OpenCheckpoint open) override {
    return Reply(open.step(), heddle::v1::CHECKPOINT_VERDICT_OK);
  }
  StatusOr<heddle::v1::CheckpointReply> Seal(heddle::v1::SealShard seal) override {
    ++seals;
    return Reply(seal.step(), seals > seals_before_commit ? heddle::v1::CHECKPOINT_VERDICT_COMMITTED
                                                          : heddle::v1::CHECKPOINT_VERDICT_OK);
  }
  StatusOr<heddle::v1::CheckpointReply> AwaitCommit(uint64_t) override {
    return DeadlineExceeded("not yet");
  }
  std::optional<heddle::v1::StopRank> StopRequest() override { return std::nullopt; }
  Status WritePermit() override { return OkStatus(); }
  void NoteProgress(uint64_t, Phase) override {}
  control::RankPage* page() override { return nullptr; }
  void Exit(const heddle::v1::RankExit&) override {}

  std::atomic<int> seals = 0;
  int seals_before_commit = 0;  // so many seals find another rank's missing

 private:
  static heddle::v1::CheckpointReply Reply(uint64_t step, heddle::v1::CheckpointVerdict verdict) {
    heddle::v1::CheckpointReply reply;
    reply.set_step(step);
    reply.set_verdict(verdict);
    return reply;
  }
};

}  // namespace heddle::trainer
