#include "worker/trainer/checkpointer.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

#include "base/log/log.h"
#include "base/status/errno_of.h"
#include "checkpoint/catalog/coverage.h"

namespace heddle::trainer {

namespace {

using heddle::v1::CheckpointReply;

constexpr int64_t kRetryMs = 200;
constexpr int64_t kPermitPollMs = 50;
// A sealed rank that hears of no commit asks by its seal, less and less often.
constexpr int64_t kAskAgainNs = 2'000'000'000;
constexpr int64_t kAskAgainNsMax = 60'000'000'000;

double Seconds(int64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

}  // namespace

Checkpointer::Checkpointer(RankControl* control, const Clock* clock, CheckpointerOptions options)
    : control_(control), clock_(clock), options_(std::move(options)), thread_([this] { Run(); }) {}

Checkpointer::~Checkpointer() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    quit_ = true;
    drop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

bool Checkpointer::busy() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return Busy();
}

bool Checkpointer::Dropped() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return drop_;
}

void Checkpointer::SetPhase(SavePhase phase) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!drop_) {
      phase_ = phase;
    }
  }
  changed_.notify_all();
}

bool Checkpointer::Sleep(int64_t milliseconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                            [this] { return drop_; });
}

CheckpointerStats Checkpointer::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void Checkpointer::CountDeferred() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++stats_.deferred;
}

Status Checkpointer::Stage(const std::function<Status(checkpoint::Snapshot*)>& copy,
                           const heddle::v1::TrainState& state) {
  HEDDLE_CHECK(!busy(), "a save is in flight");
  const int64_t begin = clock_->NowSteady();
  const Status copied = copy(&snapshot_);
  const int error = ErrnoOf(copied);
  if (error == ENOSPC || error == EDQUOT) {  // training goes on, the next save may find room
    HEDDLE_WARN("checkpoint not saved", {"step", state.step()}, {"why", Message(copied)});
    const std::lock_guard<std::mutex> lock(mutex_);
    state_ = state;
    drop_ = false;
    phase_ = SavePhase::kFailed;  // told to all in the next agreement
    return OkStatus();
  }
  RETURN_IF_ERROR(copied);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_.blocked_seconds += Seconds(clock_->NowSteady() - begin);
    state_ = state;
    drop_ = false;
    phase_ = SavePhase::kStaged;
    handed_over_ = true;
  }
  changed_.notify_all();
  return OkStatus();
}

void Checkpointer::Fill(Agreement* agreement) {
  const std::lock_guard<std::mutex> lock(mutex_);
  (*agreement)[Slot::kSaveBusy] = Busy() ? 1 : 0;
  (*agreement)[Slot::kSaveFailed] = phase_ == SavePhase::kFailed ? 1 : 0;
  (*agreement)[Slot::kSaveApproved] = phase_ == SavePhase::kApproved ? 1 : 0;
  (*agreement)[Slot::kFenced] = fenced_ ? 1 : 0;
}

void Checkpointer::Apply(const Agreement& sums) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (phase_ == SavePhase::kIdle) {
      return;
    }
    if (sums.Any(Slot::kSaveFailed)) {
      drop_ = true;
      phase_ = SavePhase::kIdle;
      ++stats_.deferred;
    } else if (sums.Any(Slot::kSaveApproved) &&
               (phase_ == SavePhase::kStaged || phase_ == SavePhase::kApproved)) {
      phase_ = SavePhase::kWriting;
    }
  }
  changed_.notify_all();
}

void Checkpointer::Run() {
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      // Not the phase: all ranks may have agreed to write before this thread woke up.
      changed_.wait(lock, [this] { return quit_ || handed_over_; });
      if (quit_) {
        return;
      }
      handed_over_ = false;
      thread_in_save_ = true;
    }
    const Status saved = SaveOnce();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      thread_in_save_ = false;
      if (saved.ok()) {
        phase_ = SavePhase::kIdle;
        ++stats_.committed;
        stats_.last_committed_step = std::max(stats_.last_committed_step, state_.step());
      } else {
        // A failure of this rank is told to all in the next agreement.
        phase_ = drop_ ? SavePhase::kIdle : SavePhase::kFailed;
      }
    }
    if (!saved.ok() && saved.code() != StatusCode::kCancelled) {
      HEDDLE_WARN("checkpoint not saved", {"step", state_.step()}, {"why", Message(saved)});
    }
    changed_.notify_all();
  }
}

Status Checkpointer::SaveOnce() {
  const uint64_t step = state_.step();
  if (Dropped()) {
    return Cancelled("dropped by all ranks");
  }
  if (snapshot_.non_finite() > 0) {
    return FailedPrecondition(Str(snapshot_.non_finite(), " values are not finite, the first in ",
                                  snapshot_.first_non_finite()));
  }
  if (options_.rank == 0) {
    RETURN_IF_ERROR(AskAdmission(step));
  }
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return drop_ || phase_ == SavePhase::kWriting; });
    if (drop_) {
      return Cancelled("dropped by all ranks");
    }
  }
  ASSIGN_OR_RETURN(const heddle::v1::SealShard seal, Write(step));
  sealed_last_ = false;
  RETURN_IF_ERROR(Seal(seal));
  SetPhase(SavePhase::kSealed);
  return sealed_last_ ? OkStatus() : AwaitCommit(seal);
}

Status Checkpointer::CheckVerdict(const CheckpointReply& reply) {
  if (reply.verdict() == heddle::v1::CHECKPOINT_VERDICT_FENCED) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fenced_ = true;
    return Aborted(Str("fenced by ", reply.current_fence()));
  }
  if (reply.verdict() == heddle::v1::CHECKPOINT_VERDICT_REFUSED) {
    return FailedPrecondition(Str("refused: ", reply.detail()));
  }
  return OkStatus();
}

Status Checkpointer::AskAdmission(uint64_t step) {
  while (true) {
    heddle::v1::OpenCheckpoint open;
    open.set_step(step);
    open.set_bytes_expected(snapshot_.bytes() * options_.world_size);
    const StatusOr<CheckpointReply> reply = control_->Open(open);
    if (reply.ok()) {
      RETURN_IF_ERROR(CheckVerdict(*reply));
      if (reply->verdict() == heddle::v1::CHECKPOINT_VERDICT_OK) {
        SetPhase(SavePhase::kApproved);
        return OkStatus();
      }
    } else if (reply.status().code() != StatusCode::kDeadlineExceeded) {
      return reply.status();
    }
    if (!Sleep(kRetryMs)) {
      return Cancelled("dropped by all ranks");
    }
  }
}

StatusOr<heddle::v1::SealShard> Checkpointer::Write(uint64_t step) {
  const int64_t begin = clock_->NowSteady();
  checkpoint::ShardWriterOptions writer;
  writer.root = options_.root;
  writer.dir = checkpoint::StepDir(options_.attempt_dir, step);
  writer.header.set_job(options_.job);
  writer.header.set_fence(options_.fence);
  writer.header.set_step(step);
  writer.header.set_rank(options_.rank);
  writer.header.set_world_size(options_.world_size);
  writer.header.set_config_hash(options_.config_hash);
  writer.permit = [this]() -> Status {
    while (!control_->WritePermit().ok()) {
      if (!Sleep(kPermitPollMs)) {
        return Cancelled("dropped by all ranks");
      }
    }
    return Dropped() ? Cancelled("dropped by all ranks") : OkStatus();
  };
  ASSIGN_OR_RETURN(const std::vector<heddle::v1::ShardFile> files, snapshot_.Write(writer));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_.last_write_seconds = Seconds(clock_->NowSteady() - begin);
    stats_.last_bytes = snapshot_.bytes();
  }
  heddle::v1::SealShard seal;
  seal.set_step(step);
  seal.set_rank(options_.rank);
  for (const heddle::v1::ShardFile& file : files) {
    *seal.add_files() = file;
  }
  if (options_.rank == 0) {
    for (const heddle::v1::TensorInfo& tensor : options_.tensors) {
      *seal.add_tensors() = tensor;
    }
    *seal.mutable_train_state() = state_;
  }
  return seal;
}

Status Checkpointer::Seal(const heddle::v1::SealShard& seal) {
  while (true) {
    const StatusOr<CheckpointReply> reply = control_->Seal(seal);
    if (reply.ok()) {
      RETURN_IF_ERROR(CheckVerdict(*reply));
      if (reply->verdict() == heddle::v1::CHECKPOINT_VERDICT_COMMITTED) {
        sealed_last_ = true;
      }
      if (reply->verdict() != heddle::v1::CHECKPOINT_VERDICT_UNAVAILABLE) {
        return OkStatus();
      }
    } else if (reply.status().code() != StatusCode::kDeadlineExceeded) {
      return reply.status();
    }
    if (!Sleep(kRetryMs)) {
      return Cancelled("dropped by all ranks");
    }
  }
}

// The news of a commit goes out once: a coordinator that dies with it, or a stream that breaks,
// takes it along. A seal may be repeated and is answered by what became of it.
Status Checkpointer::AwaitCommit(const heddle::v1::SealShard& seal) {
  int64_t pause_ns = kAskAgainNs;
  int64_t ask_at_ns = clock_->NowSteady() + pause_ns;
  while (!Dropped()) {
    const StatusOr<CheckpointReply> reply = control_->AwaitCommit(seal.step());
    if (reply.ok()) {
      RETURN_IF_ERROR(CheckVerdict(*reply));
      if (reply->verdict() == heddle::v1::CHECKPOINT_VERDICT_COMMITTED) {
        return OkStatus();
      }
    } else if (reply.status().code() != StatusCode::kDeadlineExceeded) {
      return reply.status();
    }
    if (clock_->NowSteady() < ask_at_ns) {
      continue;
    }
    RETURN_IF_ERROR(Seal(seal));
    if (sealed_last_) {
      return OkStatus();
    }
    pause_ns = std::min(2 * pause_ns, kAskAgainNsMax);
    ask_at_ns = clock_->NowSteady() + pause_ns;
  }
  return Cancelled("dropped by all ranks");
}

}  // namespace heddle::trainer
