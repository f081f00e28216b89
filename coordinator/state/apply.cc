#include "coordinator/state/apply.h"

#include "coordinator/state/actions.h"
#include "coordinator/state/decision.h"

namespace heddle::state {

Outcome Apply(const State& state, const Event& event, Time now, const Policy& policy) {
  Decision decision(state, now, policy);
  Status status = std::visit([&decision](const auto& e) { return On(decision, e); }, event);
  return decision.Finish(std::move(status));
}

}  // namespace heddle::state
