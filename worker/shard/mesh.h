// The parameters of one mesh: those of all ranks, or of the ranks that have the same experts. For
// this folder.
#pragma once

#include <memory>

#include "base/status/status.h"
#include "model/model_plan.h"
#include "worker/shard/parameters.h"

namespace heddle::shard {

// What the units of a plan are, and so the order of their visits.
enum class Units {
  kDense,   // embedding, blocks, head: the head runs forward and backward at once
  kExperts  // of a layer each, visited with its block
};

// options.rank and options.world are those of the mesh; expert_degree is not looked at. Reports
// know a unit of a collective as its number here, or, of experts, as `first_unit` and their layer
// (base/rank_words UnitText).
// RESOURCE_EXHAUSTED if the memory cannot be had.
StatusOr<std::unique_ptr<Parameters>> MakeReplicated(model::ModelPlan plan, const Options& options,
                                                     Units units, int first_unit);
StatusOr<std::unique_ptr<Parameters>> MakeSharded(model::ModelPlan plan, const Options& options,
                                                  Units units, int first_unit);

// The experts of `plan`, in a resident set (offloaded_experts.cc). INVALID_ARGUMENT: a mesh of more
// than one rank, or a bound that is too small, with the numbers; others of offload::MakeHome.
StatusOr<std::unique_ptr<Parameters>> MakeOffloaded(const model::ModelPlan& plan,
                                                    const Options& options);

// `experts` of options.world / options.expert_degree ranks.
std::unique_ptr<Parameters> JoinMeshes(model::ModelPlan plan, const Options& options,
                                       std::unique_ptr<Parameters> dense,
                                       std::unique_ptr<Parameters> experts);

}  // namespace heddle::shard
