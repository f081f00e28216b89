#include "model/rank_memory.h"

#include <algorithm>

#include "base/units/units.h"
#include "heddle/v1/config.pb.h"
#include "model/cost_formulas.h"
#include "model/model_plan_internal.h"
#include "model/training_plan.h"

namespace heddle::model {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

// The fp32 gradient stays with the expert from its backward to the update: the norm of all
// gradients comes first.
int64_t StateBytesPerParameter(const TrainingConfig& training) {
  const bool bf16 = training.precision() != TrainingConfig::PRECISION_FP32;
  return static_cast<int64_t>(BytesPerParameter(
      {.weights = bf16 ? 2.0 : 0.0,
       .moments = training.optimizer() == TrainingConfig::OPTIMIZER_LION ? 1.0 : 2.0,
       .moment_bytes = training.moments() == TrainingConfig::MOMENTS_BF16 ? 2.0 : 4.0,
       .gradient = 4}));
}

int64_t WeightBytes(const TrainingConfig& training) {
  return training.precision() == TrainingConfig::PRECISION_FP32 ? 4 : 2;
}

// Ranks over which the state of one expert is divided.
int64_t RanksPerExpert(const ParallelConfig& parallel) {
  if (parallel.shard() == ParallelConfig::SHARD_NONE) return 1;
  return std::max<int64_t>(1, std::max(1, parallel.ranks().max()) / ExpertDegree(parallel));
}

struct ExpertCount {
  int64_t parameters = 0;  // of this rank
  int64_t largest = 0;     // parameters of the largest expert
};
ExpertCount CountExperts(const RunConfig& config) {
  ExpertCount count;
  const int degree = static_cast<int>(ExpertDegree(config.parallel()));
  const StatusOr<ModelPlan> plan =
      PlanModel(config.model(), ExpertsOfRank(config.model(), 0, degree));
  if (!plan.ok()) return count;
  const int64_t parts = RanksPerExpert(config.parallel());
  for (size_t u = static_cast<size_t>(plan->dense_units); u < plan->units.size(); ++u) {
    int64_t one = 0;
    for (int i = 0; i < plan->units[u].tensor_count; ++i) {
      one += plan->tensors[static_cast<size_t>(plan->units[u].first_tensor + i)].elements;
    }
    count.parameters += (one + parts - 1) / parts;
    count.largest = std::max(count.largest, one);
  }
  return count;
}

int64_t BoundBytes(const RunConfig& config) {
  return config.memory().expert_offloading().resident_mb() * kMiB;
}

}  // namespace

bool OffloadsExperts(const RunConfig& config) {
  return config.memory().expert_offloading().enabled() && config.model().moe().n_experts() > 0;
}

RankMemory EstimateRank(const RunConfig& config) {
  RankMemory memory;
  const StatusOr<ModelPlan> plan = PlanModel(config.model());
  if (!plan.ok()) return memory;
  const bool apart = OffloadsExperts(config);
  memory.compute = EstimateMemoryApart(config.model(), config.training(), config.parallel(), apart);
  const ExpertCount count = CountExperts(config);
  memory.expert_parameters = count.parameters;
  memory.bytes_per_expert_parameter = StateBytesPerParameter(config.training());
  if (!apart) return memory;
  const int64_t all = memory.expert_parameters * memory.bytes_per_expert_parameter;
  const int64_t bound = BoundBytes(config);
  memory.experts_resident = bound > 0 ? std::min(bound, all) : all;
  const bool spills = !config.memory().expert_offloading().spill_dir().empty();
  const int64_t weights = WeightBytes(config.training());
  // A save copies masters and moments, which the next update changes: beside the spill files where
  // there are any (worker/trainer/run_state.cc), else in memory.
  const int64_t saved =
      count.parameters * (memory.bytes_per_expert_parameter - 4 - (weights == 2 ? weights : 0));
  if (spills) {
    memory.experts_disk = all + saved;
  } else {
    if (memory.experts_resident < all) memory.experts_host = all;
    memory.compute.checkpoint += saved;
  }
  // Shards of an expert, and of its gradient, are whole while it computes and the next one comes.
  if (RanksPerExpert(config.parallel()) > 1) {
    memory.compute.gathered += 2 * count.largest * (weights + 4);
  }
  return memory;
}

int64_t LeastResidentBytes(const RunConfig& config) {
  const StatusOr<ModelPlan> plan = PlanModel(config.model());
  if (!plan.ok() || !OffloadsExperts(config)) return 0;
  return 2 * CountExperts(config).largest * StateBytesPerParameter(config.training());
}

Status CheckResidentBound(const RunConfig& config) {
  const int64_t bound = BoundBytes(config);
  const int64_t least = LeastResidentBytes(config);
  if (bound == 0 || bound >= least) return OkStatus();
  return InvalidArgument(Str("memory.expert_offloading.resident_mb: ", bound / kMiB,
                             " does not hold two experts, the one that computes and the next: give "
                             "at least ",
                             (least + kMiB - 1) / kMiB));
}

std::string ArenaWarning(const RunConfig& config) {
  const RankMemory memory = EstimateRank(config);
  if (memory.experts_host == 0 || config.parallel().gpus_per_rank() > 0) return "";
  return Str("memory.expert_offloading.resident_mb without spill_dir costs memory and saves none: ",
             ApproximateBytes(memory.experts_host), " in a host arena and ",
             ApproximateBytes(memory.experts_resident),
             " beside it; set memory.expert_offloading.spill_dir, or leave the bound out");
}

std::vector<Tier> TiersOf(const RunConfig& config) {
  const RankMemory memory = EstimateRank(config);
  const bool device = config.parallel().gpus_per_rank() > 0;
  std::vector<Tier> tiers = {
      {device ? "device" : "compute", memory.compute.Total() + (device ? 0 : kRuntimeBytes)},
      {"resident set", memory.experts_resident},
      {"host arena", memory.experts_host},
      {"disk spill", memory.experts_disk}};
  std::erase_if(tiers, [](const Tier& tier) { return tier.bytes == 0; });
  return tiers;
}

}  // namespace heddle::model
