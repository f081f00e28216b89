#include "model/attention/attention_stack.h"

#include <algorithm>
#include <cmath>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/dsa_layer.h"
#include "model/attention/gqa_layer.h"
#include "model/attention/gsa_layer.h"
#include "model/attention/mla_layer.h"
#include "model/attention/nsa_layer.h"

namespace heddle::attention {

AttentionStack::AttentionStack(const heddle::v1::ModelConfig& config,
                               const std::vector<layers::LayerStorage>& storages, Cores cores)
    : config_(config),
      cores_(cores),
      ropes_(config, !storages.empty() && storages.front().type == at::kDouble) {
  for (const layers::LayerStorage& storage : storages) layers_.push_back(Make(storage));
}
AttentionStack::~AttentionStack() = default;

std::unique_ptr<layers::Sublayer> AttentionStack::Make(const layers::LayerStorage& storage) {
  using heddle::v1::AttentionKind;
  const AttentionKind kind = model::LayerKind(config_, storage.layer);
  const int64_t width = model::HeadsOf(config_).dim;
  const auto scale = [&] {
    return ropes_.Tables(width).frequencies().softmax_scale_factor /
           std::sqrt(static_cast<double>(width));
  };
  switch (kind) {
    case heddle::v1::ATTENTION_KIND_DENSE:
      if (dense_ == nullptr) {
        dense_ =
            cores_ == Cores::kFast ? MakeDense(scale()) : MakeReferenceCore(scale(), std::nullopt);
      }
      return MakeGqa(config_, storage, &ropes_, dense_.get());
    case heddle::v1::ATTENTION_KIND_SWA:
      if (window_ == nullptr) {
        const model::Window window = model::WindowOf(config_);
        window_ = cores_ == Cores::kFast ? MakeSlidingWindow(scale(), window)
                                         : MakeReferenceCore(scale(), window);
      }
      return MakeGqa(config_, storage, &ropes_, window_.get());
    case heddle::v1::ATTENTION_KIND_NSA:
      return MakeNsa(config_, storage, &ropes_);
    case heddle::v1::ATTENTION_KIND_GSA:
      return MakeGsa(config_, storage, &ropes_);
    case heddle::v1::ATTENTION_KIND_MLA:
      return MakeMla(config_, storage, &ropes_);
    case heddle::v1::ATTENTION_KIND_DSA:
      if (model::LayerUsesLatent(config_, storage.layer)) {
        return MakeDsaMla(config_, storage, &ropes_, &shared_);
      }
      return MakeDsa(config_, storage, &ropes_, &shared_);
    default:
      HEDDLE_CHECK(false, "PlanModel accepts no layer of kind ", static_cast<int>(kind));
      return nullptr;
  }
}

void AttentionStack::Begin(const layers::Documents& documents) {
  ropes_.Ensure(std::max<int64_t>(documents.longest, 1));
  const std::vector<int32_t> cu(documents.cu_seqlens.begin(), documents.cu_seqlens.end());
  if (dense_ != nullptr) dense_->Begin(cu);
  if (window_ != nullptr) window_->Begin(cu);
  for (const auto& layer : layers_) layer->Begin(documents);
}

}  // namespace heddle::attention
