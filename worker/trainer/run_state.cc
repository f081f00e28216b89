#include "worker/trainer/run_state.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>
#include <iterator>
#include <map>
#include <new>
#include <set>
#include <utility>

#include "base/settings/settings.h"
#include "checkpoint/tensor_io/load.h"
#include "model/hf/model_dir.h"
#include "model/model_plan.h"
#include "model/saved_tensors.h"

namespace heddle::trainer {

namespace {

using heddle::v1::TensorClass;
using heddle::v1::TensorInfo;

// The moments of an offloaded piece, which lie beside its master, from element `first` of it on.
void AttachMoments(const shard::Held& held, optim::Moments type, size_t first,
                   optim::Shard* shard) {
  const size_t size = shard->master.size();
  if (type == optim::Moments::kBf16) {
    shard->m_bf16 = {reinterpret_cast<uint16_t*>(held.moments[0]) + first, size};
    if (held.moments[1] != nullptr) {
      shard->v_bf16 = {reinterpret_cast<uint16_t*>(held.moments[1]) + first, size};
    }
  } else {
    shard->m = {reinterpret_cast<float*>(held.moments[0]) + first, size};
    if (held.moments[1] != nullptr) {
      shard->v = {reinterpret_cast<float*>(held.moments[1]) + first, size};
    }
  }
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

heddle::v1::ElementType ElementTypeOf(optim::Moments moments) {
  return moments == optim::Moments::kBf16 ? heddle::v1::ELEMENT_TYPE_BF16
                                          : heddle::v1::ELEMENT_TYPE_F32;
}

void Widen(const uint16_t* from, int64_t count, float* to) {
  std::transform(from, from + count, to, [](uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  });
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
  shard::Options options = plan.shard;
  options.precision = plan.precision;
  options.rank = rank;
  options.world = world;
  options.moments = plan.optimizer.algorithm == optim::Algorithm::kAdamW ? 2 : 1;
  options.moment_bytes = plan.optimizer.moments == optim::Moments::kBf16 ? 2 : 4;
  state->spill_dir_ = options.offload.spill_dir;
  state->rank_ = rank;
  state->world_ = world;
  ASSIGN_OR_RETURN(state->whole_, model::PlanModel(model));
  ASSIGN_OR_RETURN(
      model::ModelPlan layout,
      model::PlanModel(model, model::ExpertsOfRank(model, rank, options.expert_degree)));
  ASSIGN_OR_RETURN(state->parameters_, shard::MakeParameters(std::move(layout), options));
  const model::ModelPlan& kept = state->parameters_->plan();
  const int64_t elements = state->parameters_->owned_elements();
  try {
    state->moments_.Allocate(plan.optimizer, elements);
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(Str("no memory for the moments of ", elements, " parameters"));
  }
  state->FindRuns();
  state->groups_ = optim::GroupsOf(kept, plan.optimizer, plan.indexer_learning_rate_multiplier);
  state->warmup_groups_ = state->groups_;
  if (plan.freeze_during_warmup) {
    for (optim::GroupRange& group : state->warmup_groups_) group.frozen = !group.indexer;
  }
  ASSIGN_OR_RETURN(state->tensors_,
                   checkpoint::NumberTensors(model::SavedTensors(
                       state->whole_, {.second = state->moments_.has_second(),
                                       .type = ElementTypeOf(state->moments_.type())})));
  for (const TensorInfo& info : state->tensors_) {
    const model::TensorSpec* spec = state->whole_.Find(info.name());
    state->specs_.push_back(spec != nullptr ? spec : state->whole_.FindBuffer(info.name()));
    state->local_.push_back(spec != nullptr ? kept.Find(info.name())
                                            : kept.FindBuffer(info.name()));
    if (spec != nullptr && state->local_.back() != nullptr) {
      state->by_offset_.push_back(state->local_.size() - 1);
    }
  }
  std::sort(state->by_offset_.begin(), state->by_offset_.end(), [&](size_t a, size_t b) {
    return state->local_[a]->offset < state->local_[b]->offset;
  });
  RETURN_IF_ERROR(state->Reset());
  return state;
}

Status RunState::Reset() {
  moments_.Zero();
  counters_ = Counters();
  numeric_ = NumericPolicy(numeric_.policy());
  skipped_.clear();
  RETURN_IF_ERROR(shard::InitParameters(seed_, parameters_.get()));
  return init_from_.empty() ? OkStatus() : ReadInitialWeights();
}

// Straight into what this rank holds: a copy of the whole model would not fit where its experts are
// divided or offloaded.
Status RunState::ReadInitialWeights() {
  std::vector<hf::WeightRange> ranges;
  RETURN_IF_ERROR(ForEachPieces(
      shard::Touch::kResident, [&](const std::vector<Piece>& pieces, bool /*offloaded*/) {
        for (const Piece& piece : pieces) {
          if (IsMoment(piece.tensor_class)) continue;
          ranges.push_back({tensors_[piece.tensor].name(), piece.first, piece.count,
                            static_cast<float*>(piece.data), nullptr});
        }
        return OkStatus();
      }));
  const model::ModelPlan& kept = parameters_->plan();
  for (const model::TensorSpec& tensor : kept.tensors) {
    if (tensor.offset < parameters_->offloaded_from()) continue;
    ranges.push_back({tensor.name, 0, tensor.elements, nullptr,
                      [this, &tensor](int64_t first, std::span<const float> values) {
                        return parameters_->WriteState(tensor.offset + first, 0,
                                                       std::as_bytes(values));
                      }});
  }
  RETURN_IF_ERROR(hf::ReadWeightRanges(init_from_, whole_, ranges));
  return parameters_->RefreshComputeWeights();
}

Status RunState::ForEachShard(bool frozen, const std::function<void(const optim::Shard&)>& visit) {
  const shard::Touch touch = frozen ? shard::Touch::kResident : shard::Touch::kUpdate;
  return parameters_->ForEachHeld(touch, [&](const shard::Held& held) {
    auto run =
        std::prev(std::upper_bound(runs_.begin(), runs_.end(), held.range.begin,
                                   [](int64_t at, const Run& later) { return at < later.begin; }));
    for (int64_t begin = held.range.begin; begin < held.range.end; ++run) {
      const auto next = std::next(run);
      const int64_t end =
          next == runs_.end() ? held.range.end : std::min(next->begin, held.range.end);
      visit(ShardOf(held, *run, begin, static_cast<size_t>(end - begin)));
      begin = end;
    }
    return OkStatus();
  });
}

optim::Shard RunState::ShardOf(const shard::Held& held, const Run& run, int64_t begin,
                               size_t count) {
  const auto first = static_cast<size_t>(begin - held.range.begin);
  optim::Shard shard;
  shard.flat_offset = begin;
  shard.rounding_offset = begin + run.shift;
  shard.master = held.master.subspan(first, count);
  shard.gradient = held.gradient.subspan(first, count);
  if (!held.compute_bf16.empty()) shard.compute_bf16 = held.compute_bf16.subspan(first, count);
  if (held.offloaded) {
    AttachMoments(held, moments_.type(), first, &shard);
  } else {
    moments_.Attach(held.owned_offset + begin - held.range.begin, &shard);
  }
  return shard;
}

// Neighbours of one layout are mostly neighbours of the other: a run for everything but the
// experts, one for the experts of each layer. Padding goes with the tensor before it.
void RunState::FindRuns() {
  runs_ = {Run()};
  for (const model::TensorSpec& tensor : parameters_->plan().tensors) {
    const int64_t shift = whole_.Find(tensor.name)->offset - tensor.offset;
    if (shift != runs_.back().shift) runs_.push_back({tensor.offset, shift});
  }
}

Status RunState::DropFrozenGradients() {
  RETURN_IF_ERROR(parameters_->DropOffloadedGradients());
  return parameters_->ForEachHeld(shard::Touch::kResident, [&](const shard::Held& held) {
    for (const optim::GroupRange& group : warmup_groups_) {
      if (!group.frozen) continue;
      const int64_t begin = std::max(group.begin, held.range.begin);
      const int64_t end = std::min(group.end, held.range.end);
      if (begin >= end) continue;
      std::fill_n(held.gradient.begin() + (begin - held.range.begin), end - begin, 0.0f);
    }
    return OkStatus();
  });
}

StatusOr<int64_t> RunState::FirstNonFiniteGradient() {
  int64_t first = -1;
  RETURN_IF_ERROR(
      parameters_->ForEachHeld(shard::Touch::kReadGradients, [&](const shard::Held& held) {
        if (first >= 0) return OkStatus();
        const auto bad = std::find_if(held.gradient.begin(), held.gradient.end(),
                                      [](float g) { return !std::isfinite(g); });
        if (bad != held.gradient.end()) first = held.range.begin + (bad - held.gradient.begin());
        return OkStatus();
      }));
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (local_[i] == nullptr || first < local_[i]->offset) continue;
    if (first >= local_[i]->offset + local_[i]->elements) continue;
    return specs_[i]->offset + first - local_[i]->offset;
  }
  return -1;
}

void RunState::AddPieces(const shard::Held& held, std::vector<Piece>* pieces) {
  // Experts come one by one: not every tensor is asked for each of them.
  auto next = std::upper_bound(by_offset_.begin(), by_offset_.end(), held.range.begin,
                               [&](int64_t at, size_t i) { return at < local_[i]->offset; });
  if (next != by_offset_.begin()) --next;
  for (; next != by_offset_.end() && local_[*next]->offset < held.range.end; ++next) {
    const size_t i = *next;
    const model::TensorSpec* spec = local_[i];
    const int64_t begin = std::max(spec->offset, held.range.begin);
    const int64_t end = std::min(spec->offset + spec->elements, held.range.end);
    if (begin >= end) continue;
    const int64_t within = begin - held.range.begin;
    for (const int tensor_class : tensors_[i].classes()) {
      if (tensor_class == heddle::v1::TENSOR_CLASS_BUFFER) continue;  // another layout
      void* data = held.master.data() + within;
      if (IsMoment(tensor_class)) {
        data = MomentAt(held, tensor_class == heddle::v1::TENSOR_CLASS_MOMENT2, within);
      }
      pieces->push_back(
          {i, tensor_class, begin - spec->offset, end - begin, data, held.replica, held.replicas});
    }
  }
}

void* RunState::MomentAt(const shard::Held& held, bool second, int64_t within) {
  if (!held.offloaded) return moments_.At(second, held.owned_offset + within);
  const int64_t bytes = moments_.type() == optim::Moments::kBf16 ? 2 : 4;
  return held.moments[second ? 1 : 0] + bytes * within;
}

Status RunState::ForEachPieces(shard::Touch touch, const VisitPieces& visit) {
  std::vector<Piece> resident;
  RETURN_IF_ERROR(parameters_->ForEachHeld(touch, [&](const shard::Held& held) {
    if (!held.offloaded) {
      AddPieces(held, &resident);
      return OkStatus();
    }
    std::vector<Piece> pieces;
    AddPieces(held, &pieces);
    return visit(pieces, /*offloaded=*/true);
  }));
  for (size_t i = 0; i < tensors_.size(); ++i) {
    for (const int tensor_class : tensors_[i].classes()) {
      if (tensor_class != heddle::v1::TENSOR_CLASS_BUFFER) continue;
      resident.push_back({i, tensor_class, 0, local_[i]->elements,
                          parameters_->buffers().data() + local_[i]->offset, rank_, world_});
    }
  }
  return visit(resident, /*offloaded=*/false);
}

std::vector<checkpoint::LocalRange> RunState::RangesOf(const std::vector<Piece>& pieces) const {
  std::vector<checkpoint::LocalRange> ranges;
  // By how many ranks have the same, and which of them this one is.
  std::map<std::pair<int, int>, std::vector<checkpoint::LocalRange>> shared;
  for (const Piece& piece : pieces) {
    const checkpoint::LocalRange range = {
        .tensor = tensors_[piece.tensor].id(),
        .tensor_class = static_cast<TensorClass>(piece.tensor_class),
        .first = static_cast<uint64_t>(piece.first),
        .count = static_cast<uint64_t>(piece.count),
        .data = piece.data};
    (piece.replicas == 1 ? ranges : shared[{piece.replica, piece.replicas}]).push_back(range);
  }
  for (const auto& [place, same] : shared) {
    const std::vector<checkpoint::LocalRange> mine = checkpoint::ReplicaShare(
        tensors_, same, static_cast<uint32_t>(place.first), static_cast<uint32_t>(place.second));
    ranges.insert(ranges.end(), mine.begin(), mine.end());
  }
  return ranges;
}

Status RunState::ForEachRanges(const VisitRanges& visit) {
  return ForEachPieces(shard::Touch::kReadState,
                       [&](const std::vector<Piece>& pieces, bool offloaded) {
                         return visit(RangesOf(pieces), offloaded);
                       });
}

Status RunState::CopyTo(checkpoint::Snapshot* snapshot) {
  snapshot->Clear();
  return ForEachRanges([&](const std::vector<checkpoint::LocalRange>& ranges, bool offloaded) {
    return offloaded && !spill_dir_.empty() ? snapshot->CopyToDisk(tensors_, ranges, spill_dir_)
                                            : snapshot->Copy(tensors_, ranges);
  });
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

// Every class of every tensor is asked for, if only for none of its elements: a checkpoint that
// lacks one is another model's.
void RunState::AddUnheld(std::vector<Piece>* pieces) const {
  std::set<std::pair<size_t, int>> held;
  for (const Piece& piece : *pieces) held.emplace(piece.tensor, piece.tensor_class);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    for (const int tensor_class : tensors_[i].classes()) {
      if (held.contains({i, tensor_class})) continue;
      Piece none;
      none.tensor = i;
      none.tensor_class = tensor_class;
      pieces->push_back(none);
    }
  }
}

Status RunState::Load(const heddle::v1::CheckpointRecord& record, const std::string& root) {
  ASSIGN_OR_RETURN(const heddle::v1::ElementType stored, StoredMoments(record));
  const bool widens = stored != ElementTypeOf(moments_.type());
  std::deque<std::vector<uint16_t>> narrow;  // what widened ranges are read into
  std::vector<std::pair<const uint16_t*, Piece>> widened;
  std::vector<checkpoint::WantedRange> wanted;
  RETURN_IF_ERROR(
      ForEachPieces(shard::Touch::kResident, [&](std::vector<Piece> pieces, bool /*offloaded*/) {
        AddUnheld(&pieces);
        for (const Piece& piece : pieces) {
          checkpoint::WantedRange range = WantedOf(piece, stored);
          if (widens && IsMoment(piece.tensor_class) && range.data != nullptr) {
            range.data = narrow.emplace_back(static_cast<size_t>(piece.count)).data();
            widened.emplace_back(narrow.back().data(), piece);
          }
          wanted.push_back(std::move(range));
        }
        return OkStatus();
      }));
  RETURN_IF_ERROR(checkpoint::LoadRanges(record, root, wanted));
  for (const auto& [from, piece] : widened) {
    Widen(from, piece.count, static_cast<float*>(piece.data));
  }
  return parameters_->RefreshComputeWeights();
}

checkpoint::WantedRange RunState::WantedOf(const Piece& piece, heddle::v1::ElementType stored) {
  const bool moment = IsMoment(piece.tensor_class);
  checkpoint::WantedRange range = {.name = tensors_[piece.tensor].name(),
                                   .shape = specs_[piece.tensor]->shape,
                                   .tensor_class = static_cast<TensorClass>(piece.tensor_class),
                                   .type = moment ? stored : heddle::v1::ELEMENT_TYPE_F32,
                                   .first = static_cast<uint64_t>(piece.first),
                                   .count = static_cast<uint64_t>(piece.count),
                                   .data = piece.data};
  const model::TensorSpec* local = local_[piece.tensor];
  if (local == nullptr || local->offset < parameters_->offloaded_from() ||
      piece.tensor_class == heddle::v1::TENSOR_CLASS_BUFFER) {
    return range;
  }
  range.count = static_cast<uint64_t>(local->elements);
  const int part = !moment ? 0 : piece.tensor_class == heddle::v1::TENSOR_CLASS_MOMENT2 ? 2 : 1;
  const bool widens = moment && stored != ElementTypeOf(moments_.type());
  range.take = [this, part, widens, offset = local->offset](uint64_t first,
                                                            std::span<const std::byte> bytes) {
    const int64_t at = offset + static_cast<int64_t>(first);
    if (!widens) return parameters_->WriteState(at, part, bytes);
    std::vector<float> wide(bytes.size() / sizeof(uint16_t));
    Widen(reinterpret_cast<const uint16_t*>(bytes.data()), static_cast<int64_t>(wide.size()),
          wide.data());
    return parameters_->WriteState(at, part, std::as_bytes(std::span<const float>(wide)));
  };
  return range;
}

}  // namespace heddle::trainer
