// Where the layers of a model find their tensors, however their memory is kept: whole in a
// ParameterStore, or sharded over ranks (worker/shard).
#pragma once

#include <span>
#include <vector>

#include "model/layers/sublayer.h"
#include "model/parameter_store.h"

namespace heddle::model {

at::ScalarType ComputeType(Precision precision);

// The memory that a model computes with. Borrowed; outlives the model.
struct ModelMemory {
  const ModelPlan* plan = nullptr;
  Precision precision = Precision::kFp32;
  // As in layers::LayerStorage. The memory of a unit's storage need be there only while the unit
  // is visited (UnitHooks).
  std::vector<at::Tensor> weights;
  std::vector<at::Tensor> gradients;
  std::span<float> buffers;  // [plan->buffer_elements]
  layers::ExpertAccess experts;
};
ModelMemory MemoryOf(ParameterStore& store);

// One per layer, in order.
std::vector<layers::LayerStorage> StoragesOf(const ModelMemory& memory);
std::vector<layers::LayerStorage> StoragesOf(ParameterStore& store);
// Tensors outside of the layers, by their whole name.
layers::LayerStorage ModelStorage(const ModelMemory& memory);
layers::LayerStorage ModelStorage(ParameterStore& store);

}  // namespace heddle::model
