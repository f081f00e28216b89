#include "model/inference/decoder.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/attention/attention.h"
#include "model/block.h"
#include "model/inference/kv_cache.h"
#include "model/layers/buffer_pool.h"
#include "model/layers/layers.h"
#include "model/layers/rope.h"
#include "model/parameter_store.h"

namespace heddle::inference {
namespace {

using model::BlockTensors;

at::ScalarType ComputeType(model::Precision precision) {
  if (precision == model::Precision::kBf16) return at::kBFloat16;
  return precision == model::Precision::kFp64 ? at::kDouble : at::kFloat;
}

class DecoderImpl : public Decoder {
 public:
  DecoderImpl(const heddle::v1::ModelConfig& config, model::ParameterStore* store);

  StatusOr<std::vector<float>> Feed(std::span<const int64_t> ids) override;
  void Reset() override;
  int64_t length() const override { return length_; }
  int64_t cache_bytes() const override;

 private:
  // Runs tokens through all blocks; x becomes the last hidden states.
  void Prefill(const std::vector<int32_t>& ids, at::Tensor* x);
  void Step(int32_t id, at::Tensor* x);
  void StepBlock(size_t layer, const std::vector<int32_t>& positions, const at::Tensor& x);
  std::vector<float> LastLogits(const at::Tensor& x);
  bool IsWindow(int layer) const {
    return model::LayerKind(config_, layer) == heddle::v1::ATTENTION_KIND_SWA;
  }

  const heddle::v1::ModelConfig config_;
  const model::Heads heads_;
  const at::ScalarType type_;
  const at::ScalarType statistics_;
  layers::RopeTables rope_;
  double scale_ = 0;
  std::unique_ptr<attention::AttentionCore> dense_;
  std::unique_ptr<attention::AttentionCore> window_;
  at::Tensor embedding_VD_;
  at::Tensor final_norm_D_;
  at::Tensor head_VD_;
  std::vector<BlockTensors> weights_;
  std::vector<std::unique_ptr<KvCache>> caches_;
  layers::BufferPool pool_;
  int64_t length_ = 0;
};

DecoderImpl::DecoderImpl(const heddle::v1::ModelConfig& config, model::ParameterStore* store)
    : config_(config),
      heads_(model::HeadsOf(config)),
      type_(ComputeType(store->precision())),
      statistics_(type_ == at::kDouble ? at::kDouble : at::kFloat),
      rope_(layers::RopeFrequenciesOf(config, heads_.dim), type_ == at::kDouble) {
  scale_ = rope_.frequencies().softmax_scale_factor / std::sqrt(static_cast<double>(heads_.dim));
  const model::Window window = model::WindowOf(config);
  dense_ = attention::MakeDense(scale_);
  window_ = attention::MakeSlidingWindow(scale_, window);
  const auto view = [&](const char* name) {
    return model::ViewTensor(store->plan(), name, store->compute_data(), type_);
  };
  embedding_VD_ = view("model.embed_tokens.weight");
  final_norm_D_ = view("model.norm.weight");
  head_VD_ = config.tie_embeddings() ? embedding_VD_ : view("lm_head.weight");
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    weights_.push_back(model::ViewBlock(store->plan(), layer, store->compute_data(), type_));
    caches_.push_back(std::make_unique<KvCache>(heads_.kv, heads_.dim,
                                                IsWindow(layer) ? window.keys : 0,
                                                IsWindow(layer) ? window.sinks : 0, type_));
  }
}

void DecoderImpl::Reset() {
  length_ = 0;
  for (const auto& cache : caches_) cache->Reset();
}

int64_t DecoderImpl::cache_bytes() const {
  int64_t sum = 0;
  for (const auto& cache : caches_) sum += cache->bytes();
  return sum;
}

void DecoderImpl::Prefill(const std::vector<int32_t>& ids, at::Tensor* x) {
  const int64_t n = static_cast<int64_t>(ids.size());
  const int64_t d = config_.d_model();
  const std::vector<int32_t> cu = {0, static_cast<int32_t>(n)};
  std::vector<int32_t> positions(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) positions[i] = static_cast<int32_t>(i);
  rope_.Ensure(n);
  dense_->Begin(cu);
  window_->Begin(cu);
  at::Tensor y = pool_.Take({n, d}, type_);
  layers::Embed(embedding_VD_, ids, *x);
  for (int layer = 0; layer < config_.n_layers(); ++layer) {
    const size_t l = static_cast<size_t>(layer);
    model::BlockContext context;
    context.heads = heads_;
    context.norm_eps = config_.norm_eps();
    context.rope = &rope_;
    context.positions = &positions;
    context.core = IsWindow(layer) ? window_.get() : dense_.get();
    model::BlockSaved saved;
    const size_t mark = pool_.Mark();
    model::BlockForward(weights_[l], context, *x, y, /*keep=*/false, &pool_, &saved);
    const model::HeadViews heads = model::SplitHeads(heads_, saved.qkv);
    caches_[l]->Append(heads.k, heads.v);
    pool_.Release(mark);
    std::swap(*x, y);
  }
}

void DecoderImpl::StepBlock(size_t layer, const std::vector<int32_t>& positions,
                            const at::Tensor& x) {
  const BlockTensors& w = weights_[layer];
  const int64_t d = config_.d_model();
  const size_t mark = pool_.Mark();
  const at::Tensor h = pool_.Take({1, d}, type_);
  const at::Tensor rstd = pool_.Take({1}, statistics_);
  const at::Tensor qkv = pool_.Take({1, w.qkv_CD.size(0)}, type_);
  const at::Tensor gate_up = pool_.Take({1, w.gate_up_2FD.size(0)}, type_);
  const at::Tensor hidden = pool_.Take({1, w.down_DF.size(1)}, type_);
  layers::RmsNorm(x, w.input_norm_D, config_.norm_eps(), h, rstd);
  layers::Linear(h, w.qkv_CD, qkv);
  layers::ApplyRope(rope_, {heads_.query + heads_.kv, heads_.dim, false, positions}, qkv);
  const model::HeadViews heads = model::SplitHeads(heads_, qkv);
  KvCache& cache = *caches_[layer];
  cache.Append(heads.k, heads.v);
  // [1, heads, rows, D]; every row of the cache is visible.
  const auto batched = [](const at::Tensor& t) { return t.unsqueeze(0).transpose(1, 2); };
  const at::Tensor o = std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
      batched(heads.q), batched(cache.keys()), batched(cache.values()), /*dropout_p=*/0.0,
      /*is_causal=*/false, /*attn_mask=*/std::nullopt, scale_));
  layers::LinearAdd(x, o.transpose(1, 2).reshape({1, w.o_DHd.size(1)}), w.o_DHd, x);
  layers::RmsNorm(x, w.post_norm_D, config_.norm_eps(), h, rstd);
  layers::Linear(h, w.gate_up_2FD, gate_up);
  layers::Swiglu(gate_up, hidden);
  layers::LinearAdd(x, hidden, w.down_DF, x);
  pool_.Release(mark);
}

void DecoderImpl::Step(int32_t id, at::Tensor* x) {
  rope_.Ensure(length_ + 1);
  const std::vector<int32_t> positions = {static_cast<int32_t>(length_)};
  layers::Embed(embedding_VD_, std::vector<int32_t>{id}, *x);
  for (size_t layer = 0; layer < weights_.size(); ++layer) StepBlock(layer, positions, *x);
}

std::vector<float> DecoderImpl::LastLogits(const at::Tensor& x) {
  const at::Tensor last = x.narrow(0, x.size(0) - 1, 1);
  const at::Tensor h = pool_.Take({1, x.size(1)}, type_);
  const at::Tensor rstd = pool_.Take({1}, statistics_);
  const at::Tensor logits = pool_.Take({1, config_.vocab_size()}, type_);
  layers::RmsNorm(last, final_norm_D_, config_.norm_eps(), h, rstd);
  layers::Linear(h, head_VD_, logits);
  const at::Tensor wide = logits.to(at::kFloat);
  const float* values = wide.data_ptr<float>();
  return {values, values + wide.numel()};
}

StatusOr<std::vector<float>> DecoderImpl::Feed(std::span<const int64_t> ids) {
  if (ids.empty()) return InvalidArgument("input_ids: no token");
  std::vector<int32_t> checked;
  for (const int64_t id : ids) {
    if (id < 0 || id >= config_.vocab_size()) {
      return InvalidArgument(
          Str("input_ids: ", id, " is outside the vocabulary of ", config_.vocab_size()));
    }
    checked.push_back(static_cast<int32_t>(id));
  }
  const c10::InferenceMode no_graph;
  pool_.Release(0);
  if (length_ == 0) {
    at::Tensor x = pool_.Take({static_cast<int64_t>(ids.size()), config_.d_model()}, type_);
    Prefill(checked, &x);
    length_ = static_cast<int64_t>(ids.size());
    return LastLogits(x);
  }
  at::Tensor x = pool_.Take({1, config_.d_model()}, type_);
  for (const int32_t id : checked) {
    Step(id, &x);
    ++length_;
  }
  return LastLogits(x);
}

}  // namespace

StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const heddle::v1::ModelConfig& config,
                                                   model::ParameterStore* store) {
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(config));
  RETURN_IF_ERROR(model::CheckBlocks(config));
  if (plan.flat_elements != store->plan().flat_elements) {
    return InvalidArgument("parameters: the store was made for another model");
  }
  return std::make_unique<DecoderImpl>(config, store);
}

}  // namespace heddle::inference
