#include "coordinator/state/decision.h"

#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

template <typename Map, typename Key, typename Record>
const Record* Overlaid(const Map& edits, const Key& key, const Record* stored) {
  const auto it = edits.find(key);
  return it == edits.end() ? stored : &it->second;
}

// The overlay's record, copied from the stored one at the first call.
template <typename Map, typename Key, typename Record>
Record& Editable(Map& edits, const Key& key, const Record* stored, bool* fresh = nullptr) {
  const auto it = edits.find(key);
  if (it != edits.end()) {
    return it->second;
  }
  HEDDLE_CHECK(stored != nullptr, "edit of a record that does not exist");
  if (fresh != nullptr) {
    *fresh = true;
  }
  return edits.emplace(key, *stored).first->second;
}

AttemptKey KeyFor(AttemptId id) { return {id.job.value, id.number}; }
TaskKey KeyFor(AttemptId id, uint32_t task) { return {id.job.value, id.number, task}; }

}  // namespace

const v1::JobRecord* Decision::job(JobId id) const {
  return Overlaid(jobs_, id.value, state_.job(id));
}
const v1::AttemptRecord* Decision::attempt(AttemptId id) const {
  return Overlaid(attempts_, KeyFor(id), state_.attempt(id.job, id.number));
}
const v1::AttemptRecord* Decision::attempt_of(Fence fence) const {
  const v1::AttemptRecord* stored = state_.attempt_of(fence);
  return stored == nullptr ? nullptr : attempt(IdOf(*stored));
}
const v1::TaskRecord* Decision::task(AttemptId id, uint32_t task) const {
  return Overlaid(tasks_, KeyFor(id, task), state_.task(id.job, id.number, task));
}
const v1::WorkerRecord* Decision::worker(const std::string& id) const {
  return Overlaid(workers_, id, state_.worker(id));
}
const v1::CheckpointRecord* Decision::checkpoint(const CheckpointKey& key) const {
  return Overlaid(checkpoints_, key, state_.checkpoint(key));
}

std::vector<const v1::TaskRecord*> Decision::Tasks(AttemptId id) const {
  std::vector<const v1::TaskRecord*> found;
  const v1::AttemptRecord* record = attempt(id);
  if (record == nullptr) {
    return found;
  }
  found.reserve(record->task_count());
  for (uint32_t i = 0; i < record->task_count(); ++i) {
    const v1::TaskRecord* one = task(id, i);
    HEDDLE_CHECK(one != nullptr, "attempt ", id, " has no task ", i);
    found.push_back(one);
  }
  return found;
}

std::vector<const v1::CheckpointRecord*> Decision::Checkpoints(JobId job) const {
  std::vector<const v1::CheckpointRecord*> found;
  const auto& stored = state_.checkpoints();
  for (auto it = stored.lower_bound({job, Fence{0}, 0}); it != stored.end() && it->first.job == job;
       ++it) {
    found.push_back(checkpoint(it->first));
  }
  for (const auto& [key, record] : checkpoints_) {
    if (key.job == job && state_.checkpoint(key) == nullptr) {
      found.push_back(&record);
    }
  }
  return found;
}

v1::MetaRecord& Decision::EditMeta() {
  if (!meta_changed_) {
    meta_ = state_.meta();
    meta_changed_ = true;
  }
  return meta_;
}
v1::JobRecord& Decision::Edit(JobId id) {
  bool fresh = false;
  v1::JobRecord& record = Editable(jobs_, id.value, state_.job(id), &fresh);
  if (fresh) {
    record.set_version(record.version() + 1);
  }
  return record;
}
v1::AttemptRecord& Decision::Edit(AttemptId id) {
  return Editable(attempts_, KeyFor(id), state_.attempt(id.job, id.number));
}
v1::TaskRecord& Decision::Edit(AttemptId id, uint32_t task) {
  return Editable(tasks_, KeyFor(id, task), state_.task(id.job, id.number, task));
}
v1::WorkerRecord& Decision::Edit(const std::string& worker) {
  return Editable(workers_, worker, state_.worker(worker));
}
v1::CheckpointRecord& Decision::Edit(const CheckpointKey& key) {
  return Editable(checkpoints_, key, state_.checkpoint(key));
}

v1::JobRecord& Decision::AddJob(JobId id) {
  v1::JobRecord& record = jobs_[id.value];
  record.set_id(id.value);
  record.set_version(1);
  return record;
}
v1::AttemptRecord& Decision::AddAttempt(AttemptId id) {
  v1::AttemptRecord& record = attempts_[KeyFor(id)];
  record.set_job(id.job.value);
  record.set_number(id.number);
  return record;
}
v1::TaskRecord& Decision::AddTask(AttemptId id, uint32_t task) {
  v1::TaskRecord& record = tasks_[KeyFor(id, task)];
  record.set_job(id.job.value);
  record.set_attempt(id.number);
  record.set_task(task);
  return record;
}
v1::WorkerRecord& Decision::AddWorker(const std::string& id) {
  v1::WorkerRecord& record = workers_[id];
  record.set_id(id);
  return record;
}
v1::CheckpointRecord& Decision::AddCheckpoint(const CheckpointKey& key) {
  v1::CheckpointRecord& record = checkpoints_[key];
  record.set_job(key.job.value);
  record.set_fence(key.fence.value);
  record.set_step(key.step);
  return record;
}
void Decision::AddIdempotency(v1::IdempotencyRecord record) {
  *others_.emplace_back().mutable_idempotency() = std::move(record);
}
void Decision::DeleteIdempotency(const std::string& identity, const std::string& request_id) {
  v1::IdempotencyRecord* key = others_.emplace_back().mutable_delete_idempotency();
  key->set_identity(identity);
  key->set_request_id(request_id);
}
void Decision::DeleteWorker(const std::string& id) {
  workers_.erase(id);
  others_.emplace_back().set_delete_worker(id);
}

Fence Decision::NextFence() {
  v1::MetaRecord& meta = EditMeta();
  meta.set_fence_seq(meta.fence_seq() + 1);
  return Fence::Make(Term{static_cast<uint32_t>(meta.term())}, meta.fence_seq());
}

v1::EventRecord& Decision::NewEvent(const char* code, std::string text) {
  v1::EventRecord& event = events_.emplace_back();
  event.set_at(now_.wall_ms);
  event.set_at_ms(now_.ms);
  event.set_actor(actor_);
  event.set_code(code);
  event.set_text(std::move(text));
  return event;
}
void Decision::Note(JobId job, const char* code, std::string text) {
  v1::EventRecord& event = NewEvent(code, std::move(text));
  event.set_target(ToText(job));
  event.set_job(job.value);
}
void Decision::Note(AttemptId attempt, const char* code, std::string text) {
  v1::EventRecord& event = NewEvent(code, std::move(text));
  event.set_target(ToText(attempt));
  event.set_job(attempt.job.value);
}
void Decision::Note(const CheckpointKey& checkpoint, const char* code, std::string text) {
  v1::EventRecord& event = NewEvent(code, std::move(text));
  event.set_target(ToText(checkpoint));
  event.set_job(checkpoint.job.value);
}
void Decision::NoteWorker(const std::string& worker, const char* code, std::string text) {
  NewEvent(code, std::move(text)).set_target(worker);
}
void Decision::NoteCluster(const char* code, std::string text) {
  NewEvent(code, std::move(text)).set_target("cluster");
}

bool Decision::changed() const {
  return meta_changed_ || !jobs_.empty() || !attempts_.empty() || !tasks_.empty() ||
         !workers_.empty() || !checkpoints_.empty() || !others_.empty();
}

void Decision::FillDelta(v1::EventRecord& event) {
  if (meta_changed_) {
    *event.add_delta()->mutable_meta() = std::move(meta_);
  }
  for (auto& [key, record] : workers_) {
    *event.add_delta()->mutable_worker() = std::move(record);
  }
  for (auto& [key, record] : jobs_) {
    *event.add_delta()->mutable_job() = std::move(record);
  }
  for (auto& [key, record] : attempts_) {
    *event.add_delta()->mutable_attempt() = std::move(record);
  }
  for (auto& [key, record] : tasks_) {
    *event.add_delta()->mutable_task() = std::move(record);
  }
  for (auto& [key, record] : checkpoints_) {
    *event.add_delta()->mutable_checkpoint() = std::move(record);
  }
  for (v1::RecordChange& change : others_) {
    *event.add_delta() = std::move(change);
  }
}

Outcome Decision::Finish(Status status) {
  Outcome outcome;
  outcome.status = std::move(status);
  outcome.job = job_;
  outcome.registration = std::move(registration_);
  if (changed()) {
    HEDDLE_CHECK(!events_.empty(), "a change without an event");
    FillDelta(events_.front());
  }  // an event without a change tells of a refusal (K5)
  for (size_t i = 0; i < events_.size(); ++i) {
    events_[i].set_seq(state_.next_seq() + i);
  }
  if (!events_.empty() && events_.size() > 1) {
    events_.front().set_more(static_cast<uint32_t>(events_.size() - 1));
  }
  outcome.events = std::move(events_);
  outcome.effects = std::move(effects_);
  return outcome;
}

}  // namespace heddle::state
