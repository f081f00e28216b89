#include "worker/trainer/numeric_policy.h"

#include <vector>

#include "base/log/log.h"

namespace heddle::trainer {

using Then = StepVerdict::Then;

StepVerdict NumericPolicy::Judge(bool finite, double loss, double norm) {
  StepVerdict verdict;
  verdict.finite = finite;
  if (!finite) {
    ++nonfinite_in_a_row_;
    verdict.apply = false;
    verdict.bad_steps = nonfinite_in_a_row_;
    if (policy_ == NanPolicy::kHalt) {
      verdict.then = Then::kHalt;
    } else if (nonfinite_in_a_row_ >= kNonFiniteInARowMax) {
      verdict.then = policy_ == NanPolicy::kRollback ? Then::kRollBack : Then::kHalt;
    }
    return verdict;
  }
  nonfinite_in_a_row_ = 0;
  if (policy_ == NanPolicy::kHalt) return verdict;
  const Spike spike = spikes_.Judge(loss, norm);
  if (!spike.found) {
    spikes_.AddGood(loss, norm);
    return verdict;
  }
  verdict.apply = false;
  verdict.spike = true;
  verdict.bad_steps = spike.steps;
  verdict.what = spike.what;
  if (policy_ == NanPolicy::kRollback) {
    verdict.then = Then::kRollBack;
  } else if (spikes_.AddSpike(loss)) {
    HEDDLE_WARN("so many spikes in a row are a new level: measured anew",
                {"spikes", SpikeDetector::kSpikesInARowMax}, {"loss", loss});
  }
  return verdict;
}

void NumericPolicy::Save(heddle::v1::TrainState* state) const {
  state->set_consecutive_nonfinite(static_cast<uint32_t>(nonfinite_in_a_row_));
  std::vector<double> losses;
  std::vector<double> norms;
  spikes_.Save(&losses, &norms);
  state->mutable_recent_losses()->Assign(losses.begin(), losses.end());
  state->mutable_recent_norms()->Assign(norms.begin(), norms.end());
}

void NumericPolicy::Load(const heddle::v1::TrainState& state) {
  nonfinite_in_a_row_ = state.consecutive_nonfinite();
  const std::vector<double> losses(state.recent_losses().begin(), state.recent_losses().end());
  const std::vector<double> norms(state.recent_norms().begin(), state.recent_norms().end());
  spikes_.Load(losses, norms);
}

}  // namespace heddle::trainer
