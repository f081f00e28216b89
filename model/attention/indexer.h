// Torch edge of kernels/indexer: selection and training of the indexers of DSA and GSA over packed
// documents, on LibTorch's threads. Tensors of type T are converted to S (fp32; fp64 where T is
// fp64): scores are never formed in bf16 (attention-and-moe.md section 1, precision).
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/indexer/params.h"
#include "model/attention/key_sets.h"

namespace heddle::attention {

struct IndexerInputs {
  at::Tensor q_NHI;        // [N, HI, dI] S
  at::Tensor k_NI;         // [N, dI] S
  at::Tensor w_NH;         // [N, HI] S
  at::Tensor head_bias_H;  // [HI] S or undefined
  kernels::indexer::Activation activation = kernels::indexer::Activation::kRelu;
  double score_scale = 1;
};

// counts[t] keys for row t; counts are clamped to the visible keys.
KeySets SelectKeys(const IndexerInputs& inputs, const layers::Documents& documents,
                   const std::vector<int32_t>& counts, kernels::indexer::TieBreak tie_break);

// Rows that leave out a visible key although what their scores are made of has a NaN: the query,
// its head weights, the head biases or a visible key. Their choice means nothing.
int64_t CountNanRows(const IndexerInputs& inputs, const layers::Documents& documents,
                     const std::vector<int32_t>& counts);

struct ScoreStatistics {
  at::Tensor mean_N;      // S
  at::Tensor variance_N;  // population variance of the visible scores
  at::Tensor maximum_N;
  at::Tensor entropy_N;
};
ScoreStatistics MeasureScores(const IndexerInputs& inputs, const layers::Documents& documents);

// Dense score matrix of one document, [T, T] S, -inf where hidden: tests and heat maps only.
at::Tensor ScoreMatrix(const IndexerInputs& inputs, const layers::Documents& documents, int64_t b);

struct KlTarget {
  at::Tensor q_NHD;  // attention's queries and keys, rotated, T
  at::Tensor k_NJD;
  at::Tensor lse_NH;  // S, over the same keys
  double scale = 0;
  const KeySets* sets = nullptr;  // null: all visible keys (stage 1)
};
struct IndexerGradients {
  at::Tensor dq_NHI;
  at::Tensor dk_NI;
  at::Tensor dw_NH;
  at::Tensor dhead_bias_H;
};
// Sum over rows of KL. With `gradients` also d(row_weight * sum)/d(inputs), overwritten.
double IndexerKl(const IndexerInputs& inputs, const layers::Documents& documents,
                 const KlTarget& target, double temperature, double row_weight,
                 IndexerGradients* gradients);

}  // namespace heddle::attention
