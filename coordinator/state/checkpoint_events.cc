// Checkpoints (control-plane 4.5): open, seal, commit as compare-and-set (L2), damage, retention.
#include <algorithm>

#include "checkpoint/catalog/coverage.h"
#include "checkpoint/catalog/lineage.h"
#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"
#include "coordinator/state/rollback.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

bool IsOpen(const v1::CheckpointRecord& record) {
  return record.state() == v1::CHECKPOINT_STATE_OPEN ||
         record.state() == v1::CHECKPOINT_STATE_SEALING;
}

struct Request {
  std::string worker;
  uint64_t request = 0;
  uint32_t rank = 0;
  Fence fence;
  uint64_t step = 0;
};

void Answer(Decision& d, const Request& request, v1::CheckpointVerdict verdict,
            const std::string& detail = {}, Fence current = {}) {
  effect::SendCheckpointReply send;
  send.worker = request.worker;
  send.reply.set_fence(request.fence.value);
  send.reply.add_ranks(request.rank);
  v1::CheckpointReply& reply = *send.reply.mutable_reply();
  reply.set_request(request.request);
  reply.set_step(request.step);
  reply.set_verdict(verdict);
  reply.set_detail(detail);
  if (current.value != 0) {
    reply.set_current_fence(current.value);
  }
  d.Do(std::move(send));
}

// The attempt may still write: it holds its job's fence (L2) and runs. Answers if not.
const v1::AttemptRecord* CheckWriter(Decision& d, const Request& request, JobId job_id) {
  const v1::AttemptRecord* attempt = d.attempt_of(request.fence);
  const v1::JobRecord* job = attempt == nullptr ? nullptr : d.job(JobId{attempt->job()});
  if (MutantsOf(d.policy()).skip_fence_check && attempt != nullptr) {
    return attempt;
  }
  if (job == nullptr || job->id() != job_id.value || job->current_fence() != request.fence.value) {
    const v1::JobRecord* named = d.job(job_id);
    if (named != nullptr) {  // what a cut-off attempt tried is worth knowing (K5)
      d.Note(CheckpointKey{job_id, request.fence, request.step}, "CHECKPOINT_FENCED",
             Str("refused: rank ", request.rank, " wrote with fence ", request.fence.value,
                 ", current is ", named->current_fence()));
    }
    Answer(d, request, v1::CHECKPOINT_VERDICT_FENCED, "a newer fence exists",
           Fence{named == nullptr ? 0 : named->current_fence()});
    return nullptr;
  }
  if (attempt->state() != v1::ATTEMPT_STATE_RUNNING &&
      attempt->state() != v1::ATTEMPT_STATE_STOPPING) {
    Answer(d, request, v1::CHECKPOINT_VERDICT_REFUSED,
           Str("the attempt is ", Name(attempt->state())));
    return nullptr;
  }
  return attempt;
}

uint64_t NewestStepOf(const Decision& d, JobId job, Fence fence) {
  uint64_t newest = 0;
  for (const v1::CheckpointRecord* one : d.Checkpoints(job)) {
    if (one->fence() == fence.value && (one->state() == v1::CHECKPOINT_STATE_COMMITTED ||
                                        one->state() == v1::CHECKPOINT_STATE_EXPIRED ||
                                        one->state() == v1::CHECKPOINT_STATE_DELETED)) {
      newest = std::max<uint64_t>(newest, one->step());
    }
  }
  return newest;
}

// The predecessor in the attempt, else what the attempt was restored from (K3).
void SetParent(const Decision& d, const v1::AttemptRecord& attempt, v1::CheckpointRecord& record) {
  const Fence fence{record.fence()};
  const uint64_t before = NewestStepOf(d, JobId{record.job()}, fence);
  if (before > 0) {
    record.set_parent_fence(fence.value);
    record.set_parent_step(before);
  } else if (attempt.restored_fence() != 0) {
    record.set_parent_fence(attempt.restored_fence());
    record.set_parent_step(attempt.start_step());
  }
}

// Checkpoints that live attempts were offered, or that a job not DONE was started from.
std::set<checkpoint::CheckpointKey> InUse(const Decision& d, JobId of) {
  std::set<checkpoint::CheckpointKey> keys;
  const auto add = [&keys, of](const v1::CheckpointKeyRecord& key) {
    if (key.job() == of.value) {
      keys.insert({key.fence(), key.step()});
    }
  };
  for (const auto& [id, stored] : d.state().jobs()) {
    const v1::JobRecord& job = *d.job(JobId{id});
    if (job.state() == v1::JOB_STATE_DONE) {
      continue;
    }
    if (job.has_resume_from()) {
      add(job.resume_from());
    }
    if (const std::optional<AttemptId> live = LiveAttempt(d, JobId{id}); live.has_value()) {
      const v1::AttemptRecord& attempt = *d.attempt(*live);
      std::for_each(attempt.restore().begin(), attempt.restore().end(), add);
    }
  }
  return keys;
}

// A rollback may be asked for steps before the newest checkpoint: the newest one that is old enough
// for it must stay, and those after it, each of which will be that one in its turn.
void KeepForRollback(const std::vector<v1::CheckpointRecord>& records,
                     checkpoint::RetentionPolicy* policy) {
  const std::vector<size_t> good = checkpoint::RestoreCandidates(records, records.size());
  for (const size_t i : good) {
    policy->in_use.insert(checkpoint::KeyOf(records[i]));
    if (records[i].step() + kRollbackReachSteps <= records[good.front()].step()) {
      return;
    }
  }
}

void Retain(Decision& d, JobId job_id) {
  const v1::CheckpointConfig config = d.job(job_id)->config().checkpoint();
  const std::vector<RollbackLimit> limits = RollbackLimits(d.state(), job_id);
  std::vector<v1::CheckpointRecord> records;
  for (const v1::CheckpointRecord* one : d.Checkpoints(job_id)) {
    if (one->state() == v1::CHECKPOINT_STATE_COMMITTED) {
      v1::CheckpointRecord& light = records.emplace_back();
      light.set_job(one->job());
      light.set_fence(one->fence());
      light.set_step(one->step());
      light.set_state(one->state());
      light.set_pinned(one->pinned());
      light.set_verified(one->verified());
      // What a rollback left behind is of no use to the next attempt either.
      light.set_damaged(one->damaged() || IsLeftBehind(limits, *one));
    }
  }
  checkpoint::RetentionPolicy policy;
  policy.keep_last = static_cast<uint64_t>(std::max(2, config.keep_last()));
  policy.keep_every = static_cast<uint64_t>(config.keep_every());
  if (records.size() <= policy.keep_last) {
    return;
  }
  policy.in_use = InUse(d, job_id);
  if (d.job(job_id)->config().training().nan_policy() == v1::TrainingConfig::NAN_POLICY_ROLLBACK) {
    KeepForRollback(records, &policy);
  }
  for (const size_t i : checkpoint::Expirable(records, policy)) {
    v1::CheckpointRecord& record = d.Edit(KeyOf(records[i]));
    record.set_state(v1::CHECKPOINT_STATE_EXPIRED);
    record.set_delete_ms(d.now().ms);
    d.Note(KeyOf(record), "CHECKPOINT_EXPIRED", Str("newer ones are kept: ", policy.keep_last));
  }
}

void Commit(Decision& d, const v1::AttemptRecord& attempt, const CheckpointKey& key,
            const Request& request) {
  v1::CheckpointRecord& record = d.Edit(key);
  SetParent(d, attempt, record);
  record.set_state(v1::CHECKPOINT_STATE_COMMITTED);
  record.set_created_at(d.now().wall_ms);
  record.set_bytes(checkpoint::TotalBytes(record));
  record.clear_open_deadline_ms();
  d.Edit(IdOf(attempt)).set_progressed(true);
  v1::JobRecord& job = d.Edit(key.job);
  job.mutable_last_checkpoint()->set_job(key.job.value);
  job.mutable_last_checkpoint()->set_fence(key.fence.value);
  job.mutable_last_checkpoint()->set_step(key.step);
  d.Note(key, "CHECKPOINT_COMMITTED",
         Str("fence ", key.fence.value, ", ", record.seals_size(), " ranks, ", record.bytes(),
             " bytes"));
  for (const v1::CheckpointRecord* other : d.Checkpoints(key.job)) {  // K4
    if (other->fence() == key.fence.value && other->step() < key.step && IsOpen(*other)) {
      AbortCheckpoint(d, KeyOf(*other), "a newer step was committed");
    }
  }
  Retain(d, key.job);
  Answer(d, request, v1::CHECKPOINT_VERDICT_COMMITTED);
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    effect::SendCheckpointReply send;
    send.worker = task->worker();
    send.reply.set_fence(key.fence.value);
    for (uint32_t rank = task->first_rank(); rank < task->first_rank() + task->ranks(); ++rank) {
      if (rank != request.rank) {
        send.reply.add_ranks(rank);
      }
    }
    send.reply.mutable_reply()->set_step(key.step);
    send.reply.mutable_reply()->set_verdict(v1::CHECKPOINT_VERDICT_COMMITTED);
    if (send.reply.ranks_size() > 0 && !IsFinal(task->state())) {
      d.Do(std::move(send));
    }
  }
  d.Do(effect::WriteManifest{record});
  d.Do(effect::VerifyCheckpoint{record});
}

std::string SealBytes(const v1::RankSeal& seal) { return seal.SerializeAsString(); }

// K2: the seal into the record. A repeat must say the same.
Status AddSeal(Decision& d, const CheckpointKey& key, const v1::SealShard& seal) {
  v1::RankSeal mine;
  mine.set_rank(seal.rank());
  *mine.mutable_files() = seal.files();
  for (const v1::RankSeal& known : d.checkpoint(key)->seals()) {
    if (known.rank() == seal.rank()) {
      return SealBytes(known) == SealBytes(mine)
                 ? OkStatus()
                 : FailedPrecondition(
                       Str("rank ", seal.rank(), " sealed this step before with other files"));
    }
  }
  const std::vector<std::string> problems = checkpoint::SealProblems(mine);
  if (!problems.empty()) {
    return FailedPrecondition(Str("rank ", seal.rank(), ": ", problems.front()));
  }
  v1::CheckpointRecord& record = d.Edit(key);
  *record.add_seals() = std::move(mine);
  record.set_state(v1::CHECKPOINT_STATE_SEALING);
  if (seal.rank() == 0) {
    *record.mutable_tensors() = seal.tensors();
    *record.mutable_train_state() = seal.train_state();
  }
  d.Note(key, "CHECKPOINT_SEALED",
         Str("rank ", seal.rank(), ", ", record.seals_size(), "/", record.world_size()));
  return OkStatus();
}

void MarkDamaged(Decision& d, const CheckpointKey& key, const std::string& detail) {
  d.Edit(key).set_damaged(true);
  d.Note(key, "CHECKPOINT_DAMAGED", detail);
  v1::JobRecord& job = d.Edit(key.job);
  const v1::CheckpointRecord* best = nullptr;
  for (const v1::CheckpointRecord* one : d.Checkpoints(key.job)) {
    if (checkpoint::IsGood(*one) &&
        (best == nullptr ||
         std::make_pair(one->step(), one->fence()) > std::make_pair(best->step(), best->fence()))) {
      best = one;
    }
  }
  if (best == nullptr) {
    job.clear_last_checkpoint();
    return;
  }
  job.mutable_last_checkpoint()->set_job(key.job.value);
  job.mutable_last_checkpoint()->set_fence(best->fence());
  job.mutable_last_checkpoint()->set_step(best->step());
}

}  // namespace

void AbortCheckpoint(Decision& d, const CheckpointKey& key, const char* why) {
  v1::CheckpointRecord& record = d.Edit(key);
  record.set_state(v1::CHECKPOINT_STATE_ABORTED);
  record.clear_open_deadline_ms();
  record.clear_tensors();
  record.clear_seals();
  record.clear_train_state();
  record.set_delete_ms(d.now().ms + d.policy().file_grace_ms);
  d.Note(key, "CHECKPOINT_ABORTED", why);
}

void AbortCheckpoints(Decision& d, AttemptId id, const char* why) {
  if (MutantsOf(d.policy()).skip_fence_check) {
    return;
  }
  const uint64_t fence = d.attempt(id)->fence();
  for (const v1::CheckpointRecord* one : d.Checkpoints(id.job)) {
    if (one->fence() == fence && IsOpen(*one)) {
      AbortCheckpoint(d, KeyOf(*one), why);
    }
  }
}

Status On(Decision& d, const event::CheckpointOpened& e) {
  RETURN_IF_ERROR(CheckSession(d, e.worker, e.session));
  const Request request{e.worker, e.open.open().request(), e.open.rank(), Fence{e.open.fence()},
                        e.open.open().step()};
  const JobId job{e.open.job()};
  const v1::AttemptRecord* attempt = CheckWriter(d, request, job);
  if (attempt == nullptr) {
    return OkStatus();
  }
  const CheckpointKey key{job, request.fence, request.step};
  if (const v1::CheckpointRecord* known = d.checkpoint(key); known != nullptr) {
    const bool done = known->state() == v1::CHECKPOINT_STATE_COMMITTED;
    Answer(d, request,
           IsOpen(*known) ? v1::CHECKPOINT_VERDICT_OK
           : done         ? v1::CHECKPOINT_VERDICT_COMMITTED
                          : v1::CHECKPOINT_VERDICT_REFUSED,
           IsOpen(*known) || done ? "" : Str("the checkpoint is ", Name(known->state())));
    return OkStatus();
  }
  if (request.step <= NewestStepOf(d, job, request.fence)) {
    Answer(d, request, v1::CHECKPOINT_VERDICT_REFUSED,
           "this attempt has saved a later step already");
    return OkStatus();
  }
  if (!e.disk_ok) {
    Answer(d, request, v1::CHECKPOINT_VERDICT_REFUSED, "the disk's reserve is used up");
    return OkStatus();
  }
  v1::CheckpointRecord& record = d.AddCheckpoint(key);
  record.set_state(v1::CHECKPOINT_STATE_OPEN);
  record.set_attempt(attempt->number());
  record.set_world_size(attempt->world_size());
  record.set_dir(checkpoint::StepDir(AttemptDir(job, request.fence), request.step));
  record.set_opened_at(d.now().wall_ms);
  record.set_open_deadline_ms(d.now().ms + d.policy().checkpoint_open_ms);
  d.Note(key, "CHECKPOINT_OPENED", Str("fence ", request.fence.value));
  Answer(d, request, v1::CHECKPOINT_VERDICT_OK);
  return OkStatus();
}

Status On(Decision& d, const event::ShardSealed& e) {
  RETURN_IF_ERROR(CheckSession(d, e.worker, e.session));
  const v1::SealShard& seal = e.seal.seal();
  const Request request{e.worker, seal.request(), e.seal.rank(), Fence{e.seal.fence()},
                        seal.step()};
  const JobId job{e.seal.job()};
  const v1::AttemptRecord* attempt = CheckWriter(d, request, job);
  if (attempt == nullptr) {
    return OkStatus();
  }
  const CheckpointKey key{job, request.fence, request.step};
  const v1::CheckpointRecord* record = d.checkpoint(key);
  const bool committed = record != nullptr && record->state() == v1::CHECKPOINT_STATE_COMMITTED;
  if (record == nullptr || (!IsOpen(*record) && !committed) || seal.rank() != e.seal.rank() ||
      seal.rank() >= record->world_size()) {
    Answer(d, request, v1::CHECKPOINT_VERDICT_REFUSED,
           record == nullptr ? "not opened" : Str("the checkpoint is ", Name(record->state())));
    return OkStatus();
  }
  if (const Status added = AddSeal(d, key, seal); !added.ok()) {
    Answer(d, request, v1::CHECKPOINT_VERDICT_REFUSED, Message(added));
    return added;
  }
  record = d.checkpoint(key);
  if (committed || static_cast<uint32_t>(record->seals_size()) < record->world_size()) {
    Answer(d, request, committed ? v1::CHECKPOINT_VERDICT_COMMITTED : v1::CHECKPOINT_VERDICT_OK);
    return OkStatus();
  }
  const Status whole = checkpoint::CheckCoverage(*record);
  if (!whole.ok()) {
    AbortCheckpoint(d, key, "its shards do not make a whole");
    Answer(d, request, v1::CHECKPOINT_VERDICT_REFUSED, Message(whole));
    return whole;
  }
  Commit(d, *attempt, key, request);
  return OkStatus();
}

Status On(Decision& d, const event::CheckpointDamaged& e) {
  RETURN_IF_ERROR(CheckSession(d, e.worker, e.session));
  const v1::AttemptRecord* attempt = d.attempt_of(Fence{e.report.fence()});
  if (attempt == nullptr || attempt->job() != e.report.job()) {
    return NotFound("no attempt has this fence");
  }
  for (const v1::CheckpointKeyRecord& key : attempt->restore()) {
    if (key.fence() != e.report.checkpoint_fence() || key.step() != e.report.checkpoint_step()) {
      continue;
    }
    const CheckpointKey found{JobId{key.job()}, Fence{key.fence()}, key.step()};
    const v1::CheckpointRecord* record = d.checkpoint(found);
    if (record != nullptr && checkpoint::IsGood(*record)) {
      MarkDamaged(d, found, e.report.detail());
    }
    return OkStatus();
  }
  return NotFound(Str("attempt ", IdOf(*attempt), " was not offered that checkpoint"));
}

Status On(Decision& d, const event::CheckpointVerified& e) {
  const v1::CheckpointRecord* record = d.checkpoint(e.key);
  if (record == nullptr) {
    return NotFound(Str("no checkpoint ", ToText(e.key)));
  }
  if (!checkpoint::IsGood(*record)) {
    return FailedPrecondition(Str("checkpoint ", ToText(e.key), " is ",
                                  record->damaged() ? "damaged" : Name(record->state())));
  }
  if (!e.ok) {
    MarkDamaged(d, e.key, e.detail);
    return OkStatus();
  }
  if (record->verified()) {
    return OkStatus();
  }
  d.Edit(e.key).set_verified(true);
  d.Note(e.key, "CHECKPOINT_VERIFIED", "all digests match");
  Retain(d, e.key.job);
  return OkStatus();
}

Status On(Decision& d, const event::CheckpointFilesDeleted& e) {
  const v1::CheckpointRecord* record = d.checkpoint(e.key);
  if (record == nullptr) {
    return NotFound(Str("no checkpoint ", ToText(e.key)));
  }
  if (record->state() != v1::CHECKPOINT_STATE_EXPIRED &&
      record->state() != v1::CHECKPOINT_STATE_ABORTED) {
    return FailedPrecondition(Str("checkpoint ", ToText(e.key), " is ", Name(record->state())));
  }
  v1::CheckpointRecord& edited = d.Edit(e.key);
  const bool expired = edited.state() == v1::CHECKPOINT_STATE_EXPIRED;
  // An aborted one stays ABORTED: it was never a checkpoint.
  if (expired) {
    edited.set_state(v1::CHECKPOINT_STATE_DELETED);
  }
  edited.clear_delete_ms();
  edited.clear_seals();
  edited.clear_tensors();
  d.Note(e.key, "CHECKPOINT_DELETED", expired ? "expired" : "never committed");
  return OkStatus();
}

}  // namespace heddle::state
