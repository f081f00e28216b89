// When a step's loss or gradient norm jumps so far that its update would do harm
// (training-runtime.md 16.2). A pure function of what it was told, the same on all ranks, and its
// window is checkpoint state, so a resumed run decides as an undisturbed one. Only upwards: a loss
// that falls is what training is for, and leaving such steps out would hold a run for ever at the
// place where it begins to learn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace heddle::trainer {

struct Spike {
  bool found = false;
  // How many steps it has lasted, this one included: 1, or kHighSteps for a level.
  int64_t steps = 1;
  std::string what;  // one sentence with both figures
};

// Two rules, over a window of the last kWindow good steps:
//   jump   the loss, or the logarithm of the norm, lies more than kDeviations standard deviations
//          above the window's mean. Logarithm: norms are spread by factors, not by amounts. A
//          deviation counts as at least so much that no jump is smaller than kLossJumpMin and
//          kNormJumpMin: a batch of unusual text triples the norm of a healthy run once in some
//          hundred steps, which clipping takes care of; going back for it would cost far more.
//   level  for kHighSteps steps in a row the loss or the norm is more than twice the mean of the
//          window before them: a climb in steps too small for the first rule.
class SpikeDetector {
 public:
  static constexpr size_t kWindow = 128;
  static constexpr double kDeviations = 6;
  static constexpr double kHighFactor = 2;
  static constexpr size_t kHighSteps = 4;
  // Fewer points know too little about their spread: of 32 normal ones the next lies six of their
  // deviations away once in a million steps, of 8 once in two thousand. The first steps of a run
  // also fall too fast to be a level.
  static constexpr size_t kPointsMin = 32;
  // Smallest jumps, as factors of the mean.
  static constexpr double kLossJumpMin = 1.2;
  static constexpr double kNormJumpMin = 10;
  // So many spikes in a row are a new level, which leaving out updates does not change: the window
  // starts anew.
  static constexpr size_t kSpikesInARowMax = 8;

  // Judges a step. REQUIRES: both are finite.
  Spike Judge(double loss, double norm) const;

  // The step's update was applied: it becomes part of the window.
  void AddGood(double loss, double norm);
  // ... was left out as a spike. True: it was one too many, the window is empty now.
  bool AddSpike(double loss);
  // What is measured has changed: another stage of training.
  void Clear();

  // Checkpoint state: norms of the window, and losses of the window followed by those of the spikes
  // since, newest last.
  void Save(std::vector<double>* losses, std::vector<double>* norms) const;
  // Values that no Save() made, such as more norms than losses, leave it empty.
  void Load(std::span<const double> losses, std::span<const double> norms);

 private:
  std::vector<double> losses_;
  std::vector<double> norms_;
  std::vector<double> spikes_;  // losses of the spikes in a row
};

}  // namespace heddle::trainer
