// AdamW and Lion over flat shards (training-runtime.md section 11): one pass over master, moments
// and gradient that also writes the bf16 compute weights. Torch-free interface.
//
// The result of an element depends on that element and its place in the model's layout only, so any
// cut into shards, blocks or threads gives the same bits, as does any way to divide experts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status/status.h"
#include "model/model_plan.h"

namespace heddle::v1 {
class TrainingConfig;
}

namespace heddle::optim {

enum class Algorithm { kAdamW, kLion };

// What the moments are kept in. kBf16 rounds stochastically: to the nearest, a moment would stop
// where its step is less than half of its last place, which for v is soon (11.3).
enum class Moments { kFp32, kBf16 };

struct Hyperparameters {
  Algorithm algorithm = Algorithm::kAdamW;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  Moments moments = Moments::kFp32;
  uint64_t seed = 0;  // of the rounding of bf16 moments
};
// Reads training.{optimizer,beta1,beta2,eps,weight_decay,moments,seed}.
Hyperparameters HyperparametersOf(const heddle::v1::TrainingConfig& training);

// Elements [begin, end) of the flat buffer share these factors.
struct GroupRange {
  int64_t begin = 0;
  int64_t end = 0;
  double weight_decay = 0.0;
  double learning_rate_multiplier = 1.0;
  bool indexer = false;  // weights of an indexer
  bool frozen = false;   // weights and moments stay as they are, bit for bit
};
// Covers [0, plan.flat_elements) in order; decay where TensorSpec::decays; indexers learn at
// `indexer_multiplier` times the rate.
std::vector<GroupRange> GroupsOf(const model::ModelPlan& plan, const Hyperparameters& hyper,
                                 double indexer_multiplier = 1.0);

// What one rank owns: elements [flat_offset, flat_offset + size) of the flat buffer. All spans have
// one size; `v` is empty for Lion; `compute_bf16` is empty in fp32 training. Moments of one type
// are given and those of the other left empty.
struct Shard {
  int64_t flat_offset = 0;
  std::span<float> master;
  std::span<float> m;
  std::span<float> v;
  std::span<const float> gradient;
  std::span<uint16_t> compute_bf16;
  std::span<uint16_t> m_bf16;
  std::span<uint16_t> v_bf16;
  // Place of the first element in the layout of the whole model, which is another than flat_offset
  // where the flat buffer is a rank's that has some of the experts. Random bits of bf16 moments are
  // a function of (seed, update, place): no two elements of a model share them, and every division
  // of it rounds alike (training-runtime.md 11.3, 13).
  int64_t rounding_offset = 0;
};

struct StepArgs {
  int64_t update = 1;          // 1 for the first update ever: t of the bias correction
  double learning_rate = 0.0;  // of this step, from LearningRate()
  double grad_scale = 1.0;     // the gradient is divided by it; max(1, norm / clip)
  bool found_inf = false;      // true: nothing is changed
  int64_t frozen_updates = 0;  // of the updates, those at which only indexers moved
  // grad_scale of the groups of indexers, whose loss is one of their own: one norm for both would
  // let it slow the model down.
  double indexer_grad_scale = 1.0;
};

// The bias correction of a group counts its own updates. REQUIRES: update >= 1, fewer frozen
// updates than updates where a group that is no indexer's moves, spans of equal size, groups cover
// the shard. Uses LibTorch's threads.
void OptimizerStep(const Hyperparameters& hyper, std::span<const GroupRange> groups,
                   const StepArgs& args, const Shard& shard);

}  // namespace heddle::optim
