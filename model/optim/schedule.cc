#include "model/optim/schedule.h"

#include <cmath>
#include <numbers>

#include "heddle/v1/config.pb.h"

namespace heddle::optim {

double LearningRate(const Schedule& schedule, int64_t step) {
  if (step < schedule.warmup_steps) {
    return schedule.learning_rate * static_cast<double>(step + 1) /
           static_cast<double>(schedule.warmup_steps);
  }
  if (step >= schedule.max_steps) return schedule.min_learning_rate;
  const double progress = static_cast<double>(step - schedule.warmup_steps) /
                          static_cast<double>(schedule.max_steps - schedule.warmup_steps);
  return schedule.min_learning_rate + (schedule.learning_rate - schedule.min_learning_rate) *
                                          (1.0 + std::cos(std::numbers::pi * progress)) / 2.0;
}

Schedule ScheduleOf(const heddle::v1::TrainingConfig& training) {
  Schedule schedule;
  schedule.learning_rate = training.learning_rate();
  schedule.min_learning_rate = training.min_learning_rate();
  schedule.warmup_steps = training.warmup_steps();
  schedule.max_steps = training.max_steps();
  return schedule;
}

}  // namespace heddle::optim
