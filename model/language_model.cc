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

class LanguageModelImpl : public LanguageModel {
 public:
  LanguageModelImpl(const heddle::v1::ModelConfig& config, ParameterStore* store,
                    LanguageModelOptions options);

  StatusOr<LossSum> ForwardBackward(const PackedBatch& batch, const layers::StepInfo& step,
                                    const UnitHooks& hooks) override;
  StatusOr<LossSum> Evaluate(const PackedBatch& batch, const layers::StepInfo& step) override;
  StatusOr<at::Tensor> Logits(const PackedBatch& batch) override;
  std::span<double> statistics() override { return statistics_; }
  void UpdateBuffers(bool frozen) override;

 private:
  int HeadUnit() const { return layers_ + 1; }
  bool Recomputes() const { return options_.recompute == Recompute::kFull; }
  layers::Documents Begin(const CheckedBatch& batch);
  std::vector<layers::Sublayer*> Sublayers();
  // Moves what the layers counted into statistics_.
  void CollectStatistics();
  Status Forward(const CheckedBatch& batch, const layers::PassContext& context,
                 const UnitHooks& hooks);
  Status Backward(const CheckedBatch& batch, const layers::PassContext& context,
                  const UnitHooks& hooks, const at::Tensor& gradient);
  // The last hidden state of a forward that keeps nothing.
  at::Tensor HiddenOnly(const CheckedBatch& batch, const layers::StepInfo* step);
  // Loss of the rows; with `gradient` defined, writes dL/dx into it and adds weight gradients.
  double Head(const CheckedBatch& batch, const at::Tensor& x, double loss_scale,
              const at::Tensor& gradient);

  const heddle::v1::ModelConfig config_;
  const LanguageModelOptions options_;
  const int layers_;
  const at::ScalarType type_;
  const at::ScalarType statistics_type_;
  const std::vector<layers::LayerStorage> storages_;
  attention::AttentionStack attention_;
  std::vector<Block> blocks_;
  layers::Norm final_norm_;

  at::Tensor embedding_VD_;
  at::Tensor embedding_gradient_VD_;
  at::Tensor head_VD_;  // the embedding where tied
  at::Tensor head_gradient_VD_;

  layers::BufferPool kept_;
  layers::BufferPool scratch_;
  std::vector<at::Tensor> inputs_;  // inputs_[l] of block l, inputs_[layers_] of the head
  std::vector<double> statistics_;
};

LanguageModelImpl::LanguageModelImpl(const heddle::v1::ModelConfig& config, ParameterStore* store,
                                     LanguageModelOptions options)
    : config_(config),
      options_(options),
      layers_(config.n_layers()),
      type_(ComputeType(store->precision())),
      statistics_type_(layers::StatisticsType(type_)),
      storages_(StoragesOf(*store)),
      attention_(
          config_, storages_,
          options.reference_attention ? attention::Cores::kReference : attention::Cores::kFast),
      final_norm_(config_, ModelStorage(*store), "model.norm") {
  const layers::LayerStorage model = ModelStorage(*store);
  const std::string head = config.tie_embeddings() ? "model.embed_tokens.weight" : "lm_head.weight";
  embedding_VD_ = model.Weight("model.embed_tokens.weight");
  embedding_gradient_VD_ = model.Gradient("model.embed_tokens.weight");
  head_VD_ = model.Weight(head);
  head_gradient_VD_ = model.Gradient(head);
  for (const layers::LayerStorage& storage : storages_) blocks_.emplace_back(config_, storage);
  size_t counted = 0;
  for (layers::Sublayer* sublayer : Sublayers()) counted += sublayer->statistics().size();
  statistics_.assign(counted, 0.0);
}

layers::Documents LanguageModelImpl::Begin(const CheckedBatch& batch) {
  layers::Documents documents;
  documents.cu_seqlens = batch.cu_seqlens;
  documents.positions = batch.positions;
  documents.longest = batch.longest_document;
  attention_.Begin(documents);
  for (Block& block : blocks_) block.feed_forward()->Begin(documents);
  return documents;
}

std::vector<layers::Sublayer*> LanguageModelImpl::Sublayers() {
  std::vector<layers::Sublayer*> all;
  for (int layer = 0; layer < layers_; ++layer) {
    all.push_back(attention_.layer(layer));
    all.push_back(blocks_[static_cast<size_t>(layer)].feed_forward());
  }
  return all;
}

void LanguageModelImpl::CollectStatistics() {
  size_t next = 0;
  for (layers::Sublayer* sublayer : Sublayers()) {
    for (double& value : sublayer->statistics()) {
      statistics_[next++] += value;
      value = 0;
    }
  }
}

void LanguageModelImpl::UpdateBuffers(bool frozen) {
  size_t next = 0;
  bool attention = false;
  for (layers::Sublayer* sublayer : Sublayers()) {
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

Status LanguageModelImpl::Forward(const CheckedBatch& batch, const layers::PassContext& context,
                                  const UnitHooks& hooks) {
  const int64_t n = static_cast<int64_t>(batch.ids.size());
  const int64_t d = config_.d_model();
  inputs_.clear();
  for (int layer = 0; layer <= layers_; ++layer) inputs_.push_back(kept_.Take({n, d}, type_));
  RETURN_IF_ERROR(Call(hooks.before_forward, 0));
  layers::Embed(embedding_VD_, batch.ids, inputs_[0]);
  RETURN_IF_ERROR(Call(hooks.after_forward, 0));
  for (int layer = 0; layer < layers_; ++layer) {
    const size_t l = static_cast<size_t>(layer);
    RETURN_IF_ERROR(Call(hooks.before_forward, layer + 1));
    const size_t mark = kept_.Mark();
    blocks_[l].Forward(context, attention_.layer(layer), inputs_[l], inputs_[l + 1]);
    if (Recomputes()) kept_.Release(mark);
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

Status LanguageModelImpl::Backward(const CheckedBatch& batch, const layers::PassContext& context,
                                   const UnitHooks& hooks, const at::Tensor& gradient) {
  layers::PassContext again = context;
  again.pass = layers::Pass::kRecompute;
  for (int layer = layers_ - 1; layer >= 0; --layer) {
    const size_t l = static_cast<size_t>(layer);
    layers::Sublayer* attention = attention_.layer(layer);
    RETURN_IF_ERROR(Call(hooks.before_backward, layer + 1));
    const size_t mark = kept_.Mark();
    if (Recomputes()) blocks_[l].Forward(again, attention, inputs_[l], at::Tensor());
    blocks_[l].Backward(Recomputes() ? again : context, attention, gradient);
    kept_.Release(mark);
    RETURN_IF_ERROR(Call(hooks.after_backward, layer + 1));
  }
  RETURN_IF_ERROR(Call(hooks.before_backward, 0));
  layers::EmbedBackward(gradient, batch.ids, embedding_gradient_VD_);
  return Call(hooks.after_backward, 0);
}

StatusOr<LossSum> LanguageModelImpl::ForwardBackward(const PackedBatch& packed,
                                                     const layers::StepInfo& step,
                                                     const UnitHooks& hooks) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  const c10::InferenceMode no_graph;
  kept_.Release(0);
  scratch_.Release(0);
  const layers::Documents documents = Begin(batch);
  LossSum sum;
  layers::PassContext context;
  context.pass = Recomputes() ? layers::Pass::kSelect : layers::Pass::kTrain;
  context.documents = &documents;
  context.step = &step;
  context.losses = &sum.layers;
  context.counts = &sum.counts;
  context.kept = &kept_;
  context.scratch = &scratch_;
  RETURN_IF_ERROR(Forward(batch, context, hooks));
  RETURN_IF_ERROR(Call(hooks.before_forward, HeadUnit()));
  const at::Tensor& x = inputs_[static_cast<size_t>(layers_)];
  const at::Tensor gradient = scratch_.Take({x.size(0), x.size(1)}, type_);
  sum.tokens = batch.valid_labels;
  sum.loss = Head(batch, x, step.loss_scale, gradient);
  // The head runs forward and backward at once, chunk by chunk, so that the logits are never held.
  RETURN_IF_ERROR(Call(hooks.after_forward, HeadUnit()));
  RETURN_IF_ERROR(Call(hooks.before_backward, HeadUnit()));
  RETURN_IF_ERROR(Call(hooks.after_backward, HeadUnit()));
  RETURN_IF_ERROR(Backward(batch, context, hooks, gradient));
  CollectStatistics();
  return sum;
}

at::Tensor LanguageModelImpl::HiddenOnly(const CheckedBatch& batch, const layers::StepInfo* step) {
  const int64_t n = static_cast<int64_t>(batch.ids.size());
  const int64_t d = config_.d_model();
  kept_.Release(0);
  scratch_.Release(0);
  const layers::Documents documents = Begin(batch);
  layers::PassContext context;
  context.documents = &documents;
  context.step = step;
  context.kept = &kept_;
  context.scratch = &scratch_;
  at::Tensor x = kept_.Take({n, d}, type_);
  at::Tensor y = kept_.Take({n, d}, type_);
  layers::Embed(embedding_VD_, batch.ids, x);
  const size_t mark = kept_.Mark();
  for (int layer = 0; layer < layers_; ++layer) {
    blocks_[static_cast<size_t>(layer)].Forward(context, attention_.layer(layer), x, y);
    kept_.Release(mark);
    std::swap(x, y);
  }
  return x;
}

StatusOr<LossSum> LanguageModelImpl::Evaluate(const PackedBatch& packed,
                                              const layers::StepInfo& step) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  const c10::InferenceMode no_graph;
  LossSum sum;
  sum.tokens = batch.valid_labels;
  sum.loss = Head(batch, HiddenOnly(batch, &step), 1.0, at::Tensor());
  return sum;
}

StatusOr<at::Tensor> LanguageModelImpl::Logits(const PackedBatch& packed) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  const c10::InferenceMode no_graph;
  const at::Tensor x = HiddenOnly(batch, nullptr);
  const int64_t n = x.size(0);
  const at::Tensor h = scratch_.Take({n, x.size(1)}, type_);
  const at::Tensor norm_saved = scratch_.Take({n}, statistics_type_);
  final_norm_.Forward(x, h, norm_saved);
  const at::Tensor logits = at::empty({n, config_.vocab_size()}, type_);
  layers::Linear(h, head_VD_, logits);
  return logits.to(statistics_type_);
}

}  // namespace

StatusOr<std::unique_ptr<LanguageModel>> LanguageModel::Create(
    const heddle::v1::ModelConfig& config, ParameterStore* store, LanguageModelOptions options) {
  ASSIGN_OR_RETURN(const ModelPlan plan, PlanModel(config));
  if (plan.flat_elements != store->plan().flat_elements ||
      plan.tensors.size() != store->plan().tensors.size()) {
    return InvalidArgument("parameters: the store was made for another model");
  }
  return std::make_unique<LanguageModelImpl>(config, store, options);
}

}  // namespace heddle::model
