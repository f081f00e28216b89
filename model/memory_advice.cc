#include "model/memory_advice.h"

#include <cstdio>
#include <functional>
#include <optional>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"

namespace heddle::model {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

constexpr size_t kChangesMax = 3;

int64_t PlanOf(const RunConfig& config) {
  return EstimateMemory(config.model(), config.training(), config.parallel()).Total();
}

// Each changes `config` and returns the settings that do the same; nothing where there is nothing
// to gain.
using Change = std::function<std::vector<std::string>(RunConfig*)>;

std::vector<std::string> ShardOptimizer(RunConfig* config) {
  if (config->parallel().ranks().max() < 2 ||
      config->parallel().shard() != ParallelConfig::SHARD_NONE) {
    return {};
  }
  config->mutable_parallel()->set_shard(ParallelConfig::SHARD_OPTIMIZER);
  return {"parallel.shard=optimizer"};
}

std::vector<std::string> ShardFull(RunConfig* config) {
  if (config->parallel().ranks().max() < 2 ||
      config->parallel().shard() == ParallelConfig::SHARD_FULL) {
    return {};
  }
  config->mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  return {"parallel.shard=full"};
}

// The global batch stays what it was: as many more micro-batches.
std::vector<std::string> HalveMicroBatch(RunConfig* config) {
  TrainingConfig& training = *config->mutable_training();
  const int half = training.micro_batch_size() / 2;
  if (half < 1 || training.micro_batch_size() % 2 != 0) return {};
  std::vector<std::string> settings = {Str("training.micro_batch_size=", half)};
  training.set_micro_batch_size(half);
  if (training.global_batch_size() == 0) {
    training.set_gradient_accumulation_steps(2 * training.gradient_accumulation_steps());
    settings.push_back(
        Str("training.gradient_accumulation_steps=", training.gradient_accumulation_steps()));
  }
  return settings;
}

std::vector<std::string> RecomputeSome(RunConfig* config) {
  if (config->training().gradient_checkpointing() != TrainingConfig::GRADIENT_CHECKPOINTING_NONE) {
    return {};
  }
  config->mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE);
  return {"training.gradient_checkpointing=selective"};
}

std::vector<std::string> RecomputeAll(RunConfig* config) {
  if (config->training().gradient_checkpointing() == TrainingConfig::GRADIENT_CHECKPOINTING_FULL) {
    return {};
  }
  config->mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  return {"training.gradient_checkpointing=full"};
}

std::vector<std::string> HalfMoments(RunConfig* config) {
  if (config->training().moments() == TrainingConfig::MOMENTS_BF16) return {};
  config->mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  return {"training.moments=bf16"};
}

// A later setting of a key replaces the former one.
void Append(const std::vector<std::string>& more, std::vector<std::string>* settings) {
  for (const std::string& setting : more) {
    const std::string key = setting.substr(0, setting.find('=') + 1);
    std::erase_if(*settings, [&](const std::string& one) { return one.rfind(key, 0) == 0; });
    settings->push_back(setting);
  }
}

// Halves until it fits; nothing if even one sequence at a time does not.
std::optional<MemoryChange> SmallerBatches(RunConfig config, int64_t limit) {
  MemoryChange change;
  while (true) {
    const std::vector<std::string> settings = HalveMicroBatch(&config);
    if (settings.empty()) return std::nullopt;
    Append(settings, &change.settings);
    change.bytes = PlanOf(config);
    if (change.bytes <= limit) return change;
  }
}

}  // namespace

std::vector<std::pair<const char*, int64_t>> Categories(const MemoryEstimate& estimate) {
  return {{"compute_weights", estimate.compute_weights},
          {"master", estimate.master},
          {"moments", estimate.moments},
          {"gradients", estimate.gradients},
          {"gathered", estimate.gathered},
          {"checkpoint", estimate.checkpoint},
          {"buffers", estimate.buffers},
          {"activations", estimate.activations},
          {"workspace", estimate.workspace}};
}

std::vector<MemoryChange> ChangesThatFit(const RunConfig& config, int64_t limit_bytes) {
  std::vector<MemoryChange> fitting;
  const auto add = [&](const Change& change) {
    RunConfig changed = config;
    MemoryChange one{change(&changed), 0};
    one.bytes = PlanOf(changed);
    if (!one.settings.empty() && one.bytes <= limit_bytes) fitting.push_back(std::move(one));
  };
  add(ShardOptimizer);
  if (std::optional<MemoryChange> smaller = SmallerBatches(config, limit_bytes);
      smaller.has_value()) {
    fitting.push_back(*std::move(smaller));
  }
  for (const auto& change : {RecomputeSome, RecomputeAll, ShardFull, HalfMoments}) add(change);
  if (fitting.size() > kChangesMax) fitting.resize(kChangesMax);
  if (!fitting.empty()) return fitting;

  // No single one: one after the other, while they help.
  RunConfig changed = config;
  MemoryChange all;
  int64_t bytes = PlanOf(config);
  const auto take = [&](const Change& change) {
    RunConfig next = changed;
    const std::vector<std::string> settings = change(&next);
    const int64_t with = PlanOf(next);
    if (settings.empty() || with >= bytes) return false;
    changed = next;
    bytes = with;
    Append(settings, &all.settings);
    return true;
  };
  for (const auto& change : {RecomputeSome, RecomputeAll, ShardFull, HalfMoments}) {
    if (bytes > limit_bytes) take(change);
  }
  while (bytes > limit_bytes && take(HalveMicroBatch)) {
  }
  all.bytes = bytes;
  if (bytes <= limit_bytes) fitting.push_back(std::move(all));
  return fitting;
}

std::string BytesText(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof(text), unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return text;
}

}  // namespace heddle::model
