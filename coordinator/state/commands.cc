// Messages to workers, built from records: sending one again gives the same bytes (P10).
#include "coordinator/state/actions.h"
#include "coordinator/state/names.h"
#include "coordinator/state/secret.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

std::vector<std::string> PeersOf(const Decision& d, const v1::AttemptRecord& attempt) {
  std::vector<std::string> peers;
  for (const v1::TaskRecord* task : d.Tasks(IdOf(attempt))) {
    peers.insert(peers.end(), task->ranks(), task->data_address());
  }
  return peers;
}

v1::StopMode ModeOf(const v1::AttemptRecord& attempt) {
  return attempt.stop_phase() == v1::STOP_PHASE_GRACE ? v1::STOP_MODE_CHECKPOINT_AND_EXIT
                                                      : v1::STOP_MODE_EXIT;
}

}  // namespace

void SendAssign(Decision& d, AttemptId id, const v1::TaskRecord& task) {
  const v1::AttemptRecord& attempt = *d.attempt(id);
  const v1::JobRecord& job = *d.job(id.job);
  effect::SendAssign send;
  send.worker = task.worker();
  v1::TaskAssignment& assign = send.assign;
  assign.set_job(id.job.value);
  assign.set_attempt(id.number);
  assign.set_fence(attempt.fence());
  assign.set_task(task.task());
  *assign.mutable_config() = job.config();
  for (uint32_t i = 0; i < task.ranks(); ++i) {
    assign.add_ranks(task.first_rank() + i);
  }
  assign.set_world_size(attempt.world_size());
  assign.set_restarts(job.restarts());
  for (const v1::CheckpointKeyRecord& key : attempt.restore()) {
    const v1::CheckpointRecord* record =
        d.checkpoint({JobId{key.job()}, Fence{key.fence()}, key.step()});
    if (record != nullptr && record->state() == v1::CHECKPOINT_STATE_COMMITTED) {
      *assign.add_restore() = *record;
    }
  }
  assign.set_attempt_dir(AttemptDir(id.job, Fence{attempt.fence()}));
  assign.set_cpus_per_rank(task.cpus_per_rank());
  assign.set_memory_per_rank(task.memory_per_rank());
  *assign.mutable_gpu_indices() = task.gpu_indices();
  *assign.mutable_skipped() = job.skipped();
  d.Do(std::move(send));
}

void SendStart(Decision& d, AttemptId id, const v1::TaskRecord& task) {
  const v1::AttemptRecord& attempt = *d.attempt(id);
  effect::SendStart send;
  send.worker = task.worker();
  send.start.set_job(id.job.value);
  send.start.set_fence(attempt.fence());
  send.start.set_task(task.task());
  v1::StartRank& start = *send.start.mutable_start();
  start.set_world_size(attempt.world_size());
  for (std::string& peer : PeersOf(d, attempt)) {
    start.add_peers(std::move(peer));
  }
  start.set_secret(AttemptSecret(d.meta().secret(), Fence{attempt.fence()}));
  start.set_deadline_ms(d.policy().rendezvous_ms);
  d.Do(std::move(send));
}

void SendStop(Decision& d, AttemptId id, const v1::TaskRecord& task) {
  const v1::AttemptRecord& attempt = *d.attempt(id);
  effect::SendStop send;
  send.worker = task.worker();
  send.stop.set_job(id.job.value);
  send.stop.set_fence(attempt.fence());
  send.stop.set_task(task.task());
  send.stop.set_kill_now(attempt.stop_phase() == v1::STOP_PHASE_KILL);
  v1::StopRank& stop = *send.stop.mutable_stop();
  stop.set_mode(ModeOf(attempt));
  stop.set_grace_ms(attempt.stop_phase() == v1::STOP_PHASE_GRACE ? attempt.grace_ms() : 0);
  stop.set_reason(Name(attempt.stop_reason()));
  d.Do(std::move(send));
}

void SendKillFenced(Decision& d, const std::string& worker, Fence fence, uint32_t task, Fence now) {
  effect::SendKillFenced send;
  send.worker = worker;
  send.kill.set_fence(fence.value);
  send.kill.set_task(task);
  send.kill.set_current_fence(now.value);
  d.Do(std::move(send));
}

void SendForget(Decision& d, const std::string& worker, Fence fence, uint32_t task) {
  effect::SendForget send;
  send.worker = worker;
  send.forget.set_fence(fence.value);
  send.forget.set_task(task);
  d.Do(std::move(send));
}

void SendCollectStacks(Decision& d, AttemptId id) {
  for (const v1::TaskRecord* task : d.Tasks(id)) {
    if (IsFinal(task->state())) {
      continue;
    }
    effect::CollectStacks send;
    send.worker = task->worker();
    send.collect.set_job(id.job.value);
    send.collect.set_fence(task->fence());
    send.collect.set_task(task->task());
    d.Do(std::move(send));
  }
}

bool Remind(Decision& d, AttemptId id, const v1::TaskRecord& task) {
  const v1::AttemptRecord& attempt = *d.attempt(id);
  const v1::WorkerRecord* worker = d.worker(task.worker());
  if (IsFinal(task.state()) || worker == nullptr || worker->state() != v1::WORKER_STATE_CONNECTED) {
    return false;
  }
  switch (attempt.state()) {
    case v1::ATTEMPT_STATE_ALLOCATED:
      if (task.acknowledged()) {
        return false;
      }
      SendAssign(d, id, task);
      return true;
    case v1::ATTEMPT_STATE_RENDEZVOUS:
      if (task.state() == v1::TASK_STATE_RUNNING) {
        return false;
      }
      SendStart(d, id, task);
      return true;
    case v1::ATTEMPT_STATE_STOPPING:
      if (attempt.stop_phase() == v1::STOP_PHASE_COLLECT ||
          (attempt.stop_phase() == v1::STOP_PHASE_GRACE &&
           task.state() == v1::TASK_STATE_STOPPING)) {
        return false;
      }
      SendStop(d, id, task);
      return true;
    case v1::ATTEMPT_STATE_FENCING: {
      const v1::JobRecord& job = *d.job(id.job);
      SendKillFenced(d, task.worker(), Fence{task.fence()}, task.task(),
                     Fence{job.current_fence()});
      return true;
    }
    default:
      return false;
  }
}

}  // namespace heddle::state
