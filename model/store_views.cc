#include "model/store_views.h"

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

layers::LayerStorage ModelStorage(ParameterStore& store) {
  layers::LayerStorage storage;
  storage.plan = &store.plan();
  storage.layer = layers::LayerStorage::kNoLayer;
  storage.weights = store.compute_data();
  storage.gradients = store.gradient_data();
  storage.buffers = store.buffers().data();
  storage.type = ComputeType(store.precision());
  return storage;
}

std::vector<layers::LayerStorage> StoragesOf(ParameterStore& store) {
  std::vector<layers::LayerStorage> storages;
  layers::LayerStorage storage = ModelStorage(store);
  // Units are the embedding, one per block, the head.
  const int layers = static_cast<int>(store.plan().units.size()) - 2;
  for (storage.layer = 0; storage.layer < layers; ++storage.layer) storages.push_back(storage);
  return storages;
}

}  // namespace heddle::model
