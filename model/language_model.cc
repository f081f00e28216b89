#include "model/language_model.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/attention/attention_stack.h"
#include "model/block.h"
#include "model/layers/layers.h"
#include "model/layers/norm.h"
#include "model/layers/sublayer.h"
#include "model/packed_batch.h"
#include "model/store_views.h"

namespace heddle::model {
namespace {

Status Call(const std::function<Status(int)>& hook, int unit) {
  return hook ? hook(unit) : OkStatus();
}

// What one micro-batch needs of its own on its way through the layers. Layer-major accumulation
// has several under way at a time; all of them read the same weights.
struct Lane {
  Lane(const heddle::v1::ModelConfig& config, const std::vector<layers::LayerStorage>& storages,
       attention::Cores cores)
      : attention(config, storages, cores) {
    for (const layers::LayerStorage& storage : storages) blocks.emplace_back(config, storage);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void Begin(CheckedBatch checked);
  std::vector<layers::Sublayer*> Sublayers();

  attention::AttentionStack attention;
  std::vector<Block> blocks;
  layers::BufferPool kept;
  // Of the micro-batch under way.
  CheckedBatch batch;
  layers::Documents documents;
  layers::StepInfo step;
  layers::PassContext context;
  std::vector<at::Tensor> inputs;  // inputs[l] of block l, inputs[layers] of the head
  at::Tensor gradient;             // of the output of the unit that is visited
};

class LanguageModelImpl : public LanguageModel {
 public:
  LanguageModelImpl(const heddle::v1::ModelConfig& config, const ModelMemory& memory,
                    LanguageModelOptions options);

  StatusOr<LossSum> ForwardBackward(std::span<const PackedBatch> batches,
                                    const layers::StepInfo& step, const UnitHooks& hooks) override;
  StatusOr<LossSum> Evaluate(const PackedBatch& batch, const layers::StepInfo& step,
                             const UnitHooks& hooks) override;
  StatusOr<at::Tensor> Logits(const PackedBatch& batch) override;
  std::span<double> statistics() override { return statistics_; }
  void UpdateBuffers(bool frozen) override;

 private:
  int HeadUnit() const { return layers_ + 1; }
  bool Recomputes() const { return options_.recompute == Recompute::kFull; }
  using Lanes = std::span<const std::unique_ptr<Lane>>;
  // The lanes that pass a block at a time.
  std::vector<Lanes> VisitsOf(Lanes lanes, int layer) const;
  // The way of some micro-batches through a block. `again`: as far as the backward needs it.
  void BlockForward(Lanes lanes, int layer, bool again);
  void BlockBackward(Lanes lanes, int layer);
  void AddLane();
  // The lanes of these batches, begun.
  StatusOr<Lanes> BeginLanes(std::span<const PackedBatch> batches, const layers::StepInfo& step,
                             LossSum* sum);
  Lane& first() { return *lanes_.front(); }
  // Moves what the layers counted into statistics_.
  void CollectStatistics(Lanes lanes);
  Status Forward(Lanes lanes, const UnitHooks& hooks);
  Status Heads(Lanes lanes, const UnitHooks& hooks, LossSum* sum);
  Status Backward(Lanes lanes, const UnitHooks& hooks);
  // The last hidden state of a forward that keeps nothing, in the first lane.
  StatusOr<at::Tensor> HiddenOnly(CheckedBatch batch, const layers::StepInfo* step,
                                  const UnitHooks& hooks);
  // Loss of the rows; with `gradient` defined, writes dL/dx into it and adds weight gradients.
  double Head(const CheckedBatch& batch, const at::Tensor& x, double loss_scale,
              const at::Tensor& gradient);

  const heddle::v1::ModelConfig config_;
  const LanguageModelOptions options_;
  const int layers_;
  const at::ScalarType type_;
  const at::ScalarType statistics_type_;
  const std::vector<layers::LayerStorage> storages_;
  std::vector<std::unique_ptr<Lane>> lanes_;  // at least one; more as they are needed
  layers::Norm final_norm_;

  at::Tensor embedding_VD_;
  at::Tensor embedding_gradient_VD_;
  at::Tensor head_VD_;  // the embedding where tied
  at::Tensor head_gradient_VD_;

  layers::BufferPool scratch_;
  // What recomputation makes anew, for the micro-batches that visit a block at a time: one pool for
  // all, or each of them would hold as much for good.
  layers::BufferPool redone_;
  std::vector<double> statistics_;
  Status failure_;  // of the layers of the pass under way
};

void Lane::Begin(CheckedBatch checked) {
  batch = std::move(checked);
  kept.Release(0);
  documents.cu_seqlens = batch.cu_seqlens;
  documents.positions = batch.positions;
  documents.longest = batch.longest_document;
  attention.Begin(documents);
  for (Block& block : blocks) block.feed_forward()->Begin(documents);
}

std::vector<layers::Sublayer*> Lane::Sublayers() {
  std::vector<layers::Sublayer*> all;
  for (size_t layer = 0; layer < blocks.size(); ++layer) {
    all.push_back(attention.layer(static_cast<int>(layer)));
    all.push_back(blocks[layer].feed_forward());
  }
  return all;
}

LanguageModelImpl::LanguageModelImpl(const heddle::v1::ModelConfig& config,
                                     const ModelMemory& memory, LanguageModelOptions options)
    : config_(config),
      options_(options),
      layers_(config.n_layers()),
      type_(ComputeType(memory.precision)),
      statistics_type_(layers::StatisticsType(type_)),
      storages_(StoragesOf(memory)),
      final_norm_(config_, ModelStorage(memory), "model.norm") {
  const layers::LayerStorage model = ModelStorage(memory);
  const std::string head = config.tie_embeddings() ? "model.embed_tokens.weight" : "lm_head.weight";
  embedding_VD_ = model.Weight("model.embed_tokens.weight");
  embedding_gradient_VD_ = model.Gradient("model.embed_tokens.weight");
  head_VD_ = model.Weight(head);
  head_gradient_VD_ = model.Gradient(head);
  AddLane();
  size_t counted = 0;
  for (layers::Sublayer* sublayer : first().Sublayers()) counted += sublayer->statistics().size();
  statistics_.assign(counted, 0.0);
}

void LanguageModelImpl::AddLane() {
  lanes_.push_back(std::make_unique<Lane>(
      config_, storages_,
      options_.reference_attention ? attention::Cores::kReference : attention::Cores::kFast));
}

StatusOr<LanguageModelImpl::Lanes> LanguageModelImpl::BeginLanes(
    std::span<const PackedBatch> batches, const layers::StepInfo& step, LossSum* sum) {
  std::vector<CheckedBatch> checked;
  for (const PackedBatch& batch : batches) {
    ASSIGN_OR_RETURN(CheckedBatch one, CheckBatch(batch, config_.vocab_size()));
    checked.push_back(std::move(one));
  }
  while (lanes_.size() < batches.size()) AddLane();
  scratch_.Release(0);
  redone_.Release(0);
  failure_ = OkStatus();
  int64_t first_token = step.first_token;
  for (size_t i = 0; i < checked.size(); ++i) {
    Lane& lane = *lanes_[i];
    lane.Begin(std::move(checked[i]));
    lane.step = step;
    lane.step.first_token = first_token;
    first_token += lane.documents.rows();
    lane.context = {};
    lane.context.pass = Recomputes() ? layers::Pass::kSelect : layers::Pass::kTrain;
    lane.context.documents = &lane.documents;
    lane.context.step = &lane.step;
    lane.context.losses = &sum->layers;
    lane.context.counts = &sum->counts;
    lane.context.kept = Recomputes() ? &redone_ : &lane.kept;
    lane.context.scratch = &scratch_;
    lane.context.failure = &failure_;
  }
  return Lanes(lanes_).first(batches.size());
}

void LanguageModelImpl::CollectStatistics(Lanes lanes) {
  for (const std::unique_ptr<Lane>& lane : lanes) {
    size_t next = 0;
    for (layers::Sublayer* sublayer : lane->Sublayers()) {
      for (double& value : sublayer->statistics()) {
        statistics_[next++] += value;
        value = 0;
      }
    }
  }
}

void LanguageModelImpl::UpdateBuffers(bool frozen) {
  size_t next = 0;
  bool attention = false;
  for (layers::Sublayer* sublayer : first().Sublayers()) {
    attention = !attention;  // a block's halves take turns
    const std::span<double> counted = sublayer->statistics();
    if (counted.empty()) continue;
    std::copy_n(statistics_.begin() + static_cast<std::ptrdiff_t>(next), counted.size(),
                counted.begin());
    next += counted.size();
    if (attention || !frozen) sublayer->UpdateBuffers();
    std::fill(counted.begin(), counted.end(), 0.0);
  }
}

// Layers whose experts come and go take all micro-batches in one visit; others take one after the
// other, so that what a micro-batch needs for a while is needed once.
std::vector<LanguageModelImpl::Lanes> LanguageModelImpl::VisitsOf(Lanes lanes, int layer) const {
  const layers::LayerStorage& storage = storages_[static_cast<size_t>(layer)];
  if (storage.experts.memory != nullptr && LayerHasExperts(config_, layer)) return {lanes};
  std::vector<Lanes> visits;
  for (size_t i = 0; i < lanes.size(); ++i) visits.push_back(lanes.subspan(i, 1));
  return visits;
}

void LanguageModelImpl::BlockForward(Lanes lanes, int layer, bool again) {
  const size_t l = static_cast<size_t>(layer);
  const size_t mark = redone_.Mark();
  std::vector<Block::ForwardCall> calls;
  for (const std::unique_ptr<Lane>& lane : lanes) {
    if (again) lane->context.pass = layers::Pass::kRecompute;
    calls.push_back({&lane->blocks[l], &lane->context, lane->attention.layer(layer),
                     lane->inputs[l], again ? at::Tensor() : lane->inputs[l + 1]});
  }
  if (options_.recompute == Recompute::kSelective) return Block::SelectiveForward(calls);
  Block::Forward(calls);
  if (Recomputes() && !again) redone_.Release(mark);
}

void LanguageModelImpl::BlockBackward(Lanes lanes, int layer) {
  const size_t mark = redone_.Mark();
  std::vector<size_t> kept_marks;
  for (const std::unique_ptr<Lane>& lane : lanes) kept_marks.push_back(lane->kept.Mark());
  if (Recomputes()) {
    BlockForward(lanes, layer, true);
    if (!failure_.ok()) return;
  }
  std::vector<Block::BackwardCall> calls;
  for (const std::unique_ptr<Lane>& lane : lanes) {
    calls.push_back({&lane->blocks[static_cast<size_t>(layer)], &lane->context,
                     lane->attention.layer(layer), lane->gradient});
  }
  if (options_.recompute == Recompute::kSelective) {
    Block::SelectiveBackward(calls, &redone_);
  } else {
    Block::Backward(calls);
  }
  for (size_t i = 0; i < lanes.size(); ++i) lanes[i]->kept.Release(kept_marks[i]);
  redone_.Release(mark);
}

Status LanguageModelImpl::Forward(Lanes lanes, const UnitHooks& hooks) {
  RETURN_IF_ERROR(Call(hooks.before_forward, 0));
  for (const std::unique_ptr<Lane>& lane : lanes) {
    const int64_t n = lane->documents.rows();
    lane->inputs.clear();
    for (int layer = 0; layer <= layers_; ++layer) {
      lane->inputs.push_back(lane->kept.Take({n, config_.d_model()}, type_));
    }
    layers::Embed(embedding_VD_, lane->batch.ids, lane->inputs[0]);
  }
  RETURN_IF_ERROR(Call(hooks.after_forward, 0));
  for (int layer = 0; layer < layers_; ++layer) {
    RETURN_IF_ERROR(Call(hooks.before_forward, layer + 1));
    for (const Lanes visit : VisitsOf(lanes, layer)) {
      BlockForward(visit, layer, false);
      RETURN_IF_ERROR(failure_);
    }
    RETURN_IF_ERROR(Call(hooks.after_forward, layer + 1));
  }
  return OkStatus();
}

double LanguageModelImpl::Head(const CheckedBatch& batch, const at::Tensor& x, double loss_scale,
                               const at::Tensor& gradient) {
  const int64_t n = x.size(0);
  const int64_t vocabulary = config_.vocab_size();
  const bool train = gradient.defined();
  const size_t mark = scratch_.Mark();
  const at::Tensor h = scratch_.Take({n, x.size(1)}, type_);
  const at::Tensor norm_saved = scratch_.Take({n}, statistics_type_);
  final_norm_.Forward(x, h, norm_saved);
  const int64_t chunk = LogitsChunkRows(
      n, vocabulary, static_cast<int64_t>(c10::elementSize(type_)), options_.logits_chunk_bytes);
  double loss = 0;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t rows = std::min(chunk, n - begin);
    const size_t chunk_mark = scratch_.Mark();
    const at::Tensor logits = scratch_.Take({rows, vocabulary}, type_);
    const at::Tensor h_rows = h.narrow(0, begin, rows);
    layers::Linear(h_rows, head_VD_, logits);
    const std::span<const int32_t> labels(batch.labels);
    loss += layers::CrossEntropy(
        logits, labels.subspan(static_cast<size_t>(begin), static_cast<size_t>(rows)), train,
        loss_scale);
    if (train) {
      layers::LinearWeightGradient(logits, h_rows, head_gradient_VD_);
      layers::LinearInputGradient(logits, head_VD_, gradient.narrow(0, begin, rows));
    }
    scratch_.Release(chunk_mark);
  }
  if (train) {
    final_norm_.Backward(x, norm_saved, gradient, at::Tensor(), gradient);
  }
  scratch_.Release(mark);
  return loss;
}

Status LanguageModelImpl::Heads(Lanes lanes, const UnitHooks& hooks, LossSum* sum) {
  RETURN_IF_ERROR(Call(hooks.before_forward, HeadUnit()));
  for (const std::unique_ptr<Lane>& lane : lanes) {
    const at::Tensor& x = lane->inputs[static_cast<size_t>(layers_)];
    lane->gradient = lane->kept.Take({x.size(0), x.size(1)}, type_);
    sum->tokens += lane->batch.valid_labels;
    sum->loss += Head(lane->batch, x, lane->step.loss_scale, lane->gradient);
  }
  // The head runs forward and backward at once, chunk by chunk, so that the logits are never held.
  RETURN_IF_ERROR(Call(hooks.after_forward, HeadUnit()));
  RETURN_IF_ERROR(Call(hooks.before_backward, HeadUnit()));
  return Call(hooks.after_backward, HeadUnit());
}

Status LanguageModelImpl::Backward(Lanes lanes, const UnitHooks& hooks) {
  for (int layer = layers_ - 1; layer >= 0; --layer) {
    RETURN_IF_ERROR(Call(hooks.before_backward, layer + 1));
    for (const Lanes visit : VisitsOf(lanes, layer)) {
      BlockBackward(visit, layer);
      RETURN_IF_ERROR(failure_);
    }
    RETURN_IF_ERROR(Call(hooks.after_backward, layer + 1));
  }
  RETURN_IF_ERROR(Call(hooks.before_backward, 0));
  for (const std::unique_ptr<Lane>& lane : lanes) {
    layers::EmbedBackward(lane->gradient, lane->batch.ids, embedding_gradient_VD_);
  }
  return Call(hooks.after_backward, 0);
}

StatusOr<LossSum> LanguageModelImpl::ForwardBackward(std::span<const PackedBatch> batches,
                                                     const layers::StepInfo& step,
                                                     const UnitHooks& hooks) {
  const c10::InferenceMode no_graph;
  LossSum sum;
  ASSIGN_OR_RETURN(const Lanes lanes, BeginLanes(batches, step, &sum));
  RETURN_IF_ERROR(Forward(lanes, hooks));
  RETURN_IF_ERROR(Heads(lanes, hooks, &sum));
  RETURN_IF_ERROR(Backward(lanes, hooks));
  CollectStatistics(lanes);
  return sum;
}

StatusOr<at::Tensor> LanguageModelImpl::HiddenOnly(CheckedBatch batch, const layers::StepInfo* step,
                                                   const UnitHooks& hooks) {
  Lane& lane = first();
  scratch_.Release(0);
  lane.Begin(std::move(batch));
  const int64_t n = lane.documents.rows();
  layers::PassContext context;
  context.documents = &lane.documents;
  context.step = step;
  context.kept = &lane.kept;
  context.scratch = &scratch_;
  failure_ = OkStatus();
  context.failure = &failure_;
  at::Tensor x = lane.kept.Take({n, config_.d_model()}, type_);
  at::Tensor y = lane.kept.Take({n, config_.d_model()}, type_);
  RETURN_IF_ERROR(Call(hooks.before_forward, 0));
  layers::Embed(embedding_VD_, lane.batch.ids, x);
  RETURN_IF_ERROR(Call(hooks.after_forward, 0));
  const size_t mark = lane.kept.Mark();
  for (int layer = 0; layer < layers_; ++layer) {
    RETURN_IF_ERROR(Call(hooks.before_forward, layer + 1));
    lane.blocks[static_cast<size_t>(layer)].Forward(context, lane.attention.layer(layer), x, y);
    RETURN_IF_ERROR(failure_);
    RETURN_IF_ERROR(Call(hooks.after_forward, layer + 1));
    lane.kept.Release(mark);
    std::swap(x, y);
  }
  return x;
}

StatusOr<LossSum> LanguageModelImpl::Evaluate(const PackedBatch& packed,
                                              const layers::StepInfo& step,
                                              const UnitHooks& hooks) {
  const c10::InferenceMode no_graph;
  ASSIGN_OR_RETURN(CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  ASSIGN_OR_RETURN(const at::Tensor x, HiddenOnly(std::move(batch), &step, hooks));
  LossSum sum;
  sum.tokens = first().batch.valid_labels;
  RETURN_IF_ERROR(Call(hooks.before_forward, HeadUnit()));
  sum.loss = Head(first().batch, x, 1.0, at::Tensor());
  RETURN_IF_ERROR(Call(hooks.after_forward, HeadUnit()));
  return sum;
}

StatusOr<at::Tensor> LanguageModelImpl::Logits(const PackedBatch& packed) {
  const c10::InferenceMode no_graph;
  ASSIGN_OR_RETURN(CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  ASSIGN_OR_RETURN(const at::Tensor x, HiddenOnly(std::move(batch), nullptr, {}));
  const int64_t n = x.size(0);
  const at::Tensor h = scratch_.Take({n, x.size(1)}, type_);
  const at::Tensor norm_saved = scratch_.Take({n}, statistics_type_);
  final_norm_.Forward(x, h, norm_saved);
  const at::Tensor logits = at::empty({n, config_.vocab_size()}, type_);
  layers::Linear(h, head_VD_, logits);
  return logits.to(statistics_type_);
}

}  // namespace

StatusOr<LossSum> LanguageModel::ForwardBackward(const PackedBatch& batch,
                                                 const layers::StepInfo& step,
                                                 const UnitHooks& hooks) {
  return ForwardBackward(std::span<const PackedBatch>(&batch, 1), step, hooks);
}

StatusOr<std::unique_ptr<LanguageModel>> LanguageModel::Create(
    const heddle::v1::ModelConfig& config, const ModelMemory& memory,
    LanguageModelOptions options) {
  ASSIGN_OR_RETURN(const ModelPlan plan, PlanModel(config, memory.plan->experts));
  if (plan.flat_elements != memory.plan->flat_elements ||
      plan.tensors.size() != memory.plan->tensors.size()) {
    return InvalidArgument("parameters: the memory was made for another model");
  }
  return std::make_unique<LanguageModelImpl>(config, memory, options);
}

StatusOr<std::unique_ptr<LanguageModel>> LanguageModel::Create(
    const heddle::v1::ModelConfig& config, ParameterStore* store, LanguageModelOptions options) {
  return Create(config, MemoryOf(*store), options);
}

}  // namespace heddle::model
