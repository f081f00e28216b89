#include "worker/trainer/run_state.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>
#include <new>
#include <utility>

#include "base/settings/settings.h"
#include "checkpoint/tensor_io/load.h"
#include "model/hf/model_dir.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"
#include "model/saved_tensors.h"

namespace heddle::trainer {

namespace {

using heddle::v1::TensorClass;
using heddle::v1::TensorInfo;

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

heddle::v1::ElementType ElementTypeOf(optim::Moments moments) {
  return moments == optim::Moments::kBf16 ? heddle::v1::ELEMENT_TYPE_BF16
                                          : heddle::v1::ELEMENT_TYPE_F32;
}

bool IsMoment(int tensor_class) {
  return tensor_class == heddle::v1::TENSOR_CLASS_MOMENT1 ||
         tensor_class == heddle::v1::TENSOR_CLASS_MOMENT2;
}

}  // namespace

StatusOr<std::unique_ptr<RunState>> RunState::Create(const heddle::v1::ModelConfig& model,
                                                     const RunPlan& plan, int rank, int world) {
  auto state = std::unique_ptr<RunState>(new RunState());
  state->seed_ = plan.seed;
  state->init_from_ = plan.init_from;
  state->numeric_ = NumericPolicy(plan.nan_policy);
  if (!plan.init_from.empty()) {
    RETURN_IF_ERROR(CheckSameModel(plan.init_from, model));
  }
  ASSIGN_OR_RETURN(model::ModelPlan layout, model::PlanModel(model));
  shard::Options options = plan.shard;
  options.precision = plan.precision;
  options.rank = rank;
  options.world = world;
  ASSIGN_OR_RETURN(state->parameters_, shard::MakeParameters(std::move(layout), options));
  const model::ModelPlan& kept = state->parameters_->plan();
  const int64_t elements = state->parameters_->owned_elements();
  try {
    state->moments_.Allocate(plan.optimizer, elements);
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(Str("no memory for the moments of ", elements, " parameters"));
  }
  state->groups_ = optim::GroupsOf(kept, plan.optimizer, plan.indexer_learning_rate_multiplier);
  state->warmup_groups_ = state->groups_;
  if (plan.freeze_during_warmup) {
    for (optim::GroupRange& group : state->warmup_groups_) group.frozen = !group.indexer;
  }
  ASSIGN_OR_RETURN(state->tensors_, checkpoint::NumberTensors(model::SavedTensors(
                                        kept, {.second = state->moments_.has_second(),
                                               .type = ElementTypeOf(state->moments_.type())})));
  for (const TensorInfo& info : state->tensors_) {
    const model::TensorSpec* spec = kept.Find(info.name());
    state->specs_.push_back(spec != nullptr ? spec : kept.FindBuffer(info.name()));
  }
  RETURN_IF_ERROR(state->Reset());
  return state;
}

Status RunState::Reset() {
  moments_.Zero();
  counters_ = Counters();
  numeric_ = NumericPolicy(numeric_.policy());
  skipped_.clear();
  shard::InitParameters(seed_, parameters_.get());
  return init_from_.empty() ? OkStatus() : ReadInitialWeights();
}

// Passes through a whole copy of the model, which is gone before the first step.
Status RunState::ReadInitialWeights() {
  ASSIGN_OR_RETURN(const std::unique_ptr<model::ParameterStore> whole,
                   model::ParameterStore::Create(parameters_->plan(), model::Precision::kFp32));
  RETURN_IF_ERROR(hf::ReadWeights(init_from_, whole.get()));
  for (const shard::Held& held : parameters_->held()) {
    const std::span<const float> from = std::as_const(*whole).master().subspan(
        static_cast<size_t>(held.range.begin), held.master.size());
    std::copy(from.begin(), from.end(), held.master.begin());
  }
  std::copy(whole->buffers().begin(), whole->buffers().end(), parameters_->buffers().begin());
  parameters_->RefreshComputeWeights();
  return OkStatus();
}

std::vector<optim::Shard> RunState::shards() {
  std::vector<optim::Shard> shards;
  for (const shard::Held& held : parameters_->held()) {
    optim::Shard shard;
    shard.flat_offset = held.range.begin;
    shard.master = held.master;
    shard.gradient = held.gradient;
    shard.compute_bf16 = held.compute_bf16;
    moments_.Attach(held.owned_offset, &shard);
    shards.push_back(shard);
  }
  return shards;
}

void RunState::DropFrozenGradients() {
  for (const shard::Held& held : parameters_->held()) {
    for (const optim::GroupRange& group : warmup_groups_) {
      if (!group.frozen) continue;
      const int64_t begin = std::max(group.begin, held.range.begin);
      const int64_t end = std::min(group.end, held.range.end);
      if (begin >= end) continue;
      std::fill_n(held.gradient.begin() + (begin - held.range.begin), end - begin, 0.0f);
    }
  }
}

int64_t RunState::FirstNonFiniteGradient() {
  for (const shard::Held& held : parameters_->held()) {
    const auto bad = std::find_if(held.gradient.begin(), held.gradient.end(),
                                  [](float g) { return !std::isfinite(g); });
    if (bad != held.gradient.end()) return held.range.begin + (bad - held.gradient.begin());
  }
  return -1;
}

std::vector<RunState::Piece> RunState::PiecesOf(size_t tensor, int tensor_class) {
  const model::TensorSpec& spec = *specs_[tensor];
  if (tensor_class == heddle::v1::TENSOR_CLASS_BUFFER) {
    return {{0, spec.elements, parameters_->buffers().data() + spec.offset}};
  }
  std::vector<Piece> pieces;
  for (const shard::Held& held : parameters_->held()) {
    const int64_t begin = std::max(spec.offset, held.range.begin);
    const int64_t end = std::min(spec.offset + spec.elements, held.range.end);
    if (begin >= end) continue;
    const int64_t within = begin - held.range.begin;
    void* data = IsMoment(tensor_class)
                     ? moments_.At(tensor_class == heddle::v1::TENSOR_CLASS_MOMENT2,
                                   held.owned_offset + within)
                     : held.master.data() + within;
    pieces.push_back({begin - spec.offset, end - begin, data});
  }
  return pieces;
}

std::vector<checkpoint::LocalRange> RunState::RangesToSave(uint32_t rank, uint32_t world) {
  std::vector<checkpoint::LocalRange> shared;
  std::vector<checkpoint::LocalRange> own;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    for (const int tensor_class : tensors_[i].classes()) {
      const bool everywhere =
          parameters_->replicated() || tensor_class == heddle::v1::TENSOR_CLASS_BUFFER;
      for (const Piece& piece : PiecesOf(i, tensor_class)) {
        (everywhere ? shared : own)
            .push_back({.tensor = tensors_[i].id(),
                        .tensor_class = static_cast<TensorClass>(tensor_class),
                        .first = static_cast<uint64_t>(piece.first),
                        .count = static_cast<uint64_t>(piece.count),
                        .data = piece.data});
      }
    }
  }
  std::vector<checkpoint::LocalRange> ranges =
      checkpoint::ReplicaShare(tensors_, shared, rank, world);
  ranges.insert(ranges.end(), own.begin(), own.end());
  return ranges;
}

StatusOr<heddle::v1::ElementType> RunState::StoredMoments(
    const heddle::v1::CheckpointRecord& record) const {
  const heddle::v1::ElementType own = ElementTypeOf(moments_.type());
  for (const TensorInfo& info : record.tensors()) {
    if (std::none_of(info.classes().begin(), info.classes().end(), IsMoment)) continue;
    if (info.moment_type() == own || info.moment_type() == heddle::v1::ELEMENT_TYPE_BF16) {
      return info.moment_type();
    }
    return FailedPrecondition(
        "training.moments: bf16, but the checkpoint keeps its moments in fp32, and rounding them "
        "would not go on with the same run: set training.moments: fp32");
  }
  return own;
}

Status RunState::Load(const heddle::v1::CheckpointRecord& record, const std::string& root) {
  ASSIGN_OR_RETURN(const heddle::v1::ElementType stored, StoredMoments(record));
  const bool widens = stored != ElementTypeOf(moments_.type());
  std::deque<std::vector<uint16_t>> narrow;  // what widened ranges are read into
  std::vector<std::pair<const uint16_t*, Piece>> widened;
  std::vector<checkpoint::WantedRange> wanted;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    for (const int tensor_class : tensors_[i].classes()) {
      std::vector<Piece> pieces = PiecesOf(i, tensor_class);
      if (pieces.empty()) pieces.push_back({});  // known, though other ranks hold all of it
      for (const Piece& piece : pieces) {
        void* data = piece.data;
        if (widens && IsMoment(tensor_class)) {
          data = narrow.emplace_back(static_cast<size_t>(piece.count)).data();
          widened.emplace_back(narrow.back().data(), piece);
        }
        wanted.push_back({.name = tensors_[i].name(),
                          .shape = specs_[i]->shape,
                          .tensor_class = static_cast<TensorClass>(tensor_class),
                          .type = IsMoment(tensor_class) ? stored : heddle::v1::ELEMENT_TYPE_F32,
                          .first = static_cast<uint64_t>(piece.first),
                          .count = static_cast<uint64_t>(piece.count),
                          .data = data});
      }
    }
  }
  RETURN_IF_ERROR(checkpoint::LoadRanges(record, root, wanted));
  for (const auto& [from, piece] : widened) {
    float* to = static_cast<float*>(piece.data);
    std::transform(from, from + piece.count, to, [](uint16_t bits) {
      return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    });
  }
  parameters_->RefreshComputeWeights();
  return OkStatus();
}

}  // namespace heddle::trainer
