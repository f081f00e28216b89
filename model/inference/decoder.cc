#include "model/inference/decoder.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/attention/attention_stack.h"
#include "model/block.h"
#include "model/inference/decode_attention.h"
#include "model/layers/layers.h"
#include "model/layers/norm.h"
#include "model/parameter_store.h"
#include "model/store_views.h"

namespace heddle::inference {
namespace {

struct Sequence {
  int64_t length = 0;
  std::vector<std::unique_ptr<SequenceCache>> caches;  // by layer
};

// Rows of one pass through the blocks, and which sequence each document belongs to.
struct Batch {
  std::vector<int32_t> ids;
  std::vector<int32_t> positions;
  std::vector<int32_t> cu_seqlens = {0};
  std::vector<Sequence*> sequences;
  int64_t longest = 0;

  void Add(Sequence* sequence, std::span<const int64_t> tokens) {
    int32_t position = static_cast<int32_t>(sequence->length);
    for (const int64_t id : tokens) {
      ids.push_back(static_cast<int32_t>(id));
      positions.push_back(position++);
    }
    cu_seqlens.push_back(static_cast<int32_t>(ids.size()));
    sequences.push_back(sequence);
    longest = std::max<int64_t>(longest, static_cast<int64_t>(tokens.size()));
  }
  layers::Documents documents() const { return {cu_seqlens, positions, longest}; }
  int64_t rows() const { return static_cast<int64_t>(ids.size()); }
};

class DecoderImpl : public Decoder {
 public:
  DecoderImpl(const heddle::v1::ModelConfig& config, model::ParameterStore* store,
              const DecoderOptions& options);

  SequenceId Open(int64_t reserve) override;
  void Close(SequenceId sequence) override;
  StatusOr<at::Tensor> Feed(std::span<const Turn> turns) override;
  int64_t length(SequenceId sequence) const override { return Get(sequence).length; }
  int64_t cache_bytes(SequenceId sequence) const override;
  int64_t allocated_bytes(SequenceId sequence) const override;
  DecoderCounters counters() const override;

 private:
  const Sequence& Get(SequenceId sequence) const;
  Status Check(std::span<const Turn> turns) const;
  // Each runs a batch through all blocks and returns the hidden states [rows, D].
  at::Tensor Prefill(const Batch& batch);
  at::Tensor Decode(const Batch& batch);
  // logits[turns[i]] = head of row rows[i] of x.
  void Head(const at::Tensor& x, const std::vector<int64_t>& rows,
            const std::vector<int64_t>& turns, const at::Tensor& logits);

  const heddle::v1::ModelConfig config_;
  const at::ScalarType type_;
  const std::vector<layers::LayerStorage> storages_;
  attention::AttentionStack prefill_;
  DecodeShared shared_;
  std::vector<std::unique_ptr<DecodeAttention>> decode_;
  std::vector<model::Block> blocks_;
  layers::Norm final_norm_;
  at::Tensor embedding_VD_;
  at::Tensor head_VD_;  // the embedding where tied
  layers::BufferPool kept_;
  layers::BufferPool scratch_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_ = 0;
  int64_t prefill_block_rows_ = 0;
  int64_t decode_block_rows_ = 0;
};

DecoderImpl::DecoderImpl(const heddle::v1::ModelConfig& config, model::ParameterStore* store,
                         const DecoderOptions& options)
    : config_(config),
      type_(model::ComputeType(store->precision())),
      storages_(model::StoragesOf(*store)),
      prefill_(config_, storages_),
      final_norm_(config_, model::ModelStorage(*store), "model.norm") {
  const layers::LayerStorage model = model::ModelStorage(*store);
  embedding_VD_ = model.Weight("model.embed_tokens.weight");
  head_VD_ = config.tie_embeddings() ? embedding_VD_ : model.Weight("lm_head.weight");
  const DecodeLayerContext context{&config_, prefill_.ropes(), &shared_, options.cache};
  for (const layers::LayerStorage& storage : storages_) {
    blocks_.emplace_back(config_, storage);
    decode_.push_back(MakeDecodeAttention(context, storage));
  }
}

SequenceId DecoderImpl::Open(int64_t reserve) {
  const c10::InferenceMode no_graph;
  Sequence sequence;
  for (const auto& layer : decode_) {
    sequence.caches.push_back(layer->MakeCache());
    sequence.caches.back()->Reserve(reserve);
  }
  sequences_.emplace(next_, std::move(sequence));
  return next_++;
}

void DecoderImpl::Close(SequenceId sequence) {
  HEDDLE_CHECK(sequences_.erase(sequence) == 1, "sequence is not open");
}

const Sequence& DecoderImpl::Get(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  HEDDLE_CHECK(found != sequences_.end(), "sequence is not open");
  return found->second;
}

int64_t DecoderImpl::cache_bytes(SequenceId sequence) const {
  int64_t sum = 0;
  for (const auto& cache : Get(sequence).caches) sum += cache->bytes();
  return sum;
}

int64_t DecoderImpl::allocated_bytes(SequenceId sequence) const {
  int64_t sum = 0;
  for (const auto& cache : Get(sequence).caches) sum += cache->allocated_bytes();
  return sum;
}

DecoderCounters DecoderImpl::counters() const {
  const int64_t blocks = static_cast<int64_t>(blocks_.size());
  return {prefill_block_rows_ / blocks, decode_block_rows_ / blocks, shared_.attended_keys};
}

Status DecoderImpl::Check(std::span<const Turn> turns) const {
  std::set<SequenceId> seen;
  for (size_t i = 0; i < turns.size(); ++i) {
    const auto bad = [&](auto... what) { return InvalidArgument(Str("turn ", i, ": ", what...)); };
    if (!sequences_.contains(turns[i].sequence)) {
      return bad("sequence ", turns[i].sequence, " is not open");
    }
    if (!seen.insert(turns[i].sequence).second) {
      return bad("sequence ", turns[i].sequence, " stands twice");
    }
    if (turns[i].ids.empty()) return bad("no token");
    for (const int64_t id : turns[i].ids) {
      if (id < 0 || id >= config_.vocab_size()) {
        return bad("id ", id, " is outside the vocabulary of ", config_.vocab_size());
      }
    }
  }
  return OkStatus();
}

at::Tensor DecoderImpl::Prefill(const Batch& batch) {
  const layers::Documents documents = batch.documents();
  prefill_.Begin(documents);
  layers::CacheRows rows;
  layers::PassContext context;
  context.documents = &documents;
  context.kept = &kept_;
  context.scratch = &scratch_;
  context.cache_rows = &rows;
  at::Tensor x = kept_.Take({batch.rows(), config_.d_model()}, type_);
  at::Tensor y = kept_.Take({batch.rows(), config_.d_model()}, type_);
  layers::Embed(embedding_VD_, batch.ids, x);
  for (size_t layer = 0; layer < blocks_.size(); ++layer) {
    const size_t mark = kept_.Mark();
    rows = {};
    blocks_[layer].feed_forward()->Begin(documents);
    blocks_[layer].Forward(context, prefill_.layer(static_cast<int>(layer)), x, y);
    for (size_t b = 0; b < batch.sequences.size(); ++b) {
      batch.sequences[b]->caches[layer]->Append(rows, batch.cu_seqlens[b], batch.cu_seqlens[b + 1]);
    }
    kept_.Release(mark);
    prefill_block_rows_ += batch.rows();
    std::swap(x, y);
  }
  for (size_t b = 0; b < batch.sequences.size(); ++b) {
    batch.sequences[b]->length += batch.cu_seqlens[b + 1] - batch.cu_seqlens[b];
  }
  return x;
}

at::Tensor DecoderImpl::Decode(const Batch& batch) {
  const layers::Documents documents = batch.documents();
  const int32_t last = *std::max_element(batch.positions.begin(), batch.positions.end());
  prefill_.ropes()->Ensure(last + 1);
  layers::PassContext context;
  context.documents = &documents;
  context.kept = &kept_;
  context.scratch = &scratch_;
  at::Tensor x = kept_.Take({batch.rows(), config_.d_model()}, type_);
  at::Tensor y = kept_.Take({batch.rows(), config_.d_model()}, type_);
  layers::Embed(embedding_VD_, batch.ids, x);
  for (size_t layer = 0; layer < blocks_.size(); ++layer) {
    const size_t mark = kept_.Mark();
    std::vector<SequenceCache*> caches;
    for (Sequence* sequence : batch.sequences) caches.push_back(sequence->caches[layer].get());
    decode_[layer]->Continue(std::move(caches));
    blocks_[layer].feed_forward()->Begin(documents);
    blocks_[layer].Forward(context, decode_[layer].get(), x, y);
    kept_.Release(mark);
    decode_block_rows_ += batch.rows();
    std::swap(x, y);
  }
  for (Sequence* sequence : batch.sequences) ++sequence->length;
  return x;
}

void DecoderImpl::Head(const at::Tensor& x, const std::vector<int64_t>& rows,
                       const std::vector<int64_t>& turns, const at::Tensor& logits) {
  const int64_t n = static_cast<int64_t>(rows.size());
  const at::Tensor last = kept_.Take({n, x.size(1)}, type_);
  const at::Tensor h = kept_.Take({n, x.size(1)}, type_);
  const at::Tensor norm_saved = kept_.Take({n}, layers::StatisticsType(type_));
  const at::Tensor out = kept_.Take({n, config_.vocab_size()}, type_);
  for (int64_t i = 0; i < n; ++i) last[i].copy_(x[rows[static_cast<size_t>(i)]]);
  final_norm_.Forward(last, h, norm_saved);
  layers::Linear(h, head_VD_, out);
  for (int64_t i = 0; i < n; ++i) logits[turns[static_cast<size_t>(i)]].copy_(out[i]);
}

StatusOr<at::Tensor> DecoderImpl::Feed(std::span<const Turn> turns) {
  RETURN_IF_ERROR(Check(turns));
  const c10::InferenceMode no_graph;
  const int64_t count = static_cast<int64_t>(turns.size());
  const at::Tensor logits = at::empty({count, config_.vocab_size()}, layers::StatisticsType(type_));
  // Round 0 takes whole prompts and the first token of other turns, round r their token r.
  std::vector<bool> prompt;
  size_t rounds = turns.empty() ? 0 : 1;
  for (const Turn& turn : turns) {
    prompt.push_back(Get(turn.sequence).length == 0);
    if (!prompt.back()) rounds = std::max(rounds, turn.ids.size());
  }
  for (size_t round = 0; round < rounds; ++round) {
    for (const bool prefill : {true, false}) {
      Batch batch;
      std::vector<int64_t> rows;
      std::vector<int64_t> ended;
      for (size_t i = 0; i < turns.size(); ++i) {
        const std::span<const int64_t> ids = turns[i].ids;
        if (prompt[i] != prefill || round >= (prefill ? 1 : ids.size())) continue;
        batch.Add(&sequences_.at(turns[i].sequence), prefill ? ids : ids.subspan(round, 1));
        if (prefill || round + 1 == ids.size()) {
          rows.push_back(batch.rows() - 1);
          ended.push_back(static_cast<int64_t>(i));
        }
      }
      if (batch.ids.empty()) continue;
      kept_.Release(0);
      scratch_.Release(0);
      const at::Tensor x = prefill ? Prefill(batch) : Decode(batch);
      if (!rows.empty()) Head(x, rows, ended, logits);
    }
  }
  return logits;
}

}  // namespace

DecoderOptions DecoderOptionsOf(const heddle::v1::KvCacheConfig& config) {
  DecoderOptions options;
  options.cache.threshold = config.threshold();
  switch (config.quantization()) {
    case heddle::v1::KvCacheConfig::QUANTIZATION_FP8:
      options.cache.quantization = Quantization::kFp8;
      break;
    case heddle::v1::KvCacheConfig::QUANTIZATION_INT8:
      options.cache.quantization = Quantization::kInt8;
      break;
    case heddle::v1::KvCacheConfig::QUANTIZATION_NONE:
      break;
  }
  return options;
}

StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const heddle::v1::ModelConfig& config,
                                                   model::ParameterStore* store,
                                                   const DecoderOptions& options) {
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(config));
  if (plan.flat_elements != store->plan().flat_elements ||
      plan.tensors.size() != store->plan().tensors.size()) {
    return InvalidArgument("parameters: the store was made for another model");
  }
  return std::make_unique<DecoderImpl>(config, store, options);
}

}  // namespace heddle::inference
