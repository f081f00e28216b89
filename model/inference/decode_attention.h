// Attention of a decoder: half a block, like the layers of training, for rows that each continue a
// sequence of their own. Row b of a forward is the next token of sequence b: it is projected,
// rotated at its position, appended to the cache of its sequence, attends over that cache and is
// projected out. Nothing of the prefix is computed again. A kind's layer and cache belong together.
//
// B rows, one per sequence; D model width.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "model/attention/token_indexer.h"
#include "model/inference/kv_cache.h"
#include "model/layers/rope.h"
#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::inference {

// What one layer keeps of one sequence.
class SequenceCache {
 public:
  virtual ~SequenceCache() = default;

  // Room for a sequence of `length` tokens, not more; appending beyond it works and doubles.
  virtual void Reserve(int64_t length) = 0;
  // Appends tokens [begin, end) of a forward, which are the sequence's next ones: after prefill
  // those of the training layer, in decoding those of DecodeAttention.
  virtual void Append(const layers::CacheRows& rows, int64_t begin, int64_t end) = 0;
  // Bytes that the sequence needs at its length: the formula of its kind's section.
  virtual int64_t bytes() const = 0;
  virtual int64_t allocated_bytes() const = 0;
};

class DecodeAttention : public layers::Sublayer {
 public:
  virtual std::unique_ptr<SequenceCache> MakeCache() const = 0;

  // The caches that the rows of the next Forward continue, one per row, made by MakeCache of this
  // layer. Borrowed until the end of that Forward.
  void Continue(std::vector<SequenceCache*> caches) { caches_ = std::move(caches); }

  // kInference only; positions of the rows are those of context.documents, whose cu_seqlens makes
  // each row a document of its own.
  void Forward(const layers::PassContext& context, const at::Tensor& h_BD,
               const at::Tensor& residual_BD, const at::Tensor& out_BD) override = 0;
  // Decoding does not train: aborts.
  void Backward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override;

 protected:
  const std::vector<SequenceCache*>& caches() const { return caches_; }
  // Row b to cache b. REQUIRES: one cache per row.
  void AppendRows(const layers::CacheRows& rows) const {
    for (size_t b = 0; b < caches_.size(); ++b) {
      const int64_t row = static_cast<int64_t>(b);
      caches_[b]->Append(rows, row, row + 1);
    }
  }

 private:
  std::vector<SequenceCache*> caches_;
};

// What the layers of one decoder share: a counter, and within a pass the keys that the last layer
// with an indexer of its own selected, for the layers that share its selection (index_share_every).
struct DecodeShared {
  // Keys that attention scored since the decoder was made, once per key head that has keys of its
  // own (MLA: one) and per branch: what the cost formulas count (X4).
  int64_t attended_keys = 0;
  std::vector<std::vector<int32_t>> selected;  // by row
  attention::SharedSelection training;         // of the layers' forward, which decoding never calls
};

struct DecodeLayerContext {
  const heddle::v1::ModelConfig* config = nullptr;
  layers::RopeSet* ropes = nullptr;
  DecodeShared* shared = nullptr;
  CacheQuantization quantization;
};

// The decoding layer of storage.layer, by its kind. What `context` points to outlives the layer.
std::unique_ptr<DecodeAttention> MakeDecodeAttention(const DecodeLayerContext& context,
                                                     const layers::LayerStorage& storage);

// By kind: dense and swa; nsa; gsa and dsa; mla and dsa on mla.
std::unique_ptr<DecodeAttention> MakeDecodeGqa(const DecodeLayerContext& context,
                                               const layers::LayerStorage& storage);
std::unique_ptr<DecodeAttention> MakeDecodeNsa(const DecodeLayerContext& context,
                                               const layers::LayerStorage& storage);
std::unique_ptr<DecodeAttention> MakeDecodeIndexed(const DecodeLayerContext& context,
                                                   const layers::LayerStorage& storage);
std::unique_ptr<DecodeAttention> MakeDecodeMla(const DecodeLayerContext& context,
                                               const layers::LayerStorage& storage);

}  // namespace heddle::inference
