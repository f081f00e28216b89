#include "model/saved_tensors.h"

namespace heddle::model {

namespace v1 = heddle::v1;

namespace {

v1::TensorInfo InfoOf(const TensorSpec& spec) {
  v1::TensorInfo info;
  info.set_name(spec.name);
  for (const int64_t size : spec.shape) info.add_shape(size);
  info.set_master_type(v1::ELEMENT_TYPE_F32);
  info.set_moment_type(v1::ELEMENT_TYPE_F32);
  return info;
}

}  // namespace

std::vector<v1::TensorInfo> SavedTensors(const ModelPlan& plan, const SavedMoments& moments) {
  std::vector<v1::TensorInfo> tensors;
  for (const TensorSpec& spec : plan.tensors) {
    v1::TensorInfo& info = tensors.emplace_back(InfoOf(spec));
    info.set_moment_type(moments.type);
    info.add_classes(v1::TENSOR_CLASS_MASTER);
    info.add_classes(v1::TENSOR_CLASS_MOMENT1);
    if (moments.second) info.add_classes(v1::TENSOR_CLASS_MOMENT2);
  }
  for (const TensorSpec& spec : plan.buffers) {
    tensors.emplace_back(InfoOf(spec)).add_classes(v1::TENSOR_CLASS_BUFFER);
  }
  return tensors;
}

}  // namespace heddle::model
