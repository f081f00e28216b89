// Learning rate as a pure function of the step (training-runtime.md 11.5): nothing multiplies the
// current rate, so a resumed, extended or re-planned run gets the rate of its step.
#pragma once

#include <cstdint>

namespace heddle::v1 {
class TrainingConfig;
}

namespace heddle::optim {

struct Schedule {
  double learning_rate = 0.0;
  double min_learning_rate = 0.0;
  int64_t warmup_steps = 0;
  int64_t max_steps = 0;
};

// step is 0-based. s < warmup: lr (s+1)/warmup; then cosine down to min; min from max_steps on.
double LearningRate(const Schedule& schedule, int64_t step);

Schedule ScheduleOf(const heddle::v1::TrainingConfig& training);

}  // namespace heddle::optim
