#include "coordinator/state/state.h"

#include <algorithm>

#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

QueueKey QueueKeyOf(const v1::JobRecord& job) {
  const int priority = job.config().schedule().priority();
  return {-(priority / 20), -priority, -static_cast<int64_t>(job.boost()), job.submit_seq(),
          job.id()};
}

// Everything that placement asks a config for.
std::string ShapeText(const v1::RunConfig& config) {
  const v1::ParallelConfig& parallel = config.parallel();
  std::string text =
      Str(RanksOf(config), " ", parallel.cpus_per_rank(), " ", parallel.memory_per_rank(), " ",
          parallel.gpus_per_rank(), " ", parallel.backend(), " ", config.kind());
  for (const std::string& constraint : config.schedule().constraints()) {
    text += '\n';
    text += constraint;
  }
  return text;
}

AttemptKey KeyOf(const v1::AttemptRecord& record) { return {record.job(), record.number()}; }
TaskKey KeyOf(const v1::TaskRecord& record) {
  return {record.job(), record.attempt(), record.task()};
}
std::pair<std::string, std::string> KeyOf(const v1::IdempotencyRecord& record) {
  return {record.identity(), record.request_id()};
}

Timer AttemptTimer(const v1::AttemptRecord& record, TimerKind kind, int64_t at_ms) {
  Timer timer;
  timer.at_ms = at_ms;
  timer.kind = kind;
  timer.job = record.job();
  timer.fence = record.fence();
  timer.number = record.number();
  return timer;
}

bool IsHangWatched(const v1::AttemptRecord& record) {
  return record.state() == v1::ATTEMPT_STATE_RUNNING && record.hang_kill_ms() > 0;
}

constexpr size_t kStepTimesMax = 31;

void NoteStepTime(Progress* progress, int64_t ms) {
  if (progress->step_ms.size() < kStepTimesMax) {
    progress->step_ms.push_back(ms);
    return;
  }
  progress->step_ms[progress->next] = ms;
  progress->next = (progress->next + 1) % kStepTimesMax;
}

}  // namespace

int64_t Progress::MedianStepMs() const {
  std::vector<int64_t> sorted = step_ms;
  std::sort(sorted.begin(), sorted.end());
  // A step of less than a millisecond was timed all the same.
  return sorted.empty() ? 0 : std::max<int64_t>(1, sorted[sorted.size() / 2]);
}

Booking BookingOf(const v1::TaskRecord& task) {
  Booking booking;
  booking.cpus = task.cpus_per_rank() * task.ranks();
  booking.memory = task.memory_per_rank() * task.ranks();
  booking.gpus.assign(task.gpu_indices().begin(), task.gpu_indices().end());
  return booking;
}

bool IsFinal(v1::TaskState state) {
  return state == v1::TASK_STATE_EXITED || state == v1::TASK_STATE_GONE;
}

// ---- changes ----------------------------------------------------------------------------------

void State::Commit(const v1::EventRecord& event) {
  HEDDLE_CHECK(event.seq() == next_seq_, "event ", event.seq(), " committed, expected ", next_seq_);
  ++next_seq_;
  newest_ms_ = std::max<int64_t>(newest_ms_, event.at_ms());
  for (const v1::RecordChange& change : event.delta()) {
    Put(change);
  }
}

void State::Load(v1::RecordChange change) { Put(std::move(change)); }

void State::SetNextSeq(uint64_t seq, int64_t newest_ms) {
  next_seq_ = seq;
  newest_ms_ = std::max(newest_ms_, newest_ms);
}

void State::Put(v1::RecordChange change) {
  switch (change.change_case()) {
    case v1::RecordChange::kMeta:
      meta_ = std::move(*change.mutable_meta());
      break;
    case v1::RecordChange::kJob:
      PutJob(std::make_shared<const v1::JobRecord>(std::move(*change.mutable_job())));
      break;
    case v1::RecordChange::kAttempt:
      PutAttempt(std::make_shared<const v1::AttemptRecord>(std::move(*change.mutable_attempt())));
      break;
    case v1::RecordChange::kTask:
      PutTask(std::make_shared<const v1::TaskRecord>(std::move(*change.mutable_task())));
      break;
    case v1::RecordChange::kWorker:
      PutWorker(std::make_shared<const v1::WorkerRecord>(std::move(*change.mutable_worker())));
      break;
    case v1::RecordChange::kCheckpoint:
      PutCheckpoint(
          std::make_shared<const v1::CheckpointRecord>(std::move(*change.mutable_checkpoint())));
      break;
    case v1::RecordChange::kIdempotency:
      PutIdempotency(
          std::make_shared<const v1::IdempotencyRecord>(std::move(*change.mutable_idempotency())));
      break;
    case v1::RecordChange::kDeleteWorker: {
      const auto it = nodes_.find(change.delete_worker());
      if (it != nodes_.end() && it->second.record != nullptr) {
        IndexWorker(*it->second.record, false);
        nodes_.erase(it);
        ++schedule_revision_;
      }
      break;
    }
    case v1::RecordChange::kDeleteIdempotency: {
      const auto it = idempotency_.find(KeyOf(change.delete_idempotency()));
      if (it != idempotency_.end()) {
        IndexIdempotency(*it->second, false);
        idempotency_.erase(it);
      }
      break;
    }
    case v1::RecordChange::kDeleteJob:         // housekeeping of old jobs: not yet
    case v1::RecordChange::kDeleteCheckpoint:  // records of checkpoints are kept
    case v1::RecordChange::CHANGE_NOT_SET:
      HEDDLE_CHECK(false, "change of an unknown kind in the journal: a newer version wrote it");
  }
}

void State::PutJob(JobPtr record) {
  JobPtr& slot = jobs_[record->id()];
  if (slot != nullptr) {
    IndexJob(slot, false);
  }
  slot = record;
  IndexJob(record, true);
}

void State::PutAttempt(AttemptPtr record) {
  AttemptPtr& slot = attempts_[KeyOf(*record)];
  if (slot != nullptr) {
    IndexAttempt(*slot, false);
  }
  slot = record;
  IndexAttempt(*record, true);
}

void State::PutTask(TaskPtr record) {
  TaskPtr& slot = tasks_[KeyOf(*record)];
  if (slot != nullptr) {
    IndexTask(*slot, false);
  }
  slot = record;
  IndexTask(*record, true);
}

void State::PutWorker(WorkerPtr record) {
  NodeEntry& entry = nodes_[record->id()];
  if (entry.record != nullptr) {
    IndexWorker(*entry.record, false);
  }
  entry.record = record;
  ++schedule_revision_;
  IndexWorker(*record, true);
}

void State::PutCheckpoint(CheckpointPtr record) {
  CheckpointPtr& slot = checkpoints_[state::KeyOf(*record)];
  if (slot != nullptr) {
    IndexCheckpoint(*slot, false);
  }
  slot = record;
  IndexCheckpoint(*record, true);
}

void State::PutIdempotency(IdempotencyPtr record) {
  IdempotencyPtr& slot = idempotency_[KeyOf(*record)];
  if (slot != nullptr) {
    IndexIdempotency(*slot, false);
  }
  slot = record;
  IndexIdempotency(*record, true);
}

// ---- indexes ----------------------------------------------------------------------------------

void State::SetTimer(const Timer& timer, bool add) {
  std::set<Timer>& timers = timer.kind == TimerKind::kJobStart ? wall_timers_ : timers_;
  if (add) {
    timers.insert(timer);
  } else {
    timers.erase(timer);
  }
}

void State::IndexJob(const JobPtr& record, bool add) {
  const v1::JobRecord& job = *record;
  uint64_t& count = job_counts_[job.state()];
  count += add ? 1 : -1;
  Timer timer;
  timer.job = job.id();
  if (job.state() == v1::JOB_STATE_QUEUED) {
    ++schedule_revision_;
    const auto same = queue_by_shape_.try_emplace(ShapeText(job.config())).first;
    if (add) {
      queue_[QueueKeyOf(job)] = record;
      same->second[QueueKeyOf(job)] = record;
    } else {
      queue_.erase(QueueKeyOf(job));
      same->second.erase(QueueKeyOf(job));
    }
    if (same->second.empty()) {
      queue_by_shape_.erase(same);
    }
  } else if (job.state() == v1::JOB_STATE_BACKOFF) {
    timer.kind = TimerKind::kJobBackoff;
    timer.at_ms = job.backoff_until_ms();
    SetTimer(timer, add);
  } else if (job.state() == v1::JOB_STATE_WAITING) {
    if (job.start_at() > 0) {
      timer.kind = TimerKind::kJobStart;
      timer.at_ms = job.start_at();
      SetTimer(timer, add);
    }
    for (const v1::DependencyRecord& dependency : job.after()) {
      if (add) {
        waiting_.insert({dependency.job(), job.id()});
      } else {
        waiting_.erase({dependency.job(), job.id()});
      }
    }
  }
}

void State::IndexAttempt(const v1::AttemptRecord& record, bool add) {
  if (add) {
    by_fence_[record.fence()] = KeyOf(record);
  }
  if (record.state() != v1::ATTEMPT_STATE_ENDED) {
    if (record.deadline_ms() > 0) {
      SetTimer(AttemptTimer(record, TimerKind::kAttemptDeadline, record.deadline_ms()), add);
    }
    if (record.resend_ms() > 0) {
      SetTimer(AttemptTimer(record, TimerKind::kAttemptResend, record.resend_ms()), add);
    }
    if (record.run_deadline_ms() > 0 && record.state() == v1::ATTEMPT_STATE_RUNNING) {
      SetTimer(AttemptTimer(record, TimerKind::kAttemptRunLimit, record.run_deadline_ms()), add);
    }
  }
  if (!add) {
    const auto it = hang_deadline_.find(record.fence());
    if (it != hang_deadline_.end()) {
      SetTimer(AttemptTimer(record, TimerKind::kAttemptHang, it->second), false);
      hang_deadline_.erase(it);
    }
    return;
  }
  if (record.state() == v1::ATTEMPT_STATE_ENDED || record.state() == v1::ATTEMPT_STATE_FENCING) {
    progress_.erase(record.fence());
    observed_.erase(record.fence());
  } else if (IsHangWatched(record)) {
    const Progress* known = progress(Fence{record.fence()});
    const int64_t from = std::max({record.running_ms(), record.hang_from_ms(), meta_.started_ms(),
                                   known == nullptr ? 0 : known->at_ms});
    hang_deadline_[record.fence()] = from + record.hang_kill_ms();
    SetTimer(AttemptTimer(record, TimerKind::kAttemptHang, from + record.hang_kill_ms()), true);
  }
}

void State::IndexTask(const v1::TaskRecord& record, bool add) {
  if (IsFinal(record.state())) {
    return;
  }
  if (record.orphan_ms() > 0) {
    Timer timer;
    timer.at_ms = record.orphan_ms();
    timer.kind = TimerKind::kTaskOrphan;
    timer.job = record.job();
    timer.fence = record.fence();
    timer.number = record.attempt();
    timer.task = record.task();
    SetTimer(timer, add);
  }
  NodeEntry& entry = nodes_[record.worker()];
  const Booking booking = BookingOf(record);
  const double sign = add ? 1 : -1;
  entry.cpus_used += sign * booking.cpus;
  ++schedule_revision_;
  if (add) {
    entry.memory_used += booking.memory;
    entry.booked.insert(KeyOf(record));
    entry.gpus_used.insert(booking.gpus.begin(), booking.gpus.end());
  } else {
    entry.memory_used -= booking.memory;
    entry.booked.erase(KeyOf(record));
    for (const int32_t gpu : booking.gpus) {
      entry.gpus_used.erase(gpu);
    }
  }
}

void State::IndexWorker(const v1::WorkerRecord& record, bool add) {
  Timer timer;
  timer.key = record.id();
  if (record.health() == v1::WORKER_HEALTH_QUARANTINED && record.quarantined_until_ms() > 0) {
    timer.kind = TimerKind::kQuarantineEnd;
    timer.at_ms = record.quarantined_until_ms();
    SetTimer(timer, add);
  }
  if (record.probation_until_ms() > 0) {
    timer.kind = TimerKind::kProbationEnd;
    timer.at_ms = record.probation_until_ms();
    SetTimer(timer, add);
  }
}

void State::IndexCheckpoint(const v1::CheckpointRecord& record, bool add) {
  Timer timer;
  timer.job = record.job();
  timer.fence = record.fence();
  timer.number = record.step();
  const bool open =
      record.state() == v1::CHECKPOINT_STATE_OPEN || record.state() == v1::CHECKPOINT_STATE_SEALING;
  if (open && record.open_deadline_ms() > 0) {
    timer.kind = TimerKind::kCheckpointOpen;
    timer.at_ms = record.open_deadline_ms();
    SetTimer(timer, add);
  }
  if (record.delete_ms() > 0) {
    timer.kind = TimerKind::kCheckpointDelete;
    timer.at_ms = record.delete_ms();
    SetTimer(timer, add);
  }
}

void State::IndexIdempotency(const v1::IdempotencyRecord& record, bool add) {
  Timer timer;
  timer.kind = TimerKind::kIdempotencyExpiry;
  timer.at_ms = record.expires_ms();
  timer.key = record.identity() + '\0' + record.request_id();
  SetTimer(timer, add);
}

void State::NoteProgress(Fence fence, uint64_t step, Time now, const Policy& policy) {
  (void)policy;
  const v1::AttemptRecord* record = attempt_of(fence);
  if (record == nullptr || record->state() == v1::ATTEMPT_STATE_ENDED ||
      record->state() == v1::ATTEMPT_STATE_FENCING) {
    return;
  }
  Progress& known = progress_[fence.value];
  if (step <= known.step && known.at_ms != 0) {
    return;
  }
  if (known.at_ms != 0 && known.step != 0) {
    // Several steps that come in one heartbeat took equal parts of the time.
    NoteStepTime(&known, (now.ms - known.at_ms) / static_cast<int64_t>(step - known.step));
  }
  known.step = std::max(known.step, step);
  known.at_ms = now.ms;
  const auto it = hang_deadline_.find(fence.value);
  if (it == hang_deadline_.end()) {
    return;
  }
  SetTimer(AttemptTimer(*record, TimerKind::kAttemptHang, it->second), false);
  it->second = std::max(it->second, now.ms + record->hang_kill_ms());
  SetTimer(AttemptTimer(*record, TimerKind::kAttemptHang, it->second), true);
}

void State::NoteHeads(Fence fence, const google::protobuf::RepeatedPtrField<v1::RankHead>& heads,
                      Time now) {
  const v1::AttemptRecord* record = attempt_of(fence);
  if (heads.empty() || record == nullptr || record->state() == v1::ATTEMPT_STATE_ENDED ||
      record->state() == v1::ATTEMPT_STATE_FENCING) {
    return;
  }
  for (const v1::RankHead& head : heads) {
    observed_[fence.value].Add(head, record->world_size(), now.ms);
  }
}

// ---- lookups ----------------------------------------------------------------------------------

namespace {
template <typename Map, typename Key>
auto Lookup(const Map& map, const Key& key) -> decltype(map.begin()->second.get()) {
  const auto it = map.find(key);
  return it == map.end() ? nullptr : it->second.get();
}
}  // namespace

const v1::JobRecord* State::job(JobId id) const { return Lookup(jobs_, id.value); }
const v1::AttemptRecord* State::attempt(JobId job, uint32_t number) const {
  return Lookup(attempts_, AttemptKey{job.value, number});
}
const v1::AttemptRecord* State::attempt_of(Fence fence) const {
  const auto it = by_fence_.find(fence.value);
  return it == by_fence_.end() ? nullptr : Lookup(attempts_, it->second);
}
const v1::TaskRecord* State::task(JobId job, uint32_t attempt, uint32_t task) const {
  return Lookup(tasks_, TaskKey{job.value, attempt, task});
}
const v1::WorkerRecord* State::worker(const std::string& id) const {
  const auto it = nodes_.find(id);
  return it == nodes_.end() ? nullptr : it->second.record.get();
}
const v1::CheckpointRecord* State::checkpoint(const CheckpointKey& key) const {
  return Lookup(checkpoints_, key);
}
const v1::IdempotencyRecord* State::idempotency(const std::string& identity,
                                                const std::string& request_id) const {
  return Lookup(idempotency_, std::make_pair(identity, request_id));
}
const Observation* State::observed(Fence fence) const {
  const auto it = observed_.find(fence.value);
  return it == observed_.end() ? nullptr : &it->second;
}
const Progress* State::progress(Fence fence) const {
  const auto it = progress_.find(fence.value);
  return it == progress_.end() ? nullptr : &it->second;
}

std::vector<AttemptPtr> State::AttemptsOf(JobId job) const {
  std::vector<AttemptPtr> found;
  for (auto it = attempts_.lower_bound({job.value, 0});
       it != attempts_.end() && it->first.first == job.value; ++it) {
    found.push_back(it->second);
  }
  return found;
}

std::vector<TaskPtr> State::TasksOf(JobId job, uint32_t attempt) const {
  std::vector<TaskPtr> found;
  for (auto it = tasks_.lower_bound({job.value, attempt, 0});
       it != tasks_.end() && std::get<0>(it->first) == job.value &&
       std::get<1>(it->first) == attempt;
       ++it) {
    found.push_back(it->second);
  }
  return found;
}

std::vector<CheckpointPtr> State::CheckpointsOf(JobId job) const {
  std::vector<CheckpointPtr> found;
  for (auto it = checkpoints_.lower_bound({job, Fence{0}, 0});
       it != checkpoints_.end() && it->first.job == job; ++it) {
    found.push_back(it->second);
  }
  return found;
}

std::vector<JobId> State::WaitingFor(JobId job) const {
  std::vector<JobId> found;
  for (auto it = waiting_.lower_bound({job.value, 0});
       it != waiting_.end() && it->first == job.value; ++it) {
    found.push_back(JobId{it->second});
  }
  return found;
}

std::vector<v1::RecordChange> State::Dump() const {
  std::vector<v1::RecordChange> dump;
  dump.emplace_back();
  *dump.back().mutable_meta() = meta_;
  for (const auto& [key, record] : jobs_) {
    *dump.emplace_back().mutable_job() = *record;
  }
  for (const auto& [key, record] : attempts_) {
    *dump.emplace_back().mutable_attempt() = *record;
  }
  for (const auto& [key, record] : tasks_) {
    *dump.emplace_back().mutable_task() = *record;
  }
  for (const auto& [key, entry] : nodes_) {
    if (entry.record != nullptr) {
      *dump.emplace_back().mutable_worker() = *entry.record;
    }
  }
  for (const auto& [key, record] : checkpoints_) {
    *dump.emplace_back().mutable_checkpoint() = *record;
  }
  for (const auto& [key, record] : idempotency_) {
    *dump.emplace_back().mutable_idempotency() = *record;
  }
  return dump;
}

// ---- questions --------------------------------------------------------------------------------

bool HoldsPermit(const State& state, const v1::TaskRecord& task) {
  const v1::JobRecord* job = state.job(JobId{task.job()});
  const v1::AttemptRecord* attempt = state.attempt(JobId{task.job()}, task.attempt());
  return job != nullptr && attempt != nullptr && !IsFinal(task.state()) &&
         job->current_fence() == task.fence() && attempt->fence() == task.fence() &&
         attempt->state() != v1::ATTEMPT_STATE_FENCING &&
         attempt->state() != v1::ATTEMPT_STATE_ENDED;
}

std::vector<v1::Permit> PermitsFor(const State& state, const std::string& worker,
                                   const Policy& policy) {
  std::vector<v1::Permit> permits;
  const auto it = state.nodes().find(worker);
  if (it == state.nodes().end()) {
    return permits;
  }
  for (const TaskKey& key : it->second.booked) {
    const v1::TaskRecord& task = *state.tasks().at(key);
    if (HoldsPermit(state, task)) {
      v1::Permit& permit = permits.emplace_back();
      permit.set_fence(task.fence());
      permit.set_ttl_ms(policy.permit_ttl_ms);
    }
  }
  return permits;
}

bool IsSchedulable(const v1::WorkerRecord& worker, int64_t now_ms) {
  return worker.state() == v1::WORKER_STATE_CONNECTED && worker.admin() == v1::WORKER_ADMIN_OPEN &&
         worker.health() == v1::WORKER_HEALTH_OK && !worker.unverified() &&
         worker.probation_until_ms() <= now_ms;
}

}  // namespace heddle::state
