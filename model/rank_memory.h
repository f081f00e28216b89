// Where the memory of one rank lies, with experts offloaded (memory.expert_offloading) or divided
// over ranks (parallel.expert): what it computes in, the host arena of experts, their spill files.
// Torch-free; of target model_plan. Source: training-runtime.md sections 4 (5), 5.7, 10, 12 and 18.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model_plan.h"

namespace heddle::v1 {
class RunConfig;
}  // namespace heddle::v1

namespace heddle::model {

struct RankMemory {
  // All but offloaded experts; with the experts where nothing is offloaded. Experts are divided
  // over parallel.expert ranks, all else over all ranks.
  MemoryEstimate compute;
  // Of the offloaded experts of this rank, weights, gradients, masters and moments: the resident
  // set under memory.expert_offloading.resident_mb. Without a spill_dir and with a bound below all
  // of them, a host arena beside it, which in the end has a copy of every block. With a spill_dir,
  // files that are allocated for every block, and the masters and moments that a save copies beside
  // them.
  int64_t experts_resident = 0;
  int64_t experts_host = 0;
  int64_t experts_disk = 0;
  // Expert parameters of this rank, and the bytes that one of them takes: 18 with bf16 weights and
  // fp32 moments.
  int64_t expert_parameters = 0;
  int64_t bytes_per_expert_parameter = 0;

  // Of the rank's process: all but the disk. Without kRuntimeBytes (training_plan.h).
  int64_t Total() const { return compute.Total() + experts_resident + experts_host; }
  // What the experts hold, copies in other tiers left out.
  int64_t ExpertBytes() const { return expert_parameters * bytes_per_expert_parameter; }
};
// All zero for a model that PlanModel refuses.
RankMemory EstimateRank(const heddle::v1::RunConfig& config);

// Experts are offloaded: memory.expert_offloading.enabled, and there are experts.
bool OffloadsExperts(const heddle::v1::RunConfig& config);

// The resident set must hold the expert that computes and the one that comes next, whole blocks of
// the widest layer (training-runtime.md 12.13). 0 where nothing is offloaded.
int64_t LeastResidentBytes(const heddle::v1::RunConfig& config);
// INVALID_ARGUMENT: memory.expert_offloading.resident_mb is a bound below that.
Status CheckResidentBound(const heddle::v1::RunConfig& config);

// Without a spill_dir and without a GPU a bound saves nothing: the arena is host memory too. A
// sentence for the plan's warnings, empty where it does not apply.
std::string ArenaWarning(const heddle::v1::RunConfig& config);

// The tiers of a rank, those that are empty left out: "device" or "compute" (host memory, without a
// GPU), "resident set", "host arena", "disk spill".
struct Tier {
  std::string name;
  int64_t bytes = 0;
};
std::vector<Tier> TiersOf(const heddle::v1::RunConfig& config);

}  // namespace heddle::model
