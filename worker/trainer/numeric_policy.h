// What a step whose numbers are bad does to the run: training.nan_policy (training-runtime.md 16).
// Fed with the step's global sums only, so every rank gets the same verdict in the same step; its
// memory is checkpoint state.
//
//               not finite            3 in a row    spike
//   halt        ends the run          -             is not looked for
//   skip        update left out       ends the run  update left out
//   rollback    update left out       rolls back    rolls back
#pragma once

#include <cstdint>
#include <string>

#include "heddle/v1/checkpoints.pb.h"
#include "worker/trainer/spike_detector.h"

namespace heddle::trainer {

enum class NanPolicy { kHalt, kSkip, kRollback };

struct StepVerdict {
  enum class Then { kGoOn, kHalt, kRollBack };
  bool apply = true;  // the step changes weights
  bool finite = true;
  bool spike = false;
  Then then = Then::kGoOn;
  int64_t bad_steps = 0;  // steps in a row that are bad, this one included
  std::string what;       // of a spike: one sentence
};

class NumericPolicy {
 public:
  static constexpr int64_t kNonFiniteInARowMax = 3;  // 16.1

  explicit NumericPolicy(NanPolicy policy = NanPolicy::kHalt) : policy_(policy) {}

  // Judges the step and remembers it. `finite`: no gradient and no loss of any rank is otherwise;
  // else the figures are not looked at.
  StepVerdict Judge(bool finite, double loss, double norm);
  // Another stage of training begins: what was measured says nothing about it.
  void StartStage() { spikes_.Clear(); }

  void Save(heddle::v1::TrainState* state) const;
  void Load(const heddle::v1::TrainState& state);
  NanPolicy policy() const { return policy_; }

 private:
  NanPolicy policy_;
  int64_t nonfinite_in_a_row_ = 0;
  SpikeDetector spikes_;
};

}  // namespace heddle::trainer
