#include "worker/trainer/run_state.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "checkpoint/tensor_io/load.h"
#include "model/model_plan.h"

namespace heddle::trainer {

namespace {

using heddle::v1::TensorClass;
using heddle::v1::TensorInfo;

std::vector<TensorClass> ClassesOf(bool second_moment) {
  std::vector<TensorClass> classes = {heddle::v1::TENSOR_CLASS_MASTER,
                                      heddle::v1::TENSOR_CLASS_MOMENT1};
  if (second_moment) {
    classes.push_back(heddle::v1::TENSOR_CLASS_MOMENT2);
  }
  return classes;
}

}  // namespace

StatusOr<std::unique_ptr<RunState>> RunState::Create(const heddle::v1::ModelConfig& model,
                                                     const RunPlan& plan) {
  auto state = std::unique_ptr<RunState>(new RunState());
  state->seed_ = plan.seed;
  ASSIGN_OR_RETURN(model::ModelPlan layout, model::PlanModel(model));
  ASSIGN_OR_RETURN(state->store_, model::ParameterStore::Create(std::move(layout), plan.precision));
  const model::ModelPlan& kept = state->store_->plan();
  const size_t elements = static_cast<size_t>(kept.flat_elements);
  const bool second_moment = plan.optimizer.algorithm == optim::Algorithm::kAdamW;
  try {
    state->m_.assign(elements, 0.0f);
    state->v_.assign(second_moment ? elements : 0, 0.0f);
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(Str("no memory for the moments of ", elements, " parameters"));
  }
  state->groups_ = optim::GroupsOf(kept, plan.optimizer);
  std::vector<TensorInfo> tensors;
  for (const model::TensorSpec& spec : kept.tensors) {
    TensorInfo info;
    info.set_name(spec.name);
    for (const int64_t size : spec.shape) {
      info.add_shape(size);
    }
    info.set_master_type(heddle::v1::ELEMENT_TYPE_F32);
    info.set_moment_type(heddle::v1::ELEMENT_TYPE_F32);
    for (const TensorClass tensor_class : ClassesOf(second_moment)) {
      info.add_classes(tensor_class);
    }
    tensors.push_back(std::move(info));
  }
  ASSIGN_OR_RETURN(state->tensors_, checkpoint::NumberTensors(std::move(tensors)));
  for (const TensorInfo& info : state->tensors_) {
    state->specs_.push_back(kept.Find(info.name()));
  }
  model::InitParameters(plan.seed, state->store_.get());
  return state;
}

void RunState::Reset() {
  model::InitParameters(seed_, store_.get());
  std::fill(m_.begin(), m_.end(), 0.0f);
  std::fill(v_.begin(), v_.end(), 0.0f);
  counters_ = Counters();
}

optim::Shard RunState::shard() {
  return {.flat_offset = 0,
          .master = store_->master(),
          .m = m_,
          .v = v_,
          .gradient = store_->gradients(),
          .compute_bf16 = store_->compute_bf16()};
}

std::string RunState::FirstNonFiniteGradient() {
  const std::span<const float> gradients = store_->gradients();
  for (const model::TensorSpec& spec : store_->plan().tensors) {
    const auto part =
        gradients.subspan(static_cast<size_t>(spec.offset), static_cast<size_t>(spec.elements));
    if (std::any_of(part.begin(), part.end(), [](float g) { return !std::isfinite(g); })) {
      return spec.name;
    }
  }
  return "";
}

std::vector<checkpoint::LocalRange> RunState::RangesToSave(uint32_t rank, uint32_t world) const {
  std::vector<checkpoint::LocalRange> whole;
  const std::span<const float> master = std::as_const(*store_).master();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const size_t offset = static_cast<size_t>(specs_[i]->offset);
    for (const int tensor_class : tensors_[i].classes()) {
      const float* base = tensor_class == heddle::v1::TENSOR_CLASS_MASTER    ? master.data()
                          : tensor_class == heddle::v1::TENSOR_CLASS_MOMENT1 ? m_.data()
                                                                             : v_.data();
      whole.push_back({.tensor = tensors_[i].id(),
                       .tensor_class = static_cast<TensorClass>(tensor_class),
                       .first = 0,
                       .count = static_cast<uint64_t>(specs_[i]->elements),
                       .data = base + offset});
    }
  }
  return checkpoint::ReplicaShare(tensors_, whole, rank, world);
}

Status RunState::Load(const heddle::v1::CheckpointRecord& record, const std::string& root) {
  std::vector<checkpoint::WantedRange> wanted;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const size_t offset = static_cast<size_t>(specs_[i]->offset);
    for (const int tensor_class : tensors_[i].classes()) {
      float* base = tensor_class == heddle::v1::TENSOR_CLASS_MASTER    ? store_->master().data()
                    : tensor_class == heddle::v1::TENSOR_CLASS_MOMENT1 ? m_.data()
                                                                       : v_.data();
      wanted.push_back({.name = tensors_[i].name(),
                        .shape = specs_[i]->shape,
                        .tensor_class = static_cast<TensorClass>(tensor_class),
                        .first = 0,
                        .count = static_cast<uint64_t>(specs_[i]->elements),
                        .data = base + offset});
    }
  }
  RETURN_IF_ERROR(checkpoint::LoadRanges(record, root, wanted));
  store_->RefreshComputeWeights();
  return OkStatus();
}

}  // namespace heddle::trainer
