#include "worker/trainer/spike_detector.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "base/status/status.h"

namespace heddle::trainer {

namespace {

// What a norm of 0 counts as: the logarithm must exist.
constexpr double kNormMin = 1e-30;

double MeanOf(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double DeviationOf(std::span<const double> values, double mean) {
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

std::string Short(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.4g", value);
  return text;
}

// Deviations by which `value` lies above the window.
double Score(std::span<const double> window, double value, double deviation_min) {
  const double mean = MeanOf(window);
  return (value - mean) / std::max(DeviationOf(window, mean), deviation_min);
}

std::vector<double> Logarithms(std::span<const double> values) {
  std::vector<double> logs;
  for (const double value : values) logs.push_back(std::log(std::max(value, kNormMin)));
  return logs;
}

// More than twice the mean of the window before it, as the window's last steps were.
bool IsHighLevel(std::span<const double> window, double value) {
  const size_t earlier = SpikeDetector::kHighSteps - 1;
  if (window.size() < SpikeDetector::kPointsMin + earlier) return false;
  const double limit = SpikeDetector::kHighFactor * MeanOf(window.first(window.size() - earlier));
  const std::span<const double> last = window.last(earlier);
  return value > limit &&
         std::all_of(last.begin(), last.end(), [limit](double one) { return one > limit; });
}

std::string Jump(const char* what, double value, double score, std::span<const double> window) {
  return Str(what, " ", Short(value), " is ", Short(score), " deviations above ",
             Short(MeanOf(window)), ", the mean of ", window.size(), " good steps");
}

std::string Level(const char* what, double value, std::span<const double> window) {
  const size_t earlier = SpikeDetector::kHighSteps - 1;
  return Str(what, " ", Short(value), " is the ", SpikeDetector::kHighSteps,
             "th in a row above twice ", Short(MeanOf(window.first(window.size() - earlier))),
             ", the mean before them");
}

}  // namespace

Spike SpikeDetector::Judge(double loss, double norm) const {
  if (losses_.size() < kPointsMin) return {};
  const double loss_floor =
      (kLossJumpMin - 1) / kDeviations * std::max(std::abs(MeanOf(losses_)), kNormMin);
  const double loss_score = Score(losses_, loss, loss_floor);
  if (loss_score > kDeviations) {
    return {.found = true, .steps = 1, .what = Jump("loss", loss, loss_score, losses_)};
  }
  const double norm_score = Score(Logarithms(norms_), std::log(std::max(norm, kNormMin)),
                                  std::log(kNormJumpMin) / kDeviations);
  if (norm_score > kDeviations) {
    return {.found = true, .steps = 1, .what = Jump("gradient norm", norm, norm_score, norms_)};
  }
  const int64_t high = static_cast<int64_t>(kHighSteps);
  if (IsHighLevel(losses_, loss)) {
    return {.found = true, .steps = high, .what = Level("loss", loss, losses_)};
  }
  if (IsHighLevel(norms_, norm)) {
    return {.found = true, .steps = high, .what = Level("gradient norm", norm, norms_)};
  }
  return {};
}

void SpikeDetector::AddGood(double loss, double norm) {
  spikes_.clear();
  losses_.push_back(loss);
  norms_.push_back(norm);
  if (losses_.size() > kWindow) {
    losses_.erase(losses_.begin());
    norms_.erase(norms_.begin());
  }
}

bool SpikeDetector::AddSpike(double loss) {
  spikes_.push_back(loss);
  if (spikes_.size() < kSpikesInARowMax) return false;
  Clear();
  return true;
}

void SpikeDetector::Clear() {
  losses_.clear();
  norms_.clear();
  spikes_.clear();
}

void SpikeDetector::Save(std::vector<double>* losses, std::vector<double>* norms) const {
  *losses = losses_;
  losses->insert(losses->end(), spikes_.begin(), spikes_.end());
  *norms = norms_;
}

void SpikeDetector::Load(std::span<const double> losses, std::span<const double> norms) {
  Clear();
  if (norms.size() > losses.size() || norms.size() > kWindow ||
      losses.size() - norms.size() >= kSpikesInARowMax) {
    return;
  }
  norms_.assign(norms.begin(), norms.end());
  losses_.assign(losses.begin(), losses.begin() + static_cast<int64_t>(norms.size()));
  spikes_.assign(losses.begin() + static_cast<int64_t>(norms.size()), losses.end());
}

}  // namespace heddle::trainer
