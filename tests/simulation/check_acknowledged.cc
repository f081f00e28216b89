#include "tests/simulation/checkers.h"

namespace heddle::simulation {

void Checkers::OnSubmitAcknowledged(const std::string& name, JobId id) {
  const auto [known, fresh] = acknowledged_.emplace(name, id.value);
  if (!fresh && known->second != id.value) {
    world_.Violate(
        "I5", Str("submit ", name, " was acknowledged as ", JobId{known->second}, " and as ", id));
  }
}

// I5 in the final records, where names are the request ids.
void Checkers::AtEnd(const state::State& working, const state::State& durable) {
  AfterRecovery(working, durable);
  std::map<std::string, int> count;
  for (const auto& [id, job] : durable.jobs()) {
    ++count[job->name()];
  }
  for (const auto& [name, jobs] : count) {
    if (jobs > 1) {
      world_.Violate("I5", Str("submit ", name, " made ", jobs, " jobs"));
    }
  }
  for (const auto& [name, id] : acknowledged_) {
    const heddle::v1::JobRecord* job = durable.job(JobId{id});
    if (job == nullptr || job->name() != name) {
      world_.Violate("I5", Str("acknowledged submit ", name, " is lost"));
    }
  }
  for (const uint64_t id : cancelled_) {
    const heddle::v1::JobRecord* job = durable.job(JobId{id});
    if (!resumed_.contains(id) && (job == nullptr || job->state() != heddle::v1::JOB_STATE_DONE)) {
      world_.Violate("I5", Str("acknowledged cancel of ", JobId{id}, " is lost"));
    }
  }
}

}  // namespace heddle::simulation
