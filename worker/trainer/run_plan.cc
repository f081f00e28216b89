#include "worker/trainer/run_plan.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <vector>

#include "base/settings/settings.h"
#include "model/model_plan.h"

namespace heddle::trainer {

namespace {

using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

std::string HashOf(const RunConfig& config) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    config.SerializeToCodedStream(&coded);
  }
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
  return text.data();
}

bool Uses(const heddle::v1::ModelConfig& model, heddle::v1::AttentionKind kind) {
  for (int layer = 0; layer < model.n_layers(); ++layer) {
    if (model::LayerKind(model, layer) == kind) {
      return true;
    }
  }
  return false;
}

// The two-stage training of indexers. A model of both kinds warms up until both have.
void PlanIndexers(const RunConfig& config, RunPlan* plan) {
  const heddle::v1::AttentionConfig& attention = config.model().attention();
  // A model whose weights were trained before is frozen while its new indexers learn; from scratch
  // there is nothing to keep.
  const bool imported = config.checkpoint().has_init_from();
  const auto frozen = [&](heddle::v1::Freeze freeze) {
    return freeze == heddle::v1::FREEZE_TRUE || (freeze == heddle::v1::FREEZE_AUTO && imported);
  };
  if (Uses(config.model(), heddle::v1::ATTENTION_KIND_DSA)) {
    plan->indexer_warmup_steps = attention.dsa().warmup_steps();
    plan->freeze_during_warmup = frozen(attention.dsa().freeze());
  }
  if (Uses(config.model(), heddle::v1::ATTENTION_KIND_GSA)) {
    plan->indexer_warmup_steps =
        std::max<int64_t>(plan->indexer_warmup_steps, attention.gsa().warmup_steps());
    plan->freeze_during_warmup = plan->freeze_during_warmup || frozen(attention.gsa().freeze());
    plan->indexer_learning_rate_multiplier = attention.gsa().indexer_lr_multiplier();
  }
}

void PlanCounts(const heddle::v1::ModelConfig& model, RunPlan* plan) {
  for (const auto kind : {heddle::v1::ATTENTION_KIND_NSA, heddle::v1::ATTENTION_KIND_DSA,
                          heddle::v1::ATTENTION_KIND_GSA}) {
    plan->selects_keys = plan->selects_keys || Uses(model, kind);
  }
  for (int layer = 0; layer < model.n_layers(); ++layer) {
    plan->has_capacity = plan->has_capacity || (model.moe().capacity_factor() > 0 &&
                                                model::LayerHasExperts(model, layer));
  }
}

shard::Accumulation AccumulationOf(const RunConfig& config) {
  switch (model::AccumulationOf(config.training(), config.parallel())) {
    case TrainingConfig::ACCUMULATION_SYNC_EACH:
      return shard::Accumulation::kSyncEach;
    case TrainingConfig::ACCUMULATION_LAYER_MAJOR:
      return shard::Accumulation::kLayerMajor;
    default:
      return shard::Accumulation::kSyncLast;
  }
}

NanPolicy NanPolicyOf(const TrainingConfig& training) {
  switch (training.nan_policy()) {
    case TrainingConfig::NAN_POLICY_SKIP:
      return NanPolicy::kSkip;
    case TrainingConfig::NAN_POLICY_ROLLBACK:
      return NanPolicy::kRollback;
    default:
      return NanPolicy::kHalt;
  }
}

void PlanSharding(const RunConfig& config, RunPlan* plan) {
  switch (config.parallel().shard()) {
    case heddle::v1::ParallelConfig::SHARD_NONE:
      plan->shard.mode = shard::Mode::kNone;
      break;
    case heddle::v1::ParallelConfig::SHARD_OPTIMIZER:
      plan->shard.mode = shard::Mode::kOptimizer;
      break;
    case heddle::v1::ParallelConfig::SHARD_FULL:
      plan->shard.mode = shard::Mode::kFull;
      break;
  }
  plan->shard.accumulation = AccumulationOf(config);
  plan->shard.expert_degree = config.parallel().expert();
  const heddle::v1::ExpertOffloadingConfig& offloading = config.memory().expert_offloading();
  plan->shard.offload.enabled = offloading.enabled();
  plan->shard.offload.budget_bytes = offloading.resident_mb() << 20;
  plan->shard.offload.spill_dir = offloading.spill_dir();
  plan->shard.offload.skip_untouched =
      offloading.untouched() == heddle::v1::ExpertOffloadingConfig::UNTOUCHED_SKIP;
  plan->shard.wire =
      config.parallel().reduce_dtype() == heddle::v1::ParallelConfig::REDUCE_DTYPE_BF16
          ? comm::Wire::kBf16
          : comm::Wire::kFp32;
}

model::Recompute RecomputeOf(const TrainingConfig& training) {
  switch (training.gradient_checkpointing()) {
    case TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE:
      return model::Recompute::kSelective;
    case TrainingConfig::GRADIENT_CHECKPOINTING_FULL:
      return model::Recompute::kFull;
    case TrainingConfig::GRADIENT_CHECKPOINTING_NONE:
      break;
  }
  return model::Recompute::kNone;
}

}  // namespace

StatusOr<RunPlan> PlanRun(const RunConfig& config) {
  const TrainingConfig& training = config.training();
  std::vector<std::string> problems;
  // The server has checked this; a rank never trains with a setting it would ignore (S27).
  if (const Status implemented = settings::CheckImplemented(config); !implemented.ok()) {
    problems.push_back(Message(implemented));
  }
  if (config.kind() != RunConfig::KIND_TRAIN) {
    problems.push_back("kind: a trainer runs jobs of kind train only");
  }

  RunPlan plan;
  plan.max_steps = training.max_steps();
  plan.micro_batch = training.micro_batch_size();
  plan.global_batch = training.global_batch_size();
  if (plan.global_batch == 0) {
    plan.global_batch = int64_t{training.micro_batch_size()} *
                        training.gradient_accumulation_steps() * config.parallel().ranks().max();
  }
  if (plan.global_batch % plan.micro_batch != 0) {
    problems.push_back(Str("training.global_batch_size: ", plan.global_batch,
                           " is no multiple of micro_batch_size ", plan.micro_batch));
  }
  plan.save_interval = config.checkpoint().save_interval();
  plan.eval_interval = config.data().has_eval_path() ? training.eval_interval() : 0;
  if (training.eval_interval() > 0 && !config.data().has_eval_path()) {
    problems.push_back("training.eval_interval: needs data.eval_path");
  }
  plan.log_interval = config.logging().log_interval();
  plan.nan_policy = NanPolicyOf(training);
  plan.precision = training.precision() == TrainingConfig::PRECISION_FP32 ? model::Precision::kFp32
                                                                          : model::Precision::kBf16;
  plan.recompute = RecomputeOf(training);
  plan.grad_clip = training.grad_clip();
  plan.seed = static_cast<uint64_t>(training.seed());
  plan.schedule = optim::ScheduleOf(training);
  plan.optimizer = optim::HyperparametersOf(training);
  plan.init_from = config.checkpoint().init_from();
  PlanSharding(config, &plan);
  PlanIndexers(config, &plan);
  PlanCounts(config.model(), &plan);
  plan.config_hash = HashOf(config);
  if (problems.empty()) {
    return plan;
  }
  std::string text;
  for (const std::string& problem : problems) {
    text += Str(text.empty() ? "" : "; ", problem);
  }
  return InvalidArgument(text);
}

}  // namespace heddle::trainer
