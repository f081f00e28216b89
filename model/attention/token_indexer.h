// The half of an indexed attention layer that does not know its core: projections of the indexer,
// selection of keys, the KL loss that trains it and the gradients of its weights. DSA and GSA
// derive from it; GQA layers and MLA use it. Source: attention-and-moe.md sections 6 and 7.
//
// N rows, D model width, U width of the indexer's query input, HI indexer heads, dI their width. T
// compute type, S statistics type. Scores are formed in S from keys rounded to T, the type in which
// a cache stores them, so that decoding selects what training selected.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/attention/indexer.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {

// The keys of a micro-batch's rows.
struct Selection {
  KeySets sets;
  bool dense = false;  // every visible key: sets are CausalSets
};

// Hands the selection of a layer to the layers after it that share it (index_share_every). One per
// model, shared by its DSA layers. Layers run in order within a micro-batch.
struct SharedSelection {
  // shared_ptr: every layer that uses a selection keeps it until its own backward.
  std::shared_ptr<const Selection> latest;
};

// Rows as the scores take them.
struct IndexRows {
  IndexerInputs inputs;
  at::Tensor key_NI;  // [N, dI] T: inputs.k before it was widened, what a cache stores
};

// Index keys of one sequence, oldest first; the last one is the query's own.
struct CachedIndexKeys {
  at::Tensor key_TI;  // [t, dI] T
};

struct TokenIndexerOptions {
  double kl_weight = 1;
  double temperature = 1;  // of the scores under the KL's softmax
  kernels::indexer::TieBreak tie_break = kernels::indexer::TieBreak::kOldest;
  // A row with at most so many visible keys keeps all of them.
  int64_t least_count = 1;
};

class TokenIndexer {
 public:
  virtual ~TokenIndexer() = default;

  // First part of a forward. u and x are constants to the indexer; u may be x. Selects, or returns
  // the selection of the kSelect pass that a kRecompute repeats: never selects twice. A layer
  // without weights of its own takes the latest selection of `shared`. Fills cache_rows->index_k.
  // Takes scratch that must stay until Train returns. REQUIRES: N > 0.
  std::shared_ptr<const Selection> Select(const layers::PassContext& context,
                                          const at::Tensor& u_NU, const at::Tensor& x_ND);

  // Whether the attention must produce a target over the selection's keys for Train.
  bool Trains(const layers::PassContext& context) const;

  // What the attention computed over the keys of the selection: q [N, H, Dk], k [N, J, Dk] T,
  // rotated, lse [N, H] S.
  struct Target {
    at::Tensor q_NHD;
    at::Tensor k_NJD;
    at::Tensor lse_NH;
    double scale = 0;
  };
  // Second part of a forward, after the attention: adds kl_weight row_scale sum(KL) to
  // context.losses if the pass counts, and forms the gradients if it keeps. No-op unless
  // Trains(context).
  void Train(const layers::PassContext& context, const Selection& selection, const Target& target);

  // Adds to the gradients of the indexer's weights: those of the loss of Train, with its row_scale.
  // u and x get none. u and x are those of Select.
  void Backward(const layers::PassContext& context, const at::Tensor& u_NU, const at::Tensor& x_ND);

  // ---- Decoding -----------------------------------------------------------------------------

  // False: this layer shares the selection of one before it.
  bool has_weights() const { return has_weights_; }
  // Rows of new tokens at `positions`. Tensors from `pool`.
  virtual IndexRows Project(std::span<const int32_t> positions, const at::Tensor& u_NU,
                            const at::Tensor& x_ND, layers::BufferPool* pool) = 0;
  // Scores [t] S of row `row` against every cached key.
  at::Tensor ScoreCached(const IndexRows& rows, int64_t row, const CachedIndexKeys& keys) const;
  // Keys that row `row` attends to, ascending: what Select gives for it in a forward.
  std::vector<int32_t> SelectCached(const IndexRows& rows, int64_t row,
                                    const CachedIndexKeys& keys) const;

  // See layers::Sublayer.
  virtual std::span<double> statistics() { return {}; }
  virtual void UpdateBuffers() {}

 protected:
  TokenIndexer(const TokenIndexerOptions& options, bool has_weights, SharedSelection* shared)
      : options_(options), has_weights_(has_weights), shared_(shared) {}

  const TokenIndexerOptions& options() const { return options_; }

  // Keys per row: at least 1, at most the visible ones.
  virtual std::vector<int32_t> CountKeys(const layers::PassContext& context,
                                         const IndexerInputs& inputs) = 0;
  // Same for one row with `inputs` of that row against a cache (inputs.k [t, dI]).
  virtual int32_t CountCached(const IndexerInputs& inputs) const = 0;
  // True: CountKeys is called whatever the selection is, because it collects statistics.
  virtual bool Measures(const layers::PassContext& /*context*/) const { return false; }
  // Turns gradients of the scores' inputs into those that AddGradients needs, kept in `kept`.
  virtual void KeepGradients(const layers::PassContext& context,
                             const IndexerGradients& gradients) = 0;
  virtual void AddGradients(const layers::PassContext& context, const at::Tensor& u_NU,
                            const at::Tensor& x_ND) = 0;

 private:
  std::shared_ptr<const Selection> MakeSelection(const layers::PassContext& context,
                                                 const at::Tensor& u, const at::Tensor& x);

  TokenIndexerOptions options_;
  bool has_weights_;
  SharedSelection* shared_;  // null: nothing is shared
  IndexRows rows_;           // from Select to Train
  std::shared_ptr<const Selection> saved_;
  bool has_gradients_ = false;
};

// t in S: t itself, or a copy from `pool`.
at::Tensor Widen(const at::Tensor& t, layers::BufferPool* pool);
// t in `type`: t itself, or a copy from `pool`.
at::Tensor ConvertTo(const at::Tensor& t, at::ScalarType type, layers::BufferPool* pool);

// Row `row` of `rows` as the only query against `keys`, the last of which is its own.
IndexerInputs CachedInputs(const IndexRows& rows, int64_t row, const CachedIndexKeys& keys);
// Statistics of that query's scores, each [1].
ScoreStatistics MeasureCached(const IndexerInputs& inputs);

}  // namespace heddle::attention
