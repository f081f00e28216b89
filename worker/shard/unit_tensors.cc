#include "worker/shard/unit_tensors.h"

#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <cstring>
#include <utility>

namespace heddle::shard {

namespace {

constexpr size_t kAlignment = 128;

}  // namespace

void MoveTo(const at::Tensor& flat, std::byte* memory) {
  flat.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(
      at::DataPtr(memory, at::Device(at::kCPU)));
}

std::vector<at::Tensor> Unplaced(const std::vector<int64_t>& elements, at::ScalarType type) {
  // LibTorch wants an address to begin with; it is never looked at.
  alignas(kAlignment) static std::byte none[kAlignment];
  std::vector<at::Tensor> tensors;
  for (const int64_t count : elements) {
    tensors.push_back(at::from_blob(none, {count}, at::TensorOptions().dtype(type)));
    MoveTo(tensors.back(), nullptr);
  }
  return tensors;
}

void UnitTensors::Free::operator()(std::byte* memory) const { std::free(memory); }

UnitTensors::UnitTensors(const Layout& layout, at::ScalarType type) {
  std::vector<int64_t> elements;
  for (int u = 0; u < layout.units(); ++u) {
    elements.push_back(layout.unit(u).padded(layout.world()));
    Unit unit;
    unit.bytes = static_cast<size_t>(elements.back()) * c10::elementSize(type);
    units_.push_back(std::move(unit));
  }
  tensors_ = Unplaced(elements, type);
}

Status UnitTensors::Acquire(int index) {
  Unit& unit = units_[static_cast<size_t>(index)];
  HEDDLE_CHECK(unit.memory == nullptr, "unit ", index);
  const auto fits = spare_.lower_bound(unit.bytes);
  if (fits != spare_.end()) {
    unit.capacity = fits->first;
    unit.memory = std::move(fits->second);
    spare_.erase(fits);
  } else {
    unit.capacity = (unit.bytes + kAlignment) / kAlignment * kAlignment;
    unit.memory = Memory(static_cast<std::byte*>(std::aligned_alloc(kAlignment, unit.capacity)));
    if (unit.memory == nullptr) {
      return ResourceExhausted(Str("no memory for ", unit.bytes, " bytes of unit ", index));
    }
    total_ += unit.capacity;
  }
  MoveTo(tensors_[static_cast<size_t>(index)], unit.memory.get());
  return OkStatus();
}

void UnitTensors::Release(int index) {
  Unit& unit = units_[static_cast<size_t>(index)];
  HEDDLE_CHECK(unit.memory != nullptr, "unit ", index);
  MoveTo(tensors_[static_cast<size_t>(index)], nullptr);
  spare_.emplace(unit.capacity, std::move(unit.memory));
}

}  // namespace heddle::shard
