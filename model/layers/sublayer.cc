#include "model/layers/sublayer.h"

#include <ATen/core/Tensor.h>

#include <string>

#include "base/status/status.h"

namespace heddle::layers {
namespace {

std::string FullName(int layer, const std::string& name) {
  return layer == LayerStorage::kNoLayer ? name : Str("model.layers.", layer, ".", name);
}

at::Tensor View(const LayerStorage& storage, const std::string& name,
                const std::vector<at::Tensor>& flats, int64_t joined_rows) {
  const model::TensorSpec* spec = storage.plan->Find(FullName(storage.layer, name));
  HEDDLE_CHECK(spec != nullptr, name);
  std::vector<int64_t> shape = spec->shape;
  if (joined_rows > 0) shape[0] = joined_rows;
  const size_t unit = flats.size() == 1 ? 0 : static_cast<size_t>(spec->unit);
  const int64_t base = flats.size() == 1 ? 0 : storage.plan->units[unit].offset;
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  return flats[unit].narrow(0, spec->offset - base, elements).view(shape);
}

}  // namespace

at::Tensor LayerStorage::Weight(const std::string& name) const {
  return View(*this, name, weights, 0);
}
at::Tensor LayerStorage::Gradient(const std::string& name) const {
  return View(*this, name, gradients, 0);
}
at::Tensor LayerStorage::JoinedWeight(const std::string& name, int64_t rows) const {
  return View(*this, name, weights, rows);
}
at::Tensor LayerStorage::JoinedGradient(const std::string& name, int64_t rows) const {
  return View(*this, name, gradients, rows);
}
float* LayerStorage::Buffer(const std::string& name) const {
  const model::TensorSpec* spec = plan->FindBuffer(FullName(layer, name));
  return spec == nullptr ? nullptr : buffers + spec->offset;
}
bool LayerStorage::Has(const std::string& name) const {
  return plan->Find(FullName(layer, name)) != nullptr;
}

}  // namespace heddle::layers
