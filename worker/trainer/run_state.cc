#include "worker/trainer/run_state.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "base/settings/settings.h"
#include "checkpoint/tensor_io/load.h"
#include "model/hf/model_dir.h"
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

// What decides how a model computes, with "auto" resolved: not how it was or will be trained.
heddle::v1::ModelConfig Computed(heddle::v1::ModelConfig model) {
  settings::FillDefaults(&model);
  const model::Heads heads = model::HeadsOf(model);
  model.set_n_kv_heads(static_cast<int32_t>(heads.kv));
  model.set_head_dim(static_cast<int32_t>(heads.dim));
  model.clear_max_position_embeddings();
  model.clear_dropout();
  if (model.attention().has_nsa()) {
    model.mutable_attention()->mutable_nsa()->clear_compress_init();
  }
  if (model.attention().has_dsa()) {
    heddle::v1::DsaConfig* dsa = model.mutable_attention()->mutable_dsa();
    dsa->clear_warmup_steps();
    dsa->clear_kl_weight();
    dsa->clear_freeze();
  }
  if (model.attention().has_gsa()) {
    heddle::v1::GsaConfig* gsa = model.mutable_attention()->mutable_gsa();
    gsa->clear_warmup_steps();
    gsa->clear_kl_weight();
    gsa->clear_freeze();
    gsa->clear_indexer_temperature();
    gsa->clear_indexer_lr_multiplier();
    gsa->clear_gate_bias_init();
  }
  if (model.has_moe()) {
    model.mutable_moe()->clear_aux_loss();
    model.mutable_moe()->clear_aux_form();
    model.mutable_moe()->clear_z_loss();
    model.mutable_moe()->clear_noise_std();
    model.mutable_moe()->clear_bias_center();
    model.mutable_moe()->clear_capacity_factor();
  }
  return model;
}

// Weights of another architecture may have the same names and shapes (rotary layout, window).
Status CheckSameModel(const std::string& dir, const heddle::v1::ModelConfig& model) {
  ASSIGN_OR_RETURN(const heddle::v1::ModelConfig imported, hf::ReadModelConfig(dir));
  std::string difference;
  google::protobuf::util::MessageDifferencer differencer;
  differencer.set_message_field_comparison(google::protobuf::util::MessageDifferencer::EQUIVALENT);
  differencer.ReportDifferencesToString(&difference);
  if (differencer.Compare(Computed(imported), Computed(model))) {
    return OkStatus();
  }
  return FailedPrecondition(
      Str("checkpoint.init_from: the model in ", dir, " is not the one of this run: ", difference));
}

TensorInfo InfoOf(const model::TensorSpec& spec) {
  TensorInfo info;
  info.set_name(spec.name);
  for (const int64_t size : spec.shape) {
    info.add_shape(size);
  }
  info.set_master_type(heddle::v1::ELEMENT_TYPE_F32);
  info.set_moment_type(heddle::v1::ELEMENT_TYPE_F32);
  return info;
}

std::vector<TensorInfo> ListTensors(const model::ModelPlan& plan, bool second_moment) {
  std::vector<TensorInfo> tensors;
  for (const model::TensorSpec& spec : plan.tensors) {
    tensors.push_back(InfoOf(spec));
    for (const TensorClass tensor_class : ClassesOf(second_moment)) {
      tensors.back().add_classes(tensor_class);
    }
  }
  for (const model::TensorSpec& spec : plan.buffers) {
    tensors.push_back(InfoOf(spec));
    tensors.back().add_classes(heddle::v1::TENSOR_CLASS_BUFFER);
  }
  return tensors;
}

}  // namespace

StatusOr<std::unique_ptr<RunState>> RunState::Create(const heddle::v1::ModelConfig& model,
                                                     const RunPlan& plan) {
  auto state = std::unique_ptr<RunState>(new RunState());
  state->seed_ = plan.seed;
  state->init_from_ = plan.init_from;
  if (!plan.init_from.empty()) {
    RETURN_IF_ERROR(CheckSameModel(plan.init_from, model));
  }
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
  state->groups_ = optim::GroupsOf(kept, plan.optimizer, plan.indexer_learning_rate_multiplier);
  state->warmup_groups_ = state->groups_;
  if (plan.freeze_during_warmup) {
    for (optim::GroupRange& group : state->warmup_groups_) group.frozen = !group.indexer;
  }
  ASSIGN_OR_RETURN(state->tensors_, checkpoint::NumberTensors(ListTensors(kept, second_moment)));
  for (const TensorInfo& info : state->tensors_) {
    const model::TensorSpec* spec = kept.Find(info.name());
    state->specs_.push_back(spec != nullptr ? spec : kept.FindBuffer(info.name()));
  }
  RETURN_IF_ERROR(state->Reset());
  return state;
}

Status RunState::Reset() {
  model::InitParameters(seed_, store_.get());
  std::fill(m_.begin(), m_.end(), 0.0f);
  std::fill(v_.begin(), v_.end(), 0.0f);
  counters_ = Counters();
  return init_from_.empty() ? OkStatus() : hf::ReadWeights(init_from_, store_.get());
}

optim::Shard RunState::shard() {
  return {.flat_offset = 0,
          .master = store_->master(),
          .m = m_,
          .v = v_,
          .gradient = store_->gradients(),
          .compute_bf16 = store_->compute_bf16()};
}

void RunState::DropFrozenGradients() {
  const std::span<float> gradients = store_->gradients();
  for (const optim::GroupRange& group : warmup_groups_) {
    if (group.frozen) {
      std::fill(gradients.begin() + group.begin, gradients.begin() + group.end, 0.0f);
    }
  }
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

float* RunState::Base(size_t tensor, int tensor_class) {
  float* flat = tensor_class == heddle::v1::TENSOR_CLASS_BUFFER    ? store_->buffers().data()
                : tensor_class == heddle::v1::TENSOR_CLASS_MASTER  ? store_->master().data()
                : tensor_class == heddle::v1::TENSOR_CLASS_MOMENT1 ? m_.data()
                                                                   : v_.data();
  return flat + specs_[tensor]->offset;
}

std::vector<checkpoint::LocalRange> RunState::RangesToSave(uint32_t rank, uint32_t world) {
  std::vector<checkpoint::LocalRange> whole;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    for (const int tensor_class : tensors_[i].classes()) {
      whole.push_back({.tensor = tensors_[i].id(),
                       .tensor_class = static_cast<TensorClass>(tensor_class),
                       .first = 0,
                       .count = static_cast<uint64_t>(specs_[i]->elements),
                       .data = Base(i, tensor_class)});
    }
  }
  return checkpoint::ReplicaShare(tensors_, whole, rank, world);
}

Status RunState::Load(const heddle::v1::CheckpointRecord& record, const std::string& root) {
  std::vector<checkpoint::WantedRange> wanted;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    for (const int tensor_class : tensors_[i].classes()) {
      wanted.push_back({.name = tensors_[i].name(),
                        .shape = specs_[i]->shape,
                        .tensor_class = static_cast<TensorClass>(tensor_class),
                        .first = 0,
                        .count = static_cast<uint64_t>(specs_[i]->elements),
                        .data = Base(i, tensor_class)});
    }
  }
  RETURN_IF_ERROR(checkpoint::LoadRanges(record, root, wanted));
  store_->RefreshComputeWeights();
  return OkStatus();
}

}  // namespace heddle::trainer
