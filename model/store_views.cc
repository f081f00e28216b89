#include "model/store_views.h"

#include <ATen/ops/from_blob.h>

namespace heddle::model {

at::ScalarType ComputeType(Precision precision) {
  switch (precision) {
    case Precision::kBf16:
      return at::kBFloat16;
    case Precision::kFp64:
      return at::kDouble;
    case Precision::kFp32:
      break;
  }
  return at::kFloat;
}

ModelMemory MemoryOf(ParameterStore& store) {
  const int64_t elements = store.plan().flat_elements;
  const at::ScalarType type = ComputeType(store.precision());
  ModelMemory memory;
  memory.plan = &store.plan();
  memory.precision = store.precision();
  memory.weights = {
      at::from_blob(store.compute_data(), {elements}, at::TensorOptions().dtype(type))};
  memory.gradients = {at::from_blob(store.gradient_data(), {elements},
                                    at::TensorOptions().dtype(layers::StatisticsType(type)))};
  memory.buffers = store.buffers();
  return memory;
}

layers::LayerStorage ModelStorage(const ModelMemory& memory) {
  layers::LayerStorage storage;
  storage.plan = memory.plan;
  storage.layer = layers::LayerStorage::kNoLayer;
  storage.weights = memory.weights;
  storage.gradients = memory.gradients;
  storage.buffers = memory.buffers.data();
  storage.experts = memory.experts;
  storage.type = ComputeType(memory.precision);
  return storage;
}
layers::LayerStorage ModelStorage(ParameterStore& store) { return ModelStorage(MemoryOf(store)); }

std::vector<layers::LayerStorage> StoragesOf(const ModelMemory& memory) {
  std::vector<layers::LayerStorage> storages;
  layers::LayerStorage storage = ModelStorage(memory);
  // Dense units are the embedding, one per block, the head.
  const int layers = memory.plan->dense_units - 2;
  for (storage.layer = 0; storage.layer < layers; ++storage.layer) storages.push_back(storage);
  return storages;
}
std::vector<layers::LayerStorage> StoragesOf(ParameterStore& store) {
  return StoragesOf(MemoryOf(store));
}

}  // namespace heddle::model
