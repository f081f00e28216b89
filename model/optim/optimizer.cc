#include "model/optim/optimizer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "kernels/adamw/params.h"

namespace heddle::optim {
namespace {

// Elements of one task: 64 Ki x 28 bytes, a multiple of the vector width.
constexpr int64_t kBlock = 64 * 1024;

// The upper half of the counters of an update's random bits; the lower half counts elements.
uint64_t RoundingStream(uint64_t seed, int64_t update) {
  return Rng(seed, "optim.rounding").At(static_cast<uint64_t>(update));
}

}  // namespace

Hyperparameters HyperparametersOf(const heddle::v1::TrainingConfig& training) {
  using heddle::v1::TrainingConfig;
  Hyperparameters hyper;
  hyper.algorithm =
      training.optimizer() == TrainingConfig::OPTIMIZER_LION ? Algorithm::kLion : Algorithm::kAdamW;
  hyper.beta1 = training.beta1();
  hyper.beta2 = training.beta2();
  // Lion's published default differs from the schema's, which is AdamW's (11.1).
  if (hyper.algorithm == Algorithm::kLion && !training.has_beta2()) hyper.beta2 = 0.99;
  hyper.eps = training.eps();
  hyper.weight_decay = training.weight_decay();
  hyper.moments =
      training.moments() == TrainingConfig::MOMENTS_BF16 ? Moments::kBf16 : Moments::kFp32;
  hyper.seed = static_cast<uint64_t>(training.seed());
  return hyper;
}

std::vector<GroupRange> GroupsOf(const model::ModelPlan& plan, const Hyperparameters& hyper,
                                 double indexer_multiplier) {
  std::vector<GroupRange> groups;
  for (const model::TensorSpec& tensor : plan.tensors) {
    const double decay = tensor.decays ? hyper.weight_decay : 0.0;
    if (!groups.empty() && groups.back().weight_decay == decay &&
        groups.back().indexer == tensor.indexer) {
      continue;
    }
    // Padding belongs to the tensor before it; it is zero and stays so.
    if (!groups.empty()) groups.back().end = tensor.offset;
    groups.push_back({.begin = tensor.offset,
                      .end = plan.flat_elements,
                      .weight_decay = decay,
                      .learning_rate_multiplier = tensor.indexer ? indexer_multiplier : 1.0,
                      .indexer = tensor.indexer,
                      .frozen = false});
  }
  return groups;
}

void OptimizerStep(const Hyperparameters& hyper, std::span<const GroupRange> groups,
                   const StepArgs& args, const Shard& shard) {
  const int64_t size = static_cast<int64_t>(shard.master.size());
  const bool adamw = hyper.algorithm == Algorithm::kAdamW;
  HEDDLE_CHECK(args.update >= 1);
  const bool rounds = hyper.moments == Moments::kBf16;
  HEDDLE_CHECK((rounds ? shard.m_bf16.size() : shard.m.size()) == shard.master.size());
  HEDDLE_CHECK(shard.gradient.size() == shard.master.size());
  HEDDLE_CHECK(!adamw || (rounds ? shard.v_bf16.size() : shard.v.size()) == shard.master.size());
  HEDDLE_CHECK(shard.compute_bf16.empty() || shard.compute_bf16.size() == shard.master.size());
  if (args.found_inf || size == 0) return;

  kernels::adamw::Params base;
  base.beta1 = static_cast<float>(hyper.beta1);
  base.beta2 = static_cast<float>(hyper.beta2);
  base.eps = static_cast<float>(hyper.eps);
  base.rounding.seed = hyper.seed;
  base.rounding.stream = RoundingStream(hyper.seed, args.update);

  const kernels::adamw::Table& kernels = kernels::adamw::Kernels();
  const auto run = adamw ? kernels.adamw : kernels.lion;
  int64_t covered = 0;
  for (const GroupRange& group : groups) {
    const int64_t begin = std::max<int64_t>(group.begin - shard.flat_offset, 0);
    const int64_t end = std::min(group.end - shard.flat_offset, size);
    if (begin >= end) continue;
    covered += end - begin;
    if (group.frozen) continue;
    kernels::adamw::Params part = base;
    const int64_t updates = args.update - (group.indexer ? 0 : args.frozen_updates);
    HEDDLE_CHECK(updates >= 1, "a group that moves has an update");
    const double t = static_cast<double>(updates);
    part.bias_correction1 = static_cast<float>(1.0 - std::pow(hyper.beta1, t));
    part.bias_correction2_root = static_cast<float>(std::sqrt(1.0 - std::pow(hyper.beta2, t)));
    part.learning_rate = static_cast<float>(args.learning_rate * group.learning_rate_multiplier);
    part.weight_decay = static_cast<float>(group.weight_decay);
    part.gradient_factor =
        static_cast<float>(1.0 / (group.indexer ? args.indexer_grad_scale : args.grad_scale));
    at::parallel_for(begin, end, kBlock, [&](int64_t from, int64_t to) {
      kernels::adamw::Params p = part;
      p.elements = to - from;
      p.master = shard.master.data() + from;
      if (rounds) {
        p.m_bf16 = shard.m_bf16.data() + from;
        p.v_bf16 = adamw ? shard.v_bf16.data() + from : nullptr;
        p.rounding.first = shard.rounding_offset + from;
      } else {
        p.m = shard.m.data() + from;
        p.v = adamw ? shard.v.data() + from : nullptr;
      }
      p.gradient = shard.gradient.data() + from;
      p.weights = shard.compute_bf16.empty() ? nullptr : shard.compute_bf16.data() + from;
      run(p);
    });
  }
  HEDDLE_CHECK(covered == size, "parameter groups cover ", covered, " of ", size, " elements");
}

}  // namespace heddle::optim
