// Saves in the background (training-runtime.md 14.4-14.7): the step loop copies its state, a thread
// writes the files, the coordinator commits. One save is in flight at a time.
//
// All ranks move together. Every step's agreement carries each rank's state of the pending save:
//   staged    copied; rank 0 asks the coordinator for admission, the others wait
//   writing   rank 0's admission reached all ranks: each writes its own files
//   sealed    this rank's files are durable and reported; waits for COMMITTED
//   failed    told to all in the next agreement; then every rank drops the save and counts it
// A coordinator that cannot be reached delays a save, never a step. Without a write permit the
// thread waits and keeps its one snapshot.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/clock/clock.h"
#include "base/status/status.h"
#include "checkpoint/tensor_io/save.h"
#include "heddle/v1/checkpoints.pb.h"
#include "worker/trainer/agreement.h"
#include "worker/trainer/rank_control.h"

namespace heddle::trainer {

struct CheckpointerOptions {
  std::string root;
  std::string attempt_dir;  // relative to root
  uint64_t job = 0;
  uint64_t fence = 0;
  uint32_t rank = 0;
  uint32_t world_size = 1;
  std::string config_hash;
  std::vector<heddle::v1::TensorInfo> tensors;
};

struct CheckpointerStats {
  uint64_t committed = 0;
  uint64_t deferred = 0;  // due saves that were dropped or found an earlier one in flight
  uint64_t last_committed_step = 0;
  double blocked_seconds = 0;  // that staging took from the step loop, in total
  double last_write_seconds = 0;
  uint64_t last_bytes = 0;  // of this rank
};

// Used from the step loop's thread.
class Checkpointer {
 public:
  Checkpointer(RankControl* control, const Clock* clock, CheckpointerOptions options);
  // Drops what is in flight and joins the thread.
  ~Checkpointer();
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  bool busy() const;

  // Copies the state, by `copy`, and starts the save of state.step. A snapshot with values that are
  // not finite, or a disk that has no room for it, fails the save, not the call. REQUIRES: no rank
  // is busy, by the last agreement.
  Status Stage(const std::function<Status(checkpoint::Snapshot*)>& copy,
               const heddle::v1::TrainState& state);

  // This rank's save slots, before the agreement; what follows from the sums, after it.
  void Fill(Agreement* agreement);
  void Apply(const Agreement& sums);

  // A due save that cannot start because one is in flight.
  void CountDeferred();
  CheckpointerStats stats() const;

 private:
  enum class SavePhase { kIdle, kStaged, kApproved, kWriting, kSealed, kFailed };

  // REQUIRES: mutex_ held.
  bool Busy() const { return phase_ != SavePhase::kIdle || handed_over_ || thread_in_save_; }
  void Run();
  Status SaveOnce();
  Status AskAdmission(uint64_t step);
  StatusOr<heddle::v1::SealShard> Write(uint64_t step);
  // Sets sealed_last_.
  Status Seal(const heddle::v1::SealShard& seal);
  Status AwaitCommit(const heddle::v1::SealShard& seal);
  Status CheckVerdict(const heddle::v1::CheckpointReply& reply);
  // Waits for `length` or until the save is dropped; false when dropped.
  bool Sleep(int64_t milliseconds);
  bool Dropped() const;
  void SetPhase(SavePhase phase);

  RankControl* const control_;
  const Clock* const clock_;
  const CheckpointerOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  SavePhase phase_ = SavePhase::kIdle;
  bool drop_ = false;  // all ranks gave the save up
  bool quit_ = false;
  bool fenced_ = false;
  bool handed_over_ = false;  // a staged save that the thread has not taken yet
  bool thread_in_save_ = false;
  bool sealed_last_ = false;  // of the thread: its seal was answered by COMMITTED
  heddle::v1::TrainState state_;
  CheckpointerStats stats_;
  checkpoint::Snapshot snapshot_;  // of the thread while it is in a save, else of the step loop
  std::thread thread_;
};

}  // namespace heddle::trainer
