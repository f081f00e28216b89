#include "coordinator/rpc/views.h"

#include <algorithm>

#include "checkpoint/catalog/lineage.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/names.h"
#include "coordinator/state/rollback.h"

namespace heddle::rpc {
namespace {

// A job that goes on for months has more of them than one message holds: the newest are shown.
constexpr size_t kAttemptsInDetail = 200;
constexpr size_t kCheckpointsInDetail = 1'000;

size_t BeginOfNewest(size_t all, size_t shown) { return all - std::min(all, shown); }

v1::Cause CauseView(const v1::CauseRecord& record) {
  v1::Cause view;
  view.set_code(record.code());
  view.set_category(record.category());
  if (record.has_rank()) {
    view.set_rank(record.rank());
  }
  view.set_node(record.node());
  view.set_at(record.at());
  view.set_detail(record.detail());
  view.set_advice(state::AdviceFor(record.code(), record.category()));
  return view;
}

std::string CheckpointName(uint64_t job, uint64_t step) {
  return Str(ToText(JobId{job}), "@", step);
}

const v1::AttemptRecord* NewestAttempt(const state::State& state, const v1::JobRecord& record) {
  return record.attempts() == 0 ? nullptr : state.attempt(JobId{record.id()}, record.attempts());
}

// Live progress first, then the last metric point, then what the records kept.
void SetProgress(Core& core, const v1::JobRecord& record, v1::Job* view) {
  uint64_t step = record.best_step();
  if (const v1::MetricPoint* point = core.LastPoint(record.id()); point != nullptr) {
    step = point->step();
    view->set_loss(point->loss());
    view->set_tokens_per_second(point->tokens_per_second());
  }
  view->set_step(step);
}

std::vector<v1::CheckpointRecord> Copies(const std::vector<state::CheckpointPtr>& records) {
  std::vector<v1::CheckpointRecord> copies;
  for (const state::CheckpointPtr& record : records) {
    copies.push_back(*record);
  }
  return copies;
}

}  // namespace

v1::Event EventView(const v1::EventRecord& record) {
  v1::Event view;
  view.set_seq(record.seq());
  view.set_at(record.at());
  view.set_actor(record.actor());
  view.set_target(record.target());
  view.set_code(record.code());
  view.set_text(record.text());
  return view;
}

v1::Attempt AttemptView(const state::State& state, const v1::AttemptRecord& record) {
  v1::Attempt view;
  view.set_number(record.number());
  view.set_fence(record.fence());
  view.set_state(state::Name(record.state()));
  view.set_outcome(state::Name(record.outcome()));
  for (const state::TaskPtr& task : state.TasksOf(JobId{record.job()}, record.number())) {
    view.add_workers(task->worker());
  }
  if (record.has_cause()) {
    *view.mutable_cause() = CauseView(record.cause());
  }
  for (const v1::CauseRecord& other : record.others()) {
    *view.add_others() = CauseView(other);
  }
  view.set_started_at(record.created_at());
  view.set_running_at(record.running_at());
  view.set_ended_at(record.ended_at());
  view.set_start_step(record.start_step());
  const state::Progress* progress = state.progress(Fence{record.fence()});
  view.set_last_step(progress != nullptr ? std::max(progress->step, record.last_step())
                                         : record.last_step());
  return view;
}

v1::Checkpoint CheckpointView(const v1::CheckpointRecord& record) {
  v1::Checkpoint view;
  view.set_id(CheckpointName(record.job(), record.step()));
  view.set_step(record.step());
  view.set_fence(record.fence());
  view.set_state(state::Name(record.state()));
  view.set_bytes(record.bytes());
  view.set_ranks(record.world_size());
  view.set_created_at(record.created_at());
  if (record.has_parent_step()) {
    view.set_parent(CheckpointName(record.job(), record.parent_step()));
  }
  view.set_pinned(record.pinned());
  view.set_verified(record.verified());
  view.set_damaged(record.damaged());
  view.set_dir(record.dir());
  return view;
}

v1::Node NodeView(const Core& core, const state::NodeEntry& entry) {
  const v1::WorkerRecord& record = *entry.record;
  v1::Node view;
  view.set_id(record.id());
  view.set_host(record.host());
  view.set_state(state::Name(record.state()));
  view.set_admin(state::Name(record.admin()));
  view.set_health(state::Name(record.health()));
  if (!record.health_reason().empty()) {
    view.set_health_reason(record.health_reason());
  }
  if (record.health() == v1::WORKER_HEALTH_QUARANTINED && record.quarantined_until_ms() > 0) {
    view.set_quarantined_until_ms(record.quarantined_until_ms());
  }
  view.set_cpus(record.capacity().cpus());
  view.set_memory_bytes(record.capacity().memory_bytes());
  view.set_gpus(record.capacity().gpus());
  view.set_cpus_free(std::max(0.0, record.capacity().cpus() - entry.cpus_used));
  view.set_memory_free_bytes(record.capacity().memory_bytes() > entry.memory_used
                                 ? record.capacity().memory_bytes() - entry.memory_used
                                 : 0);
  uint32_t ranks = 0;
  for (const state::TaskKey& key : entry.booked) {
    const auto& [job, attempt, number] = key;
    const v1::TaskRecord* task = core.state().task(JobId{job}, attempt, number);
    if (task != nullptr) {
      ranks += task->ranks();
      view.add_jobs(ToText(JobId{job}));
    }
  }
  view.set_ranks_running(ranks);
  view.set_last_heartbeat_ms(core.HeardAgeMs(record.id()));
  view.set_version(record.version());
  for (const std::string& label : record.capacity().labels()) {
    view.add_labels(label);
  }
  return view;
}

v1::Job JobView(Core& core, const v1::JobRecord& record) {
  const v1::RunConfig& config = record.config();
  const bool command = config.kind() == v1::RunConfig::KIND_COMMAND;
  v1::Job view;
  view.set_id(ToText(JobId{record.id()}));
  view.set_name(record.name());
  view.set_state(state::Name(record.state()));
  view.set_result(state::Name(record.result()));
  view.set_reason(record.text().empty()
                      ? record.reason()
                      : Str(record.reason(), record.reason().empty() ? "" : ": ", record.text()));
  view.set_account(config.schedule().account());
  view.set_priority(static_cast<int32_t>(config.schedule().priority()));
  view.set_ranks(state::RanksOf(config));
  view.set_max_steps(command ? 0 : static_cast<uint64_t>(config.training().max_steps()));
  const uint32_t first = std::max<uint32_t>(record.first_attempt(), 1);
  view.set_restarts(record.attempts() > first ? record.attempts() - first : 0);
  view.set_submitted_at(record.submitted_at());
  view.set_started_at(record.started_at());
  view.set_finished_at(record.finished_at());
  view.set_version(record.version());
  view.set_kind(command ? "command" : "train");
  const bool running =
      record.state() == v1::JOB_STATE_ACTIVE || record.state() == v1::JOB_STATE_STOPPING;
  if (const v1::AttemptRecord* attempt = NewestAttempt(core.state(), record);
      running && attempt != nullptr) {
    view.set_phase(state::Name(attempt->state()));
  }
  SetProgress(core, record, &view);
  return view;
}

v1::Job JobDetailView(Core& core, const v1::JobRecord& record) {
  v1::Job view = JobView(core, record);
  const JobId id{record.id()};
  const std::vector<state::AttemptPtr> attempts = core.state().AttemptsOf(id);
  for (size_t i = BeginOfNewest(attempts.size(), kAttemptsInDetail); i < attempts.size(); ++i) {
    *view.add_attempts() = AttemptView(core.state(), *attempts[i]);
  }
  std::vector<v1::CheckpointRecord> records = Copies(core.state().CheckpointsOf(id));
  const std::vector<state::RollbackLimit> limits = state::RollbackLimits(core.state(), id);
  const size_t shown = BeginOfNewest(records.size(), kCheckpointsInDetail);
  for (size_t i = 0; i < records.size(); ++i) {
    v1::CheckpointRecord& checkpoint = records[i];
    if (i >= shown || checkpoint.state() != v1::CHECKPOINT_STATE_DELETED) {
      *view.add_checkpoints() = CheckpointView(checkpoint);
    }
    if (state::IsLeftBehind(limits, checkpoint)) checkpoint.set_damaged(true);  // of no lineage
  }
  if (const std::vector<size_t> newest = checkpoint::RestoreCandidates(records, 1);
      !newest.empty()) {
    for (const size_t index : checkpoint::Lineage(records, newest.front())) {
      if (static_cast<size_t>(view.lineage_size()) == kCheckpointsInDetail) break;
      view.add_lineage(CheckpointName(records[index].job(), records[index].step()));
    }
  }
  return view;
}

StatusOr<JobId> FindJob(const state::State& state, const std::string& text) {
  if (const StatusOr<JobId> id = ParseJobId(text); id.ok() && state.job(*id) != nullptr) {
    return *id;
  }
  std::vector<JobId> known;
  known.reserve(state.jobs().size());
  for (const auto& [id, record] : state.jobs()) {
    known.push_back(JobId{id});
  }
  return ResolveJobPrefix(text, known);
}

StatusOr<const v1::CheckpointRecord*> FindCheckpoint(const state::State& state,
                                                     const std::string& text) {
  const size_t at = text.find('@');
  if (at == std::string::npos) {
    return InvalidArgument(Str("checkpoint ", text, ": must be JOB@STEP or JOB@latest"));
  }
  ASSIGN_OR_RETURN(const JobId job, FindJob(state, text.substr(0, at)));
  const std::string step = text.substr(at + 1);
  const std::vector<state::RollbackLimit> limits = state::RollbackLimits(state, job);
  const v1::CheckpointRecord* best = nullptr;
  for (const state::CheckpointPtr& record : state.CheckpointsOf(job)) {
    const bool wanted =
        step == "latest"
            ? checkpoint::IsGood(*record) && !state::IsLeftBehind(limits, *record)
            : Str(record->step()) == step && record->state() == v1::CHECKPOINT_STATE_COMMITTED;
    if (wanted && (best == nullptr || std::pair(record->step(), record->fence()) >
                                          std::pair(best->step(), best->fence()))) {
      best = record.get();
    }
  }
  if (best == nullptr) {
    return NotFound(Str("checkpoint ", text, ": the job has no such committed checkpoint"));
  }
  return best;
}

}  // namespace heddle::rpc
