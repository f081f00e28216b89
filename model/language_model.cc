#include "model/language_model.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/attention/attention.h"
#include "model/block.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/layers.h"
#include "model/layers/rope.h"
#include "model/packed_batch.h"

namespace heddle::model {
namespace {

at::ScalarType ComputeType(Precision precision) {
  switch (precision) {
    case Precision::kBf16:
      return at::kBFloat16;
    case Precision::kFp64:
      return at::kDouble;
    case Precision::kFp32:
      break;
  }
  return at::kFloat;
}

Status Call(const std::function<Status(int)>& hook, int unit) {
  return hook ? hook(unit) : OkStatus();
}

class LanguageModelImpl : public LanguageModel {
 public:
  LanguageModelImpl(const heddle::v1::ModelConfig& config, ParameterStore* store,
                    LanguageModelOptions options);

  StatusOr<LossSum> ForwardBackward(const PackedBatch& batch, double loss_scale,
                                    const UnitHooks& hooks) override;
  StatusOr<LossSum> Evaluate(const PackedBatch& batch) override;
  StatusOr<at::Tensor> Logits(const PackedBatch& batch) override;

 private:
  int HeadUnit() const { return layers_ + 1; }
  bool Recomputes() const { return options_.recompute == Recompute::kFull; }
  void Begin(const CheckedBatch& batch);
  BlockContext Context(int layer, const CheckedBatch& batch) const;
  Status Forward(const CheckedBatch& batch, const UnitHooks& hooks);
  Status Backward(const CheckedBatch& batch, const UnitHooks& hooks, const at::Tensor& gradient);
  // The last hidden state of a forward that keeps nothing.
  at::Tensor HiddenOnly(const CheckedBatch& batch);
  // Loss of the rows; with `gradient` defined, writes dL/dx into it and adds weight gradients.
  double Head(const CheckedBatch& batch, const at::Tensor& x, double loss_scale,
              const at::Tensor& gradient);

  const heddle::v1::ModelConfig config_;
  ParameterStore* store_;
  const LanguageModelOptions options_;
  const int layers_;
  const at::ScalarType type_;
  const at::ScalarType statistics_;
  layers::RopeTables rope_;
  std::unique_ptr<attention::AttentionCore> dense_;
  std::unique_ptr<attention::AttentionCore> window_;

  at::Tensor embedding_VD_;
  at::Tensor embedding_gradient_VD_;
  at::Tensor final_norm_D_;
  at::Tensor final_norm_gradient_D_;
  at::Tensor head_VD_;  // the embedding where tied
  at::Tensor head_gradient_VD_;
  std::vector<BlockTensors> weights_;
  std::vector<BlockTensors> gradients_;

  layers::BufferPool kept_;
  layers::BufferPool scratch_;
  std::vector<at::Tensor> inputs_;  // inputs_[l] of block l, inputs_[layers_] of the head
  std::vector<BlockSaved> saved_;
};

LanguageModelImpl::LanguageModelImpl(const heddle::v1::ModelConfig& config, ParameterStore* store,
                                     LanguageModelOptions options)
    : config_(config),
      store_(store),
      options_(options),
      layers_(config.n_layers()),
      type_(ComputeType(store->precision())),
      statistics_(type_ == at::kDouble ? at::kDouble : at::kFloat),
      rope_(layers::RopeFrequenciesOf(config, HeadsOf(config).dim), type_ == at::kDouble),
      saved_(static_cast<size_t>(layers_)) {
  const double scale = rope_.frequencies().softmax_scale_factor /
                       std::sqrt(static_cast<double>(HeadsOf(config).dim));
  dense_ = attention::MakeDense(scale);
  window_ = attention::MakeSlidingWindow(scale, WindowOf(config));
  const ModelPlan& plan = store->plan();
  const auto weight = [&](const std::string& name) {
    return ViewTensor(plan, name, store->compute_data(), type_);
  };
  const auto gradient = [&](const std::string& name) {
    return ViewTensor(plan, name, store->gradient_data(), statistics_);
  };
  const std::string head = config.tie_embeddings() ? "model.embed_tokens.weight" : "lm_head.weight";
  embedding_VD_ = weight("model.embed_tokens.weight");
  embedding_gradient_VD_ = gradient("model.embed_tokens.weight");
  final_norm_D_ = weight("model.norm.weight");
  final_norm_gradient_D_ = gradient("model.norm.weight");
  head_VD_ = weight(head);
  head_gradient_VD_ = gradient(head);
  for (int layer = 0; layer < layers_; ++layer) {
    weights_.push_back(ViewBlock(plan, layer, store->compute_data(), type_));
    gradients_.push_back(ViewBlock(plan, layer, store->gradient_data(), statistics_));
  }
}

void LanguageModelImpl::Begin(const CheckedBatch& batch) {
  rope_.Ensure(std::max<int64_t>(batch.longest_document, 1));
  bool dense = false;
  bool window = false;
  for (int layer = 0; layer < layers_; ++layer) {
    (LayerKind(config_, layer) == heddle::v1::ATTENTION_KIND_SWA ? window : dense) = true;
  }
  if (dense) dense_->Begin(batch.cu_seqlens);
  if (window) window_->Begin(batch.cu_seqlens);
}

BlockContext LanguageModelImpl::Context(int layer, const CheckedBatch& batch) const {
  BlockContext context;
  context.heads = HeadsOf(config_);
  context.norm_eps = config_.norm_eps();
  context.rope = &rope_;
  context.positions = &batch.positions;
  const bool window = LayerKind(config_, layer) == heddle::v1::ATTENTION_KIND_SWA;
  context.core = window ? window_.get() : dense_.get();
  return context;
}

Status LanguageModelImpl::Forward(const CheckedBatch& batch, const UnitHooks& hooks) {
  const int64_t n = static_cast<int64_t>(batch.ids.size());
  const int64_t d = config_.d_model();
  kept_.Release(0);
  scratch_.Release(0);
  inputs_.clear();
  for (int layer = 0; layer <= layers_; ++layer) inputs_.push_back(kept_.Take({n, d}, type_));
  RETURN_IF_ERROR(Call(hooks.before_forward, 0));
  layers::Embed(embedding_VD_, batch.ids, inputs_[0]);
  RETURN_IF_ERROR(Call(hooks.after_forward, 0));
  for (int layer = 0; layer < layers_; ++layer) {
    const size_t l = static_cast<size_t>(layer);
    RETURN_IF_ERROR(Call(hooks.before_forward, layer + 1));
    const size_t mark = kept_.Mark();
    BlockForward(weights_[l], Context(layer, batch), inputs_[l], inputs_[l + 1], !Recomputes(),
                 &kept_, &saved_[l]);
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
  const at::Tensor rstd = scratch_.Take({n}, statistics_);
  layers::RmsNorm(x, final_norm_D_, config_.norm_eps(), h, rstd);
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
    layers::RmsNormBackward(x, final_norm_D_, rstd, gradient, at::Tensor(), gradient,
                            final_norm_gradient_D_);
  }
  scratch_.Release(mark);
  return loss;
}

Status LanguageModelImpl::Backward(const CheckedBatch& batch, const UnitHooks& hooks,
                                   const at::Tensor& gradient) {
  for (int layer = layers_ - 1; layer >= 0; --layer) {
    const size_t l = static_cast<size_t>(layer);
    RETURN_IF_ERROR(Call(hooks.before_backward, layer + 1));
    const size_t mark = kept_.Mark();
    if (Recomputes()) {
      BlockForward(weights_[l], Context(layer, batch), inputs_[l], at::Tensor(), /*keep=*/true,
                   &kept_, &saved_[l]);
    }
    BlockBackward(weights_[l], gradients_[l], Context(layer, batch), &saved_[l], &scratch_,
                  gradient);
    kept_.Release(mark);
    RETURN_IF_ERROR(Call(hooks.after_backward, layer + 1));
  }
  RETURN_IF_ERROR(Call(hooks.before_backward, 0));
  layers::EmbedBackward(gradient, batch.ids, embedding_gradient_VD_);
  return Call(hooks.after_backward, 0);
}

StatusOr<LossSum> LanguageModelImpl::ForwardBackward(const PackedBatch& packed, double loss_scale,
                                                     const UnitHooks& hooks) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  const c10::InferenceMode no_graph;
  Begin(batch);
  RETURN_IF_ERROR(Forward(batch, hooks));
  RETURN_IF_ERROR(Call(hooks.before_forward, HeadUnit()));
  const at::Tensor& x = inputs_[static_cast<size_t>(layers_)];
  const at::Tensor gradient = scratch_.Take({x.size(0), x.size(1)}, type_);
  LossSum sum;
  sum.tokens = batch.valid_labels;
  sum.loss = Head(batch, x, loss_scale, gradient);
  // The head runs forward and backward at once, chunk by chunk, so that the logits are never held.
  RETURN_IF_ERROR(Call(hooks.after_forward, HeadUnit()));
  RETURN_IF_ERROR(Call(hooks.before_backward, HeadUnit()));
  RETURN_IF_ERROR(Call(hooks.after_backward, HeadUnit()));
  RETURN_IF_ERROR(Backward(batch, hooks, gradient));
  return sum;
}

at::Tensor LanguageModelImpl::HiddenOnly(const CheckedBatch& batch) {
  const int64_t n = static_cast<int64_t>(batch.ids.size());
  const int64_t d = config_.d_model();
  Begin(batch);
  kept_.Release(0);
  scratch_.Release(0);
  at::Tensor x = kept_.Take({n, d}, type_);
  at::Tensor y = kept_.Take({n, d}, type_);
  layers::Embed(embedding_VD_, batch.ids, x);
  const size_t mark = kept_.Mark();
  for (int layer = 0; layer < layers_; ++layer) {
    BlockSaved unused;
    BlockForward(weights_[static_cast<size_t>(layer)], Context(layer, batch), x, y,
                 /*keep=*/false, &kept_, &unused);
    kept_.Release(mark);
    std::swap(x, y);
  }
  return x;
}

StatusOr<LossSum> LanguageModelImpl::Evaluate(const PackedBatch& packed) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  const c10::InferenceMode no_graph;
  LossSum sum;
  sum.tokens = batch.valid_labels;
  sum.loss = Head(batch, HiddenOnly(batch), 1.0, at::Tensor());
  return sum;
}

StatusOr<at::Tensor> LanguageModelImpl::Logits(const PackedBatch& packed) {
  ASSIGN_OR_RETURN(const CheckedBatch batch, CheckBatch(packed, config_.vocab_size()));
  const c10::InferenceMode no_graph;
  const at::Tensor x = HiddenOnly(batch);
  const int64_t n = x.size(0);
  const at::Tensor h = scratch_.Take({n, x.size(1)}, type_);
  const at::Tensor rstd = scratch_.Take({n}, statistics_);
  layers::RmsNorm(x, final_norm_D_, config_.norm_eps(), h, rstd);
  const at::Tensor logits = at::empty({n, config_.vocab_size()}, type_);
  layers::Linear(h, head_VD_, logits);
  return logits.to(statistics_);
}

}  // namespace

StatusOr<std::unique_ptr<LanguageModel>> LanguageModel::Create(
    const heddle::v1::ModelConfig& config, ParameterStore* store, LanguageModelOptions options) {
  ASSIGN_OR_RETURN(const ModelPlan plan, PlanModel(config));
  RETURN_IF_ERROR(CheckBlocks(config));
  if (plan.flat_elements != store->plan().flat_elements ||
      plan.tensors.size() != store->plan().tensors.size()) {
    return InvalidArgument("parameters: the store was made for another model");
  }
  return std::make_unique<LanguageModelImpl>(config, store, options);
}

}  // namespace heddle::model
