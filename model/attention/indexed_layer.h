// Grouped-query attention over the keys that an indexer selects, with the gates of GSA where they
// are wanted: the layer of DSA (attention-and-moe.md section 6, core gqa) and of GSA (section 7).
//
//   q, k, v = h Wqkv, q and k rotated        v <- v act(h W2 + b2)
//   o = softmax attention over S_t           o <- a dense + (1 - a) o        o <- o act(h W1 + b1)
//   out = residual + o Wo
//
// S_t: every visible key in stage 1, the indexer's selection in stage 2. N rows, H query heads, J
// key heads, D head width, G columns of a gate, D' model width.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "model/attention/gates.h"
#include "model/attention/gqa_layer.h"
#include "model/attention/token_indexer.h"

namespace heddle::attention {

// What decoding needs of a batch of new tokens, from IndexedLayer::Project.
struct IndexedRows {
  at::Tensor q_NHD;        // rotated
  at::Tensor k_NJD;        // rotated: to the cache
  at::Tensor v_NJD;        // gated: to the cache
  at::Tensor output_z_NG;  // logits of the output gate, undefined: none
  IndexRows index;         // index.key_NI to the cache; empty where the layer shares a selection
};

// A sequence's cache, oldest first, the query's own row last. The first dimension of k and v may
// be strided.
struct IndexedCache {
  at::Tensor k_TJD;
  at::Tensor v_TJD;
  CachedIndexKeys index;  // undefined where the layer shares a selection
};

class IndexedLayer final : public layers::Sublayer {
 public:
  struct Parts {
    std::unique_ptr<TokenIndexer> indexer;
    std::optional<Gate> value_gate;
    std::optional<Gate> output_gate;
    double dense_share = 0;  // a
  };
  IndexedLayer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
               layers::RopeSet* ropes, Parts parts);

  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;
  void Backward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override;
  std::span<double> statistics() override { return parts_.indexer->statistics(); }
  void UpdateBuffers() override { parts_.indexer->UpdateBuffers(); }

  // The selection of the last forward that was not kInference, null before it.
  const Selection* selection() const { return selection_.get(); }

  // ---- Decoding: the rows of new tokens, then one row over its sequence's cache ---------------

  TokenIndexer& indexer() { return *parts_.indexer; }
  double scale() const { return scale_; }
  double dense_share() const { return parts_.dense_share; }
  // Tensors from `pool`. REQUIRES: the rotary tables reach the positions.
  IndexedRows Project(std::span<const int32_t> positions, const at::Tensor& h_ND,
                      layers::BufferPool* pool);
  // o [1, H, D] of row `row` over the `selected` rows of the cache (ascending; what
  // indexer().SelectCached gives, or the layer whose selection is shared).
  void Attend(const IndexedRows& rows, int64_t row, const IndexedCache& cache,
              const std::vector<int32_t>& selected, const at::Tensor& o_1HD) const;
  // out = residual + gated o Wo for all rows; o [N, H, D] is overwritten.
  void Output(const IndexedRows& rows, const at::Tensor& o_NHD, const at::Tensor& residual_ND,
              const at::Tensor& out_ND) const;

 private:
  // One softmax of the blend.
  struct Branch {
    at::Tensor o;    // [N, H, D]
    at::Tensor lse;  // [N, H] S
  };
  Branch Attention(const layers::PassContext& context, const KeySets& sets) const;
  void AttentionBackward(const layers::PassContext& context, const KeySets& sets,
                         const Branch& branch, const at::Tensor& d_o, const HeadViews& d_heads);
  // The selection is neither attended to nor trained on.
  bool SkipsSelection(const layers::PassContext& context) const;
  void ProjectRows(std::span<const int32_t> positions, const at::Tensor& h,
                   layers::BufferPool* pool);
  // o before its gate: the branches' blend, in `pool` if there are two of them.
  at::Tensor Blend(layers::BufferPool* pool) const;
  at::Tensor ByHead(const at::Tensor& o) const;

  QkvProjection projection_;
  Parts parts_;
  at::Tensor o_weight_;
  at::Tensor o_gradient_;
  double scale_;

  // Of the last forward.
  at::Tensor qkv_;      // q and k rotated, v before its gate
  at::Tensor v_;        // gated; a view of qkv_ without a gate
  at::Tensor value_z_;  // logits of the gates
  at::Tensor output_z_;
  std::shared_ptr<const Selection> selection_;  // shared with the layers of one selection
  std::optional<Branch> sparse_;
  std::optional<Branch> dense_;
  double sparse_share_ = 1;
};

}  // namespace heddle::attention
