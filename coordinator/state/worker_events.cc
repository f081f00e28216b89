// Workers: registration (X2), reports (4.3), silence and loss (W1, W2, L8), administration (W3).
#include <algorithm>

#include "coordinator/state/actions.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/names.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

AttemptId AttemptOfKey(const TaskKey& key) { return {JobId{std::get<0>(key)}, std::get<1>(key)}; }

// A report with news. An end is the last word about a task, whatever its number: numbers are not
// synced with each report, so that a machine that lost power counts anew from an older one.
bool IsNews(const Decision& d, const v1::TaskRecord& task, const v1::TaskReport& report) {
  const bool last_word = IsFinal(report.state()) && !MutantsOf(d.policy()).final_by_number;
  return !IsFinal(task.state()) && (last_word || report.seq() > task.seq());
}

// Newer facts of a report into the task's record. True if the ranks' ends changed.
void Merge(v1::TaskRecord& task, const v1::TaskReport& report) {
  task.set_seq(std::max<uint64_t>(task.seq(), report.seq()));
  task.set_state(report.state());
  const bool lives =
      report.state() != v1::TASK_STATE_ASSIGNED && report.state() != v1::TASK_STATE_GONE;
  task.set_acknowledged(task.acknowledged() || report.acknowledged() ||
                        (lives && report.state() != v1::TASK_STATE_EXITED));
  if (!report.data_address().empty()) {
    task.set_data_address(report.data_address());
  }
  if (!report.detail().empty()) {
    task.set_detail(report.detail().substr(0, 1024));
  }
  for (const uint32_t rank : report.joined_ranks()) {
    const bool ours = rank >= task.first_rank() && rank < task.first_rank() + task.ranks();
    if (ours &&
        std::find(task.joined().begin(), task.joined().end(), rank) == task.joined().end()) {
      task.add_joined(rank);
    }
  }
  for (const v1::RankOutcome& exit : report.exits()) {
    const auto known =
        std::find_if(task.mutable_exits()->begin(), task.mutable_exits()->end(),
                     [&exit](const v1::RankOutcome& one) { return one.rank() == exit.rank(); });
    if (known != task.mutable_exits()->end()) {
      *known = exit;
    } else {
      *task.add_exits() = exit;
    }
  }
  if (IsFinal(report.state())) {
    task.clear_orphan_ms();
    if (report.state() == v1::TASK_STATE_GONE) {
      task.set_gone_reason(report.detail().empty() ? "the worker does not have it"
                                                   : report.detail());
    }
  }
}

}  // namespace

Status CheckSession(Decision& d, const std::string& worker, uint64_t session) {
  d.SetActor(worker);
  const v1::WorkerRecord* record = d.worker(worker);
  const char* why = nullptr;
  if (record == nullptr) {
    why = "not registered";
  } else if (record->session() != session) {
    why = "an old session";
  } else if (record->unverified()) {
    why = "the coordinator has restarted";
  } else if (record->state() == v1::WORKER_STATE_LOST || record->state() == v1::WORKER_STATE_LEFT) {
    why = "it was given up";
  }
  if (why == nullptr) {
    return OkStatus();
  }
  d.Do(effect::SendStale{worker, session, why});
  return Aborted(Str("worker ", worker, ": ", why, "; register anew"));
}

void TakeReport(Decision& d, AttemptId id, const v1::TaskReport& report) {
  v1::TaskRecord& task = d.Edit(id, report.task());
  Merge(task, report);
  const std::string worker = task.worker();
  const bool final = IsFinal(task.state());
  if (report.start_step() > 0) {
    d.Edit(id).set_start_step(report.start_step());
  }
  if (std::any_of(task.exits().begin(), task.exits().end(), IsPeerFailure)) {
    d.Edit(id).set_peer_evidence(true);
  }
  d.Note(id, "TASK_REPORT",
         Str("task ", report.task(), " on ", worker, " ", Name(report.state()),
             task.joined_size() > 0 ? Str(", joined ", task.joined_size(), "/", task.ranks()) : "",
             report.detail().empty() ? "" : ": ", report.detail()));
  FindFromExits(d, id, report);
  if (final) {
    d.Do(effect::WakeScheduler{});
  }
  AttemptStep step;
  step.attempt = id;
  StepAttempt(d, step);
  Corroborate(d, id);
  if (final) {
    CheckDrained(d, worker);
  }
}

void Corroborate(Decision& d, AttemptId id) {
  const v1::AttemptRecord* attempt = d.attempt(id);
  if (!IsLive(attempt->state()) || !attempt->peer_evidence()) {
    return;
  }
  for (const v1::TaskRecord* task : d.Tasks(id)) {
    const v1::WorkerRecord* worker = d.worker(task->worker());
    if (!IsFinal(task->state()) && worker != nullptr && !worker->unverified() &&
        worker->state() == v1::WORKER_STATE_SUSPECT) {
      AttemptStep step;
      step.attempt = id;
      step.input = AttemptInput::kWorkerLost;
      step.worker = task->worker();
      step.text = "silent, and a peer lost its connection to it";
      StepAttempt(d, step);
      return;
    }
  }
}

Status On(Decision& d, const event::TaskReported& e) {
  RETURN_IF_ERROR(CheckSession(d, e.worker, e.session));
  const v1::TaskReport& report = e.report;
  const Fence fence{report.fence()};
  const v1::AttemptRecord* attempt = d.attempt_of(fence);
  const v1::TaskRecord* task = attempt == nullptr ? nullptr : d.task(IdOf(*attempt), report.task());
  const bool final = IsFinal(report.state());
  if (task == nullptr || task->worker() != e.worker || IsFinal(task->state())) {
    if (final) {
      SendForget(d, e.worker, fence, report.task());
    } else {
      SendKillFenced(d, e.worker, fence, report.task(), Fence{});
    }
    return OkStatus();
  }
  const AttemptId id = IdOf(*attempt);
  const Fence current{d.job(id.job)->current_fence()};
  if (!final && (current != fence || !IsLive(attempt->state()))) {  // A16
    SendKillFenced(d, e.worker, fence, report.task(), current);
    return OkStatus();
  }
  v1::ReportAck ack;
  ack.set_fence(fence.value);
  ack.set_task(report.task());
  ack.set_seq(std::max<uint64_t>(report.seq(), task->seq()));
  if (IsNews(d, *task, report)) {
    TakeReport(d, id, report);
  }
  d.Do(effect::SendAck{e.worker, std::move(ack)});
  if (final) {
    SendForget(d, e.worker, fence, report.task());
  }
  return OkStatus();
}

// ---- registration -----------------------------------------------------------------------------

namespace {

// The session must rise within an instance: a delayed registration with an old list of tasks would
// make running ones GONE.
Status CheckRegistration(const v1::WorkerRecord* known, const v1::RegisterRequest& request) {
  if (request.worker_id().empty() || request.instance().empty() || request.session() == 0) {
    return InvalidArgument("a registration needs worker_id, instance and session");
  }
  // A registration of before the machine's restart, late in the network, would do the same. It may
  // be of an instance that was never heard of: taken for the follower, it would keep the true one
  // out for good.
  if (known != nullptr && request.boot() != 0 && request.boot() < known->boot()) {
    return Aborted(Str("instance ", request.instance(), " is older than ", known->instance(),
                       "; if this node is right, forget it first: heddle node forget"));
  }
  const bool newer = known != nullptr && request.boot() > known->boot();
  if (known != nullptr && !newer &&
      std::find(known->former_instances().begin(), known->former_instances().end(),
                request.instance()) != known->former_instances().end()) {
    return Aborted(Str("instance ", request.instance(), " was followed by ", known->instance(),
                       "; if this node is right, forget it first: heddle node forget"));
  }
  if (known != nullptr && known->instance() == request.instance() &&
      request.session() <= known->session()) {
    return Aborted(Str("session ", request.session(), " is not newer than ", known->session(),
                       "; register anew"));
  }
  return OkStatus();
}

void RecordWorker(Decision& d, const v1::RegisterRequest& request) {
  const v1::WorkerRecord* known = d.worker(request.worker_id());
  const bool fresh = known == nullptr;
  const bool rebooted = !fresh && known->instance() != request.instance();
  v1::WorkerRecord& worker = fresh ? d.AddWorker(request.worker_id()) : d.Edit(request.worker_id());
  if (worker.state() == v1::WORKER_STATE_LOST && worker.lost_ms_size() >= 2 &&
      worker.lost_ms(0) > d.now().ms - d.policy().lost_twice_ms) {
    worker.set_probation_until_ms(d.now().ms + d.policy().probation_ms);
  }
  if (rebooted) {
    worker.add_former_instances(worker.instance());
    while (worker.former_instances_size() > 8) {
      worker.mutable_former_instances()->erase(worker.mutable_former_instances()->begin());
    }
  }
  worker.set_instance(request.instance());
  worker.set_boot(request.boot());
  worker.set_session(request.session());
  worker.set_host(request.host());
  *worker.mutable_capacity() = request.capacity();
  worker.set_version(request.version());
  worker.set_state(v1::WORKER_STATE_CONNECTED);
  worker.set_unverified(false);
  worker.set_registered_at(d.now().wall_ms);
  worker.set_changed_at(d.now().wall_ms);
  d.NoteWorker(worker.id(), "NODE_CONNECTED",
               Str(worker.host(),
                   fresh      ? ", new"
                   : rebooted ? ", restarted"
                              : "",
                   ", ", request.tasks_size(), " tasks"));
  d.Do(effect::WakeScheduler{});
}

// The record a reported task belongs to; nullptr if this worker has no business with it.
const v1::TaskRecord* Match(const Decision& d, const std::string& worker,
                            const v1::TaskReport& report) {
  const v1::AttemptRecord* attempt = d.attempt_of(Fence{report.fence()});
  const v1::TaskRecord* task = attempt == nullptr ? nullptr : d.task(IdOf(*attempt), report.task());
  return task != nullptr && task->worker() == worker ? task : nullptr;
}

bool IsFenced(const Decision& d, const v1::TaskRecord& task) {
  return d.job(JobId{task.job()})->current_fence() != task.fence() ||
         !IsLive(d.attempt(AttemptOf(task))->state());
}

v1::TaskVerdict VerdictOf(const Decision& d, const std::string& worker,
                          const v1::TaskReport& report, std::string* reason) {
  const v1::TaskRecord* task = Match(d, worker, report);
  if (IsFinal(report.state())) {
    return v1::TASK_VERDICT_FORGET;
  }
  if (task == nullptr || IsFinal(task->state()) || IsFenced(d, *task)) {
    *reason = "its fence is not current";
    return v1::TASK_VERDICT_KILL_FENCED;
  }
  const v1::AttemptRecord& attempt = *d.attempt(AttemptOf(*task));
  if (attempt.state() == v1::ATTEMPT_STATE_STOPPING &&
      attempt.stop_phase() != v1::STOP_PHASE_COLLECT) {
    *reason = Name(attempt.stop_reason());
    return v1::TASK_VERDICT_STOP;
  }
  return v1::TASK_VERDICT_ADOPT;
}

// Tasks that the records place on this worker, but that it did not list.
void SettleUnlisted(Decision& d, const v1::RegisterRequest& request) {
  for (const TaskKey& key : BookedOn(d, request.worker_id())) {
    const AttemptId id = AttemptOfKey(key);
    const v1::TaskRecord* task = d.task(id, std::get<2>(key));
    const uint64_t fence = task->fence();
    const bool listed = std::any_of(
        request.tasks().begin(), request.tasks().end(), [&](const v1::TaskReport& report) {
          return report.fence() == fence && report.task() == std::get<2>(key);
        });
    if (listed || IsFinal(task->state())) {
      continue;
    }
    const bool again = !task->acknowledged() &&
                       d.attempt(id)->state() == v1::ATTEMPT_STATE_ALLOCATED &&
                       !MutantsOf(d.policy()).unacknowledged_is_gone;
    if (again) {
      Remind(d, id, *task);
    } else {
      MarkGone(
          d, id, std::get<2>(key),
          task->acknowledged() ? "the worker came back without it" : "the worker never had it");
    }
  }
}

}  // namespace

Status On(Decision& d, const event::WorkerRegistered& e) {
  const v1::RegisterRequest& request = e.request;
  const std::string& id = request.worker_id();
  RETURN_IF_ERROR(CheckRegistration(d.worker(id), request));
  d.SetActor(id);
  RecordWorker(d, request);
  for (const TaskKey& key : BookedOn(d, id)) {
    if (d.task(AttemptOfKey(key), std::get<2>(key))->orphan_ms() > 0) {
      d.Edit(AttemptOfKey(key), std::get<2>(key)).clear_orphan_ms();
    }
  }
  for (const v1::TaskReport& report : request.tasks()) {
    const v1::TaskRecord* task = Match(d, id, report);
    if (task == nullptr || !IsNews(d, *task, report) ||
        (!IsFinal(report.state()) && IsFenced(d, *task))) {
      continue;
    }
    TakeReport(d, AttemptOf(*task), report);
  }
  SettleUnlisted(d, request);
  CheckDrained(d, id);
  v1::RegisterReply reply;
  reply.set_cluster_id(d.meta().cluster_id());
  reply.set_term(d.meta().term());
  reply.set_heartbeat_interval_ms(d.policy().heartbeat_interval_ms);
  reply.set_permit_ttl_ms(d.policy().permit_ttl_ms);
  reply.set_max_orphan_ms(d.policy().max_orphan_ms);
  for (const v1::TaskReport& report : request.tasks()) {
    v1::RegisterReply::TaskDecision& decision = *reply.add_tasks();
    std::string reason;
    decision.set_fence(report.fence());
    decision.set_task(report.task());
    decision.set_verdict(VerdictOf(d, id, report, &reason));
    decision.set_reason(reason);
    const v1::TaskRecord* task = Match(d, id, report);
    if (task != nullptr && decision.verdict() != v1::TASK_VERDICT_FORGET) {
      Remind(d, AttemptOf(*task), *task);
    }
  }
  d.SetRegistration(std::move(reply));
  return OkStatus();
}

// ---- silence ----------------------------------------------------------------------------------

Status On(Decision& d, const event::WorkerSuspect& e) {
  const v1::WorkerRecord* record = d.worker(e.worker);
  if (record == nullptr) {
    return NotFound(Str("no worker ", e.worker));
  }
  if (record->session() != e.session || record->state() != v1::WORKER_STATE_CONNECTED) {
    return FailedPrecondition(Str("worker ", e.worker, " is ", Name(record->state())));
  }
  v1::WorkerRecord& worker = d.Edit(e.worker);
  worker.set_state(v1::WORKER_STATE_SUSPECT);
  worker.set_changed_at(d.now().wall_ms);
  d.NoteWorker(e.worker, "NODE_SUSPECT", e.reason);
  for (const TaskKey& key : BookedOn(d, e.worker)) {
    Corroborate(d, AttemptOfKey(key));
  }
  return OkStatus();
}

Status On(Decision& d, const event::WorkerHeard& e) {
  const v1::WorkerRecord* record = d.worker(e.worker);
  if (record == nullptr) {
    return NotFound(Str("no worker ", e.worker));
  }
  if (record->session() != e.session || record->state() != v1::WORKER_STATE_SUSPECT ||
      record->unverified()) {
    return FailedPrecondition(Str("worker ", e.worker, " is ", Name(record->state())));
  }
  v1::WorkerRecord& worker = d.Edit(e.worker);
  worker.set_state(v1::WORKER_STATE_CONNECTED);
  worker.set_changed_at(d.now().wall_ms);
  d.NoteWorker(e.worker, "NODE_CONNECTED", "heard again");
  d.Do(effect::WakeScheduler{});
  return OkStatus();
}

namespace {

// No word will come from this worker: its attempts are fenced, its tasks run out (L5, A11).
void GiveUp(Decision& d, const std::string& worker, const std::string& why) {
  const std::vector<TaskKey> booked = BookedOn(d, worker);
  for (const TaskKey& key : booked) {
    v1::TaskRecord& task = d.Edit(AttemptOfKey(key), std::get<2>(key));
    task.set_orphan_ms(d.now().ms + d.policy().max_orphan_ms + d.policy().orphan_margin_ms);
  }
  for (const TaskKey& key : booked) {
    if (!IsLive(d.attempt(AttemptOfKey(key))->state())) {
      continue;
    }
    AttemptStep step;
    step.attempt = AttemptOfKey(key);
    step.input = AttemptInput::kWorkerLost;
    step.worker = worker;
    step.text = why;
    StepAttempt(d, step);
  }
  if (MutantsOf(d.policy()).gone_without_proof) {
    for (const TaskKey& key : booked) {
      MarkGone(d, AttemptOfKey(key), std::get<2>(key), "mutant");
    }
  }
}

}  // namespace

Status On(Decision& d, const event::WorkerLost& e) {
  const v1::WorkerRecord* record = d.worker(e.worker);
  if (record == nullptr) {
    return NotFound(Str("no worker ", e.worker));
  }
  if (record->session() != e.session || record->state() != v1::WORKER_STATE_SUSPECT) {
    return FailedPrecondition(Str("worker ", e.worker, " is ", Name(record->state())));
  }
  v1::WorkerRecord& worker = d.Edit(e.worker);
  worker.set_state(v1::WORKER_STATE_LOST);
  worker.set_changed_at(d.now().wall_ms);
  worker.add_lost_ms(d.now().ms);
  while (worker.lost_ms_size() > 2) {
    worker.mutable_lost_ms()->erase(worker.mutable_lost_ms()->begin());
  }
  d.NoteWorker(e.worker, "NODE_LOST", "no word since its last permit ran out");
  // Its stream may stand: a daemon that was stopped reads this when it goes on, and registers anew.
  d.Do(effect::SendStale{e.worker, e.session, "it was given up"});
  GiveUp(d, e.worker, "lost: no word since its last permit ran out");
  return OkStatus();
}

Status On(Decision& d, const event::WorkerLeft& e) {
  RETURN_IF_ERROR(CheckSession(d, e.worker, e.session));
  v1::WorkerRecord& worker = d.Edit(e.worker);
  worker.set_state(v1::WORKER_STATE_LEFT);
  worker.set_changed_at(d.now().wall_ms);
  d.NoteWorker(e.worker, "NODE_LEFT", e.reason);
  GiveUp(d, e.worker, "its worker left");
  return OkStatus();
}

// ---- administration ---------------------------------------------------------------------------

namespace {

void Drain(Decision& d, const event::NodeAdministered& e) {
  const int64_t grace = std::clamp<int64_t>(e.grace_ms.value_or(d.policy().stop_grace_ms), 0,
                                            d.policy().stop_grace_ms_max);
  for (const TaskKey& key : BookedOn(d, e.node)) {
    AttemptStep step;
    step.attempt = AttemptOfKey(key);
    step.input = AttemptInput::kStop;
    step.reason = v1::STOP_REASON_DRAIN;
    step.grace_ms = grace;
    step.text = Str("node ", e.node, " is drained", e.reason.empty() ? "" : ": ", e.reason);
    StepAttempt(d, step);
  }
}

Status ForgetNode(Decision& d, const event::NodeAdministered& e, const v1::WorkerRecord& worker) {
  if (worker.state() != v1::WORKER_STATE_LOST && worker.state() != v1::WORKER_STATE_LEFT) {
    return FailedPrecondition(Str("cannot forget node ", e.node, ": it is ", Name(worker.state()),
                                  "; only LOST and LEFT nodes"));
  }
  d.NoteWorker(e.node, "NODE_FORGOTTEN", e.reason);
  for (const TaskKey& key : BookedOn(d, e.node)) {
    MarkGone(d, AttemptOfKey(key), std::get<2>(key), "its node was forgotten");
  }
  d.DeleteWorker(e.node);
  return OkStatus();
}

void Reopen(v1::WorkerRecord& worker) {
  worker.set_admin(v1::WORKER_ADMIN_OPEN);
  worker.set_health(v1::WORKER_HEALTH_OK);
  worker.clear_health_reason();
  worker.clear_quarantined_until_ms();
  worker.clear_probation_until_ms();
  worker.clear_blamed_ms();
  worker.clear_lost_ms();
}

}  // namespace

Status On(Decision& d, const event::NodeAdministered& e) {
  const v1::WorkerRecord* known = d.worker(e.node);
  if (known == nullptr) {
    return NotFound(Str("no node ", e.node));
  }
  d.SetActor(e.request.identity);
  if (e.verb == v1::NODE_VERB_FORGET) {
    return ForgetNode(d, e, *known);
  }
  const bool draining =
      known->admin() == v1::WORKER_ADMIN_DRAINING || known->admin() == v1::WORKER_ADMIN_DRAINED;
  if ((e.verb == v1::NODE_VERB_DRAIN && draining) ||
      (e.verb == v1::NODE_VERB_CORDON && known->admin() == v1::WORKER_ADMIN_CORDONED) ||
      (e.verb == v1::NODE_VERB_REOPEN && known->admin() == v1::WORKER_ADMIN_OPEN &&
       known->health() == v1::WORKER_HEALTH_OK && known->probation_until_ms() == 0)) {
    return OkStatus();
  }
  if (e.verb == v1::NODE_VERB_CORDON && draining) {
    return FailedPrecondition(Str("node ", e.node, " is ", Name(known->admin()), ": reopen it"));
  }
  v1::WorkerRecord& worker = d.Edit(e.node);
  worker.set_admin_reason(e.reason);
  worker.set_changed_at(d.now().wall_ms);
  switch (e.verb) {
    case v1::NODE_VERB_CORDON:
      worker.set_admin(v1::WORKER_ADMIN_CORDONED);
      d.NoteWorker(e.node, "NODE_CORDONED", e.reason);
      break;
    case v1::NODE_VERB_DRAIN:
      worker.set_admin(v1::WORKER_ADMIN_DRAINING);
      d.NoteWorker(e.node, "NODE_DRAINING", e.reason);
      Drain(d, e);
      CheckDrained(d, e.node);
      break;
    default:
      Reopen(worker);
      d.NoteWorker(e.node, "NODE_OPEN", e.reason);
      d.Do(effect::WakeScheduler{});
  }
  return OkStatus();
}

}  // namespace heddle::state
