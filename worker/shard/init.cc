#include <algorithm>
#include <utility>

#include "model/parameter_store.h"
#include "worker/shard/parameters.h"

namespace heddle::shard {

StatusOr<std::unique_ptr<Parameters>> MakeParameters(model::ModelPlan plan,
                                                     const Options& options) {
  return options.mode == Mode::kNone ? MakeReplicated(std::move(plan), options)
                                     : MakeSharded(std::move(plan), options);
}

void InitParameters(uint64_t seed, Parameters* parameters) {
  for (const Held& held : parameters->held()) {
    std::fill(held.master.begin(), held.master.end(), 0.0f);
    for (const model::TensorSpec& tensor : parameters->plan().tensors) {
      const int64_t begin = std::max(tensor.offset, held.range.begin);
      const int64_t end = std::min(tensor.offset + tensor.elements, held.range.end);
      if (begin >= end) continue;
      model::InitRange(seed, tensor, begin - tensor.offset,
                       held.master.subspan(static_cast<size_t>(begin - held.range.begin),
                                           static_cast<size_t>(end - begin)));
    }
  }
  std::fill(parameters->buffers().begin(), parameters->buffers().end(), 0.0f);
  parameters->RefreshComputeWeights();
}

}  // namespace heddle::shard
