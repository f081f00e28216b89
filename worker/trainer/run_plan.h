// What a run consists of, derived from its configuration before anything is loaded: batch
// arithmetic (training-runtime.md 7.4), precision, optimizer, policies; and the refusal of settings
// that this version would not honour (architecture S41), by the one table of base/settings.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/language_model.h"
#include "model/optim/optimizer.h"
#include "model/optim/schedule.h"
#include "model/parameter_store.h"
#include "worker/shard/parameters.h"
#include "worker/trainer/numeric_policy.h"

namespace heddle::trainer {

struct RunPlan {
  int64_t max_steps = 0;
  int64_t global_batch = 0;  // sequences per step over all ranks, fixed for the job's life
  int64_t micro_batch = 0;
  int64_t save_interval = 0;  // steps; 0: by time
  int64_t eval_interval = 0;
  int64_t log_interval = 1;
  NanPolicy nan_policy = NanPolicy::kHalt;
  model::Precision precision = model::Precision::kBf16;
  model::Recompute recompute = model::Recompute::kNone;
  double grad_clip = 0;
  uint64_t seed = 0;
  optim::Hyperparameters optimizer;
  double indexer_learning_rate_multiplier = 1;
  // Steps that train the indexers of DSA and GSA against dense attention (attention-and-moe.md
  // 6.3); 0 without such layers.
  int64_t indexer_warmup_steps = 0;
  bool freeze_during_warmup = false;  // ... while everything else stands still
  // What the model's layers can count (layers::LayerCounts).
  bool has_capacity = false;  // experts with a bound on their tokens
  bool selects_keys = false;  // layers of NSA, DSA or GSA
  optim::Schedule schedule;
  shard::Options shard;     // its rank and world are the rank's
  std::string init_from;    // model folder, or empty
  std::string config_hash;  // XXH3-64 of the resolved configuration, hex
};

// INVALID_ARGUMENT lists every setting that cannot be run here, "key: why".
StatusOr<RunPlan> PlanRun(const heddle::v1::RunConfig& config);

}  // namespace heddle::trainer
