#include "tests/simulation/gang.h"

#include <algorithm>

#include "coordinator/state/names.h"

namespace heddle::simulation {

namespace v1 = heddle::v1;

namespace {

// Rank's part of a checkpoint with one tensor, cut evenly: exact coverage in its smallest form.
v1::SealShard MakeSeal(uint64_t step, uint32_t rank, uint32_t world_size) {
  v1::SealShard seal;
  seal.set_request(step * 1000 + rank + 1);
  seal.set_step(step);
  seal.set_rank(rank);
  v1::ShardFile& file = *seal.add_files();
  file.set_name(Str("rank-", rank, "-0.sst"));
  file.set_bytes(100);
  file.set_digest(std::string(16, static_cast<char>('a' + rank % 16)));
  file.set_entries(1);
  v1::ElementRange& range = *file.add_ranges();
  range.set_tensor(1);
  range.set_tensor_class(v1::TENSOR_CLASS_MASTER);
  range.set_first(10 * rank);
  range.set_count(10);
  if (rank == 0) {
    v1::TensorInfo& tensor = *seal.add_tensors();
    tensor.set_id(1);
    tensor.set_name("w");
    tensor.add_shape(10 * static_cast<int64_t>(world_size));
    tensor.add_classes(v1::TENSOR_CLASS_MASTER);
    seal.mutable_train_state()->set_step(step);
  }
  return seal;
}

}  // namespace

Gang::Gang(World& world, const Plan& plan, Checkers& checkers, const v1::TaskAssignment& assign)
    : world_(world), plan_(plan), checkers_(checkers), assign_(assign) {
  step_ms_ = world.Between(50, 800);
}

bool Gang::Lives(uint32_t rank) {
  const auto worker = ranks_.find(rank);
  if (worker == ranks_.end()) {
    return false;
  }
  const SimTask* task = worker->second->task(assign_.fence());
  return task != nullptr && task->processes && task->RankLives(rank);
}

bool Gang::AllLive() {
  for (uint32_t rank = 0; rank < assign_.world_size(); ++rank) {
    if (!Lives(rank)) {
      return false;
    }
  }
  return true;
}

void Gang::Join(uint32_t rank) {
  if (!Lives(rank) || broken_) {
    return;
  }
  joined_.insert(rank);
  if (joined_.size() == assign_.world_size() && !running_) {
    running_ = true;
    world_.After(world_.Between(10, 300), [this] { Begin(); });
  }
}

// All ranks agree on the newest good checkpoint, falling back together from damaged ones.
void Gang::Begin() {
  if (broken_ || !AllLive()) {
    return;
  }
  for (const v1::CheckpointRecord& record : assign_.restore()) {
    checkers_.OnRestore(record);
    if (world_.Chance(plan_.damage)) {
      ranks_[0]->ReportDamage(assign_.fence(), record);
      continue;
    }
    step_ = record.step();
    break;
  }
  saved_step_ = step_;
  moved_ms_ = world_.now_ms();
  for (const auto& [rank, worker] : ranks_) {
    worker->RankJoined(assign_.fence(), rank, step_);
  }
  world_.After(step_ms_, [this] { Step(); });
}

void Gang::Freeze(uint32_t rank) {
  if (running_ && !broken_ && !finishing_ && !frozen_.has_value()) {
    world_.Trace(Str("rank ", rank, " of ", assign_.fence(), " freezes"));
    frozen_ = rank;
    other_operation_ = assign_.world_size() > 1 && world_.Chance(0.3);
    StandStill();
  }
}

void Gang::StandStill() { checkers_.OnStandstill(Fence{assign_.fence()}); }

v1::RankHead Gang::Head(uint32_t rank) const {
  const bool frozen = frozen_.has_value() && *frozen_ == rank;
  v1::RankHead head;
  head.set_rank(rank);
  head.set_step(step_);
  head.set_phase(9);
  head.set_phase_age_ms(moved_ms_ == 0 ? 0 : world_.now_ms() - moved_ms_);
  head.set_seq(2 * step_ + (frozen && !other_operation_ ? 1 : 2));
  head.set_op(3);
  head.set_fingerprint(frozen && other_operation_ ? 8 : 7);
  head.set_waiting(frozen_.has_value() && !frozen);
  head.set_process_state(frozen && !other_operation_ ? "T" : "S");
  head.add_phase_ns(0);
  head.set_waited_ns(0);
  return head;
}

void Gang::Step() {
  if (finishing_) {
    return;
  }
  if (broken_ || frozen_.has_value() || !AllLive()) {
    StandStill();
    return;
  }
  moved_ms_ = world_.now_ms();
  const uint64_t max_steps = static_cast<uint64_t>(assign_.config().training().max_steps());
  if (step_ < max_steps && !(stopping_ && save_ != Save::kNone)) {
    ++step_;
    ranks_[0]->SetStep(assign_.fence(), step_);
  }
  const uint64_t interval =
      std::max<uint64_t>(1, static_cast<uint64_t>(assign_.config().checkpoint().save_interval()));
  if (step_ >= max_steps || stopping_ || step_ % interval == 0) {
    if (save_ == Save::kNone && saved_step_ < step_) {
      BeginSave();
    }
  }
  const bool leave = save_ == Save::kNone && saved_step_ >= step_;
  if (leave && step_ >= max_steps) {
    finishing_ = true;
    LeaveAll(0);
    return;
  }
  if (leave && stopping_) {
    LeaveAll(85);
    return;
  }
  world_.After(step_ms_, [this] { Step(); });
}

void Gang::BeginSave() {
  save_ = Save::kOpening;
  save_step_ = step_;
  told_.clear();
  ++save_epoch_;
  ranks_[0]->AskOpen(assign_.fence(), 0, save_step_);
}

void Gang::Write(uint32_t rank) {
  world_.After(world_.Between(10, 2'000), [this, rank, epoch = save_epoch_] {
    if (epoch != save_epoch_ || save_ != Save::kWriting || !Lives(rank)) {
      return;
    }
    WorkerNode* worker = ranks_[rank];
    if (!worker->HoldsPermit(assign_.fence())) {
      Write(rank);  // trains on, tries again
      return;
    }
    checkers_.OnWrite(JobId{assign_.job()}, Fence{assign_.fence()}, save_step_, rank);
    v1::RankSealShard seal;
    seal.set_job(assign_.job());
    seal.set_fence(assign_.fence());
    seal.set_rank(rank);
    *seal.mutable_seal() = MakeSeal(save_step_, rank, assign_.world_size());
    worker->Seal(assign_.fence(), std::move(seal));
    AskAgain(rank, 2'000);
  });
}

// A sealed rank that hears of no commit repeats its seal.
void Gang::AskAgain(uint32_t rank, int64_t in_ms) {
  world_.After(in_ms, [this, rank, in_ms, epoch = save_epoch_] {
    if (epoch != save_epoch_ || save_ != Save::kWriting || told_.contains(rank) || !Lives(rank)) {
      return;
    }
    v1::RankSealShard seal;
    seal.set_job(assign_.job());
    seal.set_fence(assign_.fence());
    seal.set_rank(rank);
    *seal.mutable_seal() = MakeSeal(save_step_, rank, assign_.world_size());
    ranks_[rank]->Seal(assign_.fence(), std::move(seal));
    AskAgain(rank, std::min<int64_t>(2 * in_ms, 60'000));
  });
}

void Gang::EndSave(bool committed) {
  save_ = Save::kNone;
  ++save_epoch_;
  if (committed) {
    saved_step_ = std::max(saved_step_, save_step_);
  } else if (stopping_ || step_ >= static_cast<uint64_t>(assign_.config().training().max_steps())) {
    saved_step_ = step_;  // refused: leaves without it
  }
}

void Gang::OnVerdict(uint32_t rank, const v1::CheckpointReply& reply) {
  if (reply.verdict() == v1::CHECKPOINT_VERDICT_FENCED) {
    Exit(rank, 94);
    return;
  }
  if (broken_ || save_ == Save::kNone || reply.step() != save_step_) {
    return;
  }
  if (reply.verdict() == v1::CHECKPOINT_VERDICT_COMMITTED) {
    told_.insert(rank);
    if (told_.size() == ranks_.size()) EndSave(true);  // no rank is busy with it
  } else if (reply.verdict() == v1::CHECKPOINT_VERDICT_REFUSED) {
    EndSave(false);
  } else if (reply.verdict() == v1::CHECKPOINT_VERDICT_OK && save_ == Save::kOpening && rank == 0) {
    save_ = Save::kWriting;
    for (const auto& [one, worker] : ranks_) {
      Write(one);
    }
  }
}

void Gang::OnStop(const v1::StopTask& stop) {
  if (stop.stop().mode() == v1::STOP_MODE_CHECKPOINT_AND_EXIT && !stop.kill_now()) {
    stopping_ = true;
  }
}

void Gang::OnDeath(uint32_t rank) {
  if (broken_) {
    return;
  }
  broken_ = true;
  for (const auto& [other, worker] : ranks_) {
    if (other == rank || (plan_.peer_hang > 0 && world_.Chance(plan_.peer_hang))) {
      continue;
    }
    world_.After(world_.Between(20, 3'000), [this, other] { Exit(other, 86); });
  }
}

void Gang::LeaveAll(int code) {
  for (const auto& [rank, worker] : ranks_) {
    world_.After(world_.Between(1, 300), [this, rank, code] { Exit(rank, code); });
  }
}

void Gang::Exit(uint32_t rank, int code, const char* category) {
  if (!Lives(rank)) {
    return;
  }
  v1::RankOutcome outcome;
  outcome.set_rank(rank);
  outcome.set_exit_code(code);
  outcome.set_category(category);
  outcome.set_at(world_.now_ms());
  outcome.set_step(step_);
  ranks_[rank]->RankExited(assign_.fence(), std::move(outcome));
}

}  // namespace heddle::simulation
