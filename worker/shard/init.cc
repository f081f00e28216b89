#include <algorithm>
#include <utility>

#include "model/parameter_store.h"
#include "worker/shard/mesh.h"
#include "worker/shard/parameters.h"

namespace heddle::shard {

namespace {

StatusOr<std::unique_ptr<Parameters>> MakeMesh(model::ModelPlan plan, const Options& options,
                                               Units units, int first_unit) {
  return options.mode == Mode::kNone ? MakeReplicated(std::move(plan), options, units, first_unit)
                                     : MakeSharded(std::move(plan), options, units, first_unit);
}

}  // namespace

StatusOr<std::unique_ptr<Parameters>> MakeParameters(model::ModelPlan plan,
                                                     const Options& options) {
  HEDDLE_CHECK(options.expert_degree >= 1 && options.world % options.expert_degree == 0);
  ASSIGN_OR_RETURN(std::unique_ptr<Parameters> dense,
                   MakeMesh(model::DensePart(plan), options, Units::kDense, 0));
  if (plan.experts.count == 0) return dense;
  Options mesh = options;
  mesh.rank = options.rank / options.expert_degree;
  mesh.world = options.world / options.expert_degree;
  if (mesh.world == 1) mesh.mode = Mode::kNone;  // nothing to share: a gather would be a copy
  StatusOr<std::unique_ptr<Parameters>> experts =
      options.offload.enabled
          ? MakeOffloaded(plan, mesh)
          : MakeMesh(model::ExpertPart(plan), mesh, Units::kExperts, plan.dense_units);
  RETURN_IF_ERROR(experts);
  return JoinMeshes(std::move(plan), options, std::move(dense), *std::move(experts));
}

Status InitParameters(uint64_t seed, Parameters* parameters) {
  RETURN_IF_ERROR(parameters->ForEachHeld(Touch::kWriteState, [&](const Held& held) {
    std::fill(held.master.begin(), held.master.end(), 0.0f);
    const std::vector<model::TensorSpec>& tensors = parameters->plan().tensors;
    auto next = std::upper_bound(
        tensors.begin(), tensors.end(), held.range.begin,
        [](int64_t at, const model::TensorSpec& tensor) { return at < tensor.offset; });
    if (next != tensors.begin()) --next;
    for (; next != tensors.end() && next->offset < held.range.end; ++next) {
      const model::TensorSpec& tensor = *next;
      const int64_t begin = std::max(tensor.offset, held.range.begin);
      const int64_t end = std::min(tensor.offset + tensor.elements, held.range.end);
      if (begin >= end) continue;
      model::InitRange(seed, tensor, begin - tensor.offset,
                       held.master.subspan(static_cast<size_t>(begin - held.range.begin),
                                           static_cast<size_t>(end - begin)));
    }
    return OkStatus();
  }));
  std::fill(parameters->buffers().begin(), parameters->buffers().end(), 0.0f);
  return parameters->RefreshComputeWeights();
}

}  // namespace heddle::shard
