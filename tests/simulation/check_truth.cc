#include "coordinator/state/names.h"
#include "tests/simulation/checkers.h"

namespace heddle::simulation {

namespace v1 = heddle::v1;

void Checkers::OnDurable(const v1::EventRecord& event) {
  // Checkpoints first: a commit stands in a batch of its own attempt, before its end.
  for (const v1::RecordChange& change : event.delta()) {
    if (change.has_checkpoint()) {
      OnCheckpoint(change.checkpoint());
    }
  }
  for (const v1::RecordChange& change : event.delta()) {
    if (change.has_attempt()) {
      OnAttempt(change.attempt());
    }
  }
}

void Checkers::OnAttempt(const v1::AttemptRecord& attempt) {
  const bool live =
      attempt.state() != v1::ATTEMPT_STATE_FENCING && attempt.state() != v1::ATTEMPT_STATE_ENDED;
  uint64_t& owner = owner_[attempt.job()];
  if (live) {
    owner = attempt.fence();
  } else {
    if (owner == attempt.fence()) {
      owner = 0;
    }
    cut_ms_.emplace(attempt.fence(), world_.now_ms());
  }
  if (attempt.state() == v1::ATTEMPT_STATE_RUNNING) {
    ran_.insert(attempt.fence());
  }
  for (const v1::FindingRecord& finding : attempt.findings()) {
    const bool still = finding.kind() == "HANG" || finding.kind() == "MISMATCH";
    if (still && !still_.contains(attempt.fence())) {
      world_.Violate("false alarm", Str("attempt ", attempt.number(), " of ", JobId{attempt.job()},
                                        " steps on: ", finding.text()));
    }
  }
  const bool bad_end = attempt.state() == v1::ATTEMPT_STATE_FENCING ||
                       attempt.outcome() == v1::ATTEMPT_OUTCOME_FAILED ||
                       attempt.outcome() == v1::ATTEMPT_OUTCOME_LOST ||
                       attempt.outcome() == v1::ATTEMPT_OUTCOME_NEVER_STARTED;
  if (plan_.coordinator_only && bad_end &&
      (plan_.isolate_ms == 0 || ran_.contains(attempt.fence()))) {
    world_.Violate("P2", Str("attempt ", attempt.number(), " of ", JobId{attempt.job()},
                             " ended for the coordinator's absence only: ", attempt.cause().code(),
                             " ", attempt.cause().detail()));
  }
}

void Checkers::OnCheckpoint(const v1::CheckpointRecord& checkpoint) {
  const state::CheckpointKey key = state::KeyOf(checkpoint);
  if (checkpoint.state() != v1::CHECKPOINT_STATE_COMMITTED || !committed_.insert(key).second) {
    return;
  }
  ++commits_;
  if (owner_[checkpoint.job()] != checkpoint.fence()) {
    world_.Violate("stale commit", Str(state::ToText(key), " of fence ", checkpoint.fence(),
                                       ", the owner is ", owner_[checkpoint.job()]));
  }
}

void Checkers::OnWrite(JobId job, Fence fence, uint64_t step, uint32_t rank) {
  const auto cut = cut_ms_.find(fence.value);
  if (cut != cut_ms_.end() && world_.now_ms() > cut->second + 25'000) {
    world_.Violate("stale write",
                   Str("rank ", rank, " of fence ", fence.value, " wrote ", job, "@", step, " ",
                       world_.now_ms() - cut->second, " ms after it was fenced"));
  }
}

void Checkers::OnPermit(Fence fence, int64_t granted_ms, int64_t until_ms) {
  if (until_ms > granted_ms + 25'000) {
    world_.Violate("L4", Str("a permit of fence ", fence.value, " lives ", until_ms - granted_ms,
                             " ms after it was sent"));
  }
}

void Checkers::OnDelete(const state::State& durable, const state::CheckpointKey& key) {
  const v1::CheckpointRecord* record = durable.checkpoint(key);
  if (record == nullptr || (record->state() != v1::CHECKPOINT_STATE_EXPIRED &&
                            record->state() != v1::CHECKPOINT_STATE_ABORTED)) {
    world_.Violate("K7", Str("files of ", state::ToText(key), " go while it is ",
                             record == nullptr ? "unknown" : state::Name(record->state())));
  }
  deleted_.insert(key);
}

void Checkers::OnRestore(const v1::CheckpointRecord& record) {
  if (deleted_.contains(state::KeyOf(record)) || !committed_.contains(state::KeyOf(record))) {
    world_.Violate("restore", Str(state::ToText(state::KeyOf(record)),
                                  " is offered, but its files are not whole"));
  }
}

void Checkers::OnProcesses(const std::string& worker, JobId job, Fence fence, double cpus,
                           bool command, bool start) {
  double& used = cpus_[worker];
  used += start ? cpus : -cpus;
  processes_ += start ? 1 : -1;
  if (used > plan_.cpus) {
    world_.Violate("I4", Str("processes on ", worker, " use ", used, " of ", plan_.cpus, " cpus"));
  }
  if (!command) {
    return;
  }
  std::multiset<uint64_t>& fences = commands_[job.value];
  if (start) {
    fences.insert(fence.value);
  } else {
    fences.erase(fences.find(fence.value));
  }
  if (!fences.empty() && *fences.begin() != *fences.rbegin()) {
    world_.Violate("Q3", Str("command ", job, " runs twice"));
  }
}

}  // namespace heddle::simulation
