#include "coordinator/state/invariants.h"
#include "tests/simulation/checkers.h"

namespace heddle::simulation {

void Checkers::BeforeCommit(const state::State& before, const heddle::v1::EventRecord& event) {
  for (const std::string& problem : state::CheckStep(before, event)) {
    world_.Violate("step", problem);
  }
}

void Checkers::AfterCommit(const state::State& state) {
  for (const std::string& problem : state::CheckInvariants(state)) {
    world_.Violate("invariant", problem);
  }
}

void Checkers::AfterRecovery(const state::State& loaded, const state::State& replayed) {
  const auto a = loaded.Dump();
  const auto b = replayed.Dump();
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) {
    same = a[i].SerializeAsString() == b[i].SerializeAsString();
  }
  if (!same || loaded.queue().size() != replayed.queue().size()) {
    world_.Violate("P9", "loaded records differ from replayed events");
  }
  AfterCommit(loaded);
}

}  // namespace heddle::simulation
