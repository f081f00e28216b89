// Where the layers of a model find their tensors in a parameter store.
#pragma once

#include <vector>

#include "model/layers/sublayer.h"
#include "model/parameter_store.h"

namespace heddle::model {

at::ScalarType ComputeType(Precision precision);

// One per layer, in order. `store` outlives them.
std::vector<layers::LayerStorage> StoragesOf(ParameterStore& store);
// Tensors outside of the layers, by their whole name.
layers::LayerStorage ModelStorage(ParameterStore& store);

}  // namespace heddle::model
