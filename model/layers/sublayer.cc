#include "model/layers/sublayer.h"

#include <ATen/ops/from_blob.h>

#include <string>

#include "base/status/status.h"

namespace heddle::layers {
namespace {

std::string FullName(int layer, const std::string& name) {
  return layer == LayerStorage::kNoLayer ? name : Str("model.layers.", layer, ".", name);
}

at::Tensor View(const LayerStorage& storage, const std::string& name, void* flat,
                at::ScalarType type, int64_t joined_rows) {
  const model::TensorSpec* spec = storage.plan->Find(FullName(storage.layer, name));
  HEDDLE_CHECK(spec != nullptr, name);
  std::vector<int64_t> shape = spec->shape;
  if (joined_rows > 0) shape[0] = joined_rows;
  char* data =
      static_cast<char*>(flat) + spec->offset * static_cast<int64_t>(c10::elementSize(type));
  return at::from_blob(data, shape, at::TensorOptions().dtype(type));
}

}  // namespace

at::Tensor LayerStorage::Weight(const std::string& name) const {
  return View(*this, name, weights, type, 0);
}
at::Tensor LayerStorage::Gradient(const std::string& name) const {
  return View(*this, name, gradients, statistics_type(), 0);
}
at::Tensor LayerStorage::JoinedWeight(const std::string& name, int64_t rows) const {
  return View(*this, name, weights, type, rows);
}
at::Tensor LayerStorage::JoinedGradient(const std::string& name, int64_t rows) const {
  return View(*this, name, gradients, statistics_type(), rows);
}
float* LayerStorage::Buffer(const std::string& name) const {
  const model::TensorSpec* spec = plan->FindBuffer(FullName(layer, name));
  return spec == nullptr ? nullptr : buffers + spec->offset;
}
bool LayerStorage::Has(const std::string& name) const {
  return plan->Find(FullName(layer, name)) != nullptr;
}

}  // namespace heddle::layers
